"""The MLP's kernels compile for Ampere, Hopper and Blackwell, and nothing spills."""

from dataclasses import dataclass

import pytest
import torch
from aot.pretend import SHARED_MEMORY_LIMIT, Census, Launch, pretend, take_censuses
from aot.sweep import ARCHS, BF16, FP32, META

from fastlora.kernels import mlp


@dataclass(frozen=True)
class Problem:
    r: int
    m: int = 8192
    k: int = 14336
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = BF16
    activation: str = "silu"
    gated: bool = True
    dropout: float = 0.1


# The heaviest flags of every configuration that the rules have; silu as models have it, gelu with erf's polynomials.
# No other activation, flag or rank that was tried takes more registers.
PROBLEMS = [
    Problem(16),
    Problem(64, adapter_dtype=FP32, activation="gelu"),
    Problem(64, m=1000, k=1003, adapter_dtype=FP32, activation="gelu"),
    Problem(16, dtype=FP32, adapter_dtype=FP32, activation="gelu"),
]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def launch(p: Problem) -> None:
    """Every kernel as a training step of this problem launches it."""
    gate, dh = empty(p.m, p.k, dtype=p.dtype), empty(p.m, p.k, dtype=p.dtype)
    up = empty(p.m, p.k, dtype=p.dtype) if p.gated else None
    a, s = empty(p.r, p.k, dtype=p.adapter_dtype), empty(p.m, p.r, dtype=p.adapter_dtype)
    dropout = {"seed": empty(1, dtype=torch.int64), "dropout_p": p.dropout} if p.dropout else {}
    workspace = empty(mlp.activate_workspace(gate, a), dtype=FP32)
    mlp.activate(gate, up, p.activation, torch.empty_like(gate), a, s, workspace, **dropout)
    workspace = empty(mlp.activate_backward_workspace(gate, p.r), dtype=FP32)
    dup = torch.empty_like(gate) if p.gated else None
    mlp.activate_backward(dh, s, gate, up, p.activation, a, dh, dup, torch.empty_like(a), workspace, **dropout)


def describe(launched: Launch) -> str:
    words = [f"{name.removeprefix('BLOCK_').lower()}={value}" for name, value in launched.constants().items()]
    options = launched.options
    return f"{launched.name} {' '.join(words)} warps={options['num_warps']} stages={options['num_stages']}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, dict[str, Census | str]]:
    """By architecture: what each launch is, and what was made of it."""
    launches = {}
    for arch in ARCHS:
        with pretend(arch) as recorded:
            for problem in PROBLEMS:
                launch(problem)
        launches[arch] = [one for one in recorded if not one.name.startswith("_reduce")]
    every = [one for several in launches.values() for one in several]
    censuses = take_censuses(every, tmp_path_factory.mktemp("triton"))
    return {
        arch: {describe(one) + " " + one.key[:6]: censuses[one.key] for one in several}
        for arch, several in launches.items()
    }


def faults(compiled, arch, wrong) -> list[str]:
    return [f"{name}: {census}" for name, census in compiled[arch].items() if wrong(census)]


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles(compiled, arch):
    assert len(compiled[arch]) == 2 * len(PROBLEMS)
    assert not faults(compiled, arch, lambda census: not isinstance(census, Census))


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_shared_memory_fits(compiled, arch):
    assert not faults(compiled, arch, lambda census: census.spills or census.local or census.stack)
    assert not faults(compiled, arch, lambda census: census.shared > SHARED_MEMORY_LIMIT[arch])


@pytest.mark.parametrize("arch", ARCHS)
def test_no_atomics_and_no_memory_that_the_launch_would_have_to_allocate(compiled, arch):
    assert not faults(compiled, arch, lambda census: census.atomics or census.scratch)


@pytest.mark.parametrize("arch", ARCHS)
def test_half_precision_runs_on_the_matrix_units(compiled, arch):
    halves = [census for name, census in compiled[arch].items() if " k=32 " not in name and " k=16 " not in name]
    assert len(halves) >= 4
    assert all(census.matrix_instructions for census in halves)
