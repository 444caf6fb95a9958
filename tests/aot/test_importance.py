"""AdaLoRA's importance kernels compile for Ampere, Hopper and Blackwell, and nothing spills."""

import pytest
import torch
from aot.pretend import SHARED_MEMORY_LIMIT, Census, pretend, take_censuses
from aot.sweep import ARCHS, BF16, FP32, META

from fastlora.kernels import importance
from fastlora.kernels.importance_plan import Layout

# (r, K, N) of every layer, dtype, whether the addresses are aligned: a usual rank, one with several blocks of ranks,
# one that divides nothing.
PROBLEMS = [(12, 4096, 11008, FP32, True), (12, 4096, 11008, BF16, True), (128, 4096, 4096, FP32, True)]
PROBLEMS += [(13, 1003, 777, FP32, False)]


def launch(r: int, k: int, n: int, dtype: torch.dtype, aligned: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    layout = Layout([(r, k, n)] * 3)
    sizes = importance.partials_size(layout, META)
    flat = [empty(layout.numel), empty(layout.numel), empty(layout.total_rank), *(empty(size) for size in sizes)]
    like, addresses = empty(r, 1, dtype=dtype), empty(3, 6, dtype=torch.int64)
    importance.update(layout, addresses, like, *flat, empty(1), 0.85, 0.85, aligned)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, list[tuple[dict, Census | str]]]:
    """By architecture: each launch's constants, and what was made of it."""
    launches = {}
    for arch in ARCHS:
        with pretend(arch) as recorded:
            for problem in PROBLEMS:
                launch(*problem)
        launches[arch] = list(recorded)
    every = [one for several in launches.values() for one in several]
    censuses = take_censuses(every, tmp_path_factory.mktemp("triton"))
    return {arch: [(one.constants(), censuses[one.key]) for one in several] for arch, several in launches.items()}


def faults(compiled, arch, wrong) -> list[str]:
    return [f"{constants}: {census}" for constants, census in compiled[arch] if wrong(census)]


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_spills_atomics_or_scratch(compiled, arch):
    assert len(compiled[arch]) == 3 * len(PROBLEMS)
    assert not faults(compiled, arch, lambda census: not isinstance(census, Census))
    assert not faults(compiled, arch, lambda census: census.spills or census.local or census.stack)
    assert not faults(compiled, arch, lambda census: census.atomics or census.scratch)
    assert not faults(compiled, arch, lambda census: census.shared > SHARED_MEMORY_LIMIT[arch])
    assert not faults(compiled, arch, lambda census: census.registers > 80)  # six programs of 128 threads fit
