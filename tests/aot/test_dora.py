"""DoRA's kernels compile for Ampere, Hopper and Blackwell, nothing spills, and memory is moved in wide pieces."""

from dataclasses import dataclass

import pytest
import torch
from aot.pretend import SHARED_MEMORY_LIMIT, Census, Launch, pretend, take_censuses
from aot.sweep import ARCHS, BF16, FP32, META

from fastlora.kernels import dora


@dataclass(frozen=True)
class Problem:
    r: int
    m: int = 8192
    n: int = 4096
    k: int = 4096
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = BF16


# The usual one and the heaviest (narrow, so that its columns are split); then every configuration that the rules have.
PROBLEMS = [
    Problem(16, adapter_dtype=FP32),
    Problem(64, m=1000, n=1001, k=1003, adapter_dtype=FP32),
    Problem(16),
    Problem(128, adapter_dtype=FP32),
    Problem(256),
    Problem(16, n=1024, dtype=FP32, adapter_dtype=FP32),
]


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def launch(p: Problem) -> None:
    """Every kernel as a training step of this problem launches it."""
    weight, z = empty(p.n, p.k, dtype=p.dtype), empty(p.m, p.n, dtype=p.dtype)
    a, b = empty(p.r, p.k, dtype=p.adapter_dtype), empty(p.n, p.r, dtype=p.adapter_dtype)
    dora.dora_norm(weight, a, b, 2.0, empty(p.n), empty(dora.norm_workspace(weight, a)))
    magnitude, norm, bias = empty(p.n), empty(p.n), empty(p.n, dtype=p.dtype)
    dora.scale(z, magnitude, norm, bias, torch.empty_like(z))
    workspace = empty(dora.scale_backward_workspace(z))
    dora.scale_backward(z, z, magnitude, norm, torch.empty_like(z), empty(2, p.n), workspace, needs_bias=True)


@pytest.fixture(scope="module", params=["usual", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, tmp_path_factory) -> dict[int, list[tuple[Launch, Census]]]:
    """Every launch of DoRA's own kernels with its census, a kind once."""
    kinds: dict[int, list[Launch]] = {}
    for arch in ARCHS:
        with pretend(arch) as recorded:
            for problem in PROBLEMS if request.param == "all" else PROBLEMS[:2]:
                launch(problem)
        own = [one for one in recorded if not one.name.startswith("_reduce")]
        kinds[arch] = list({one.key: one for one in own}.values())
    results = take_censuses([one for several in kinds.values() for one in several], tmp_path_factory.mktemp("triton"))
    failed = {key: why for key, why in results.items() if not isinstance(why, Census)}
    assert not failed, failed
    return {arch: [(one, results[one.key]) for one in several] for arch, several in kinds.items()}  # type: ignore[misc]


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_shared_memory_fits(compiled, arch):
    assert {one.name for one, _ in compiled[arch]} == {
        "_dora_norm_kernel",
        "_root_kernel",
        "_scale_kernel",
        "_scale_backward_kernel",
    }
    for one, census in compiled[arch]:
        about = f"{one.name} {one.constants()}: {census}"
        assert not (census.spills or census.local or census.stack or census.atomics or census.scratch), about
        assert census.shared <= SHARED_MEMORY_LIMIT[arch], about


@pytest.mark.parametrize("arch", ARCHS)
def test_the_adapter_is_multiplied_on_the_matrix_units(compiled, arch):
    """fp32 factors too, as tf32 in three products: on the plain units r = 128 would take four times W0's reading."""
    for one, census in compiled[arch]:
        if one.name == "_dora_norm_kernel":
            assert census.matrix_instructions, one.constants()
