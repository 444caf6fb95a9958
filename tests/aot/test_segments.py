"""The kernels for several adapters in one batch compile for Ampere, Hopper and Blackwell, and nothing spills.

At the benchmarks' shape each time; every configuration that the rules have with the slow tests (some minutes).
"""

from dataclasses import dataclass

import pytest
import torch
from aot.pretend import SHARED_MEMORY_LIMIT, Census, Launch, pretend, take_censuses
from aot.sweep import ARCHS, BF16, FP32, META

from fastlora.kernels import segment_grads, segments
from fastlora.kernels.segment_factors import Factors, factors_of
from fastlora.kernels.segment_plan import Segments


@dataclass(frozen=True)
class Problem:
    tokens: int
    ranks: tuple[int, ...]
    n: int = 4096
    k: int = 4096
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = BF16
    dropout: float = 0.1


# The heaviest flags of every configuration that the rules have: blocks of the rank up to 16, 32, 64 and beyond, both
# dtypes, wider adapters, one token a sequence, sizes that divide nothing.
PROBLEMS = [
    Problem(1024, (16, 8)),
    Problem(1024, (16, 8), adapter_dtype=FP32),
    Problem(1024, (32, 16), adapter_dtype=FP32),
    Problem(1024, (48, 16), adapter_dtype=FP32),
    Problem(1024, (64, 16), adapter_dtype=FP32),
    Problem(1024, (256, 16), adapter_dtype=FP32),
    Problem(1, (16, 8)),
    Problem(1, (64, 8), adapter_dtype=FP32),
    Problem(1000, (15, 7), n=1001, k=1003),
    Problem(1000, (64, 7), n=1001, k=1003),
    Problem(1024, (16, 8), dtype=FP32, adapter_dtype=FP32),
    Problem(1024, (64, 8), dtype=FP32, adapter_dtype=FP32),
]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def launch(p: Problem) -> None:
    """Every kernel as a training step of this problem launches it; forward also without a row left out."""
    plan = Segments([0, 1] * 4, p.tokens)
    lora_As = [empty(r, p.k, dtype=p.adapter_dtype) for r in p.ranks]
    lora_Bs = [empty(p.n, r, dtype=p.adapter_dtype) for r in p.ranks]
    factors: Factors = factors_of(lora_As, lora_Bs, [2.0, 1.0], [p.dropout, 0.0])
    rows, positions = 8 * p.tokens, plan.num_positions
    x, dy = empty(rows, p.k, dtype=p.dtype), empty(rows, p.n, dtype=p.dtype)
    s, seed = empty(positions, factors.max_rank, dtype=p.adapter_dtype), empty(1, dtype=torch.int64)
    db = empty(factors.total_rank * p.n, dtype=p.adapter_dtype)
    da = empty(factors.total_rank * p.k, dtype=p.adapter_dtype)

    def workspace(size: int) -> torch.Tensor:
        return empty(size, dtype=FP32)

    size = segments.segment_shrink_workspace(x, plan, factors)
    segments.segment_shrink(x, plan, factors, s, workspace(size), seed=seed)
    segments.segment_expand(s, plan, factors, dy, bias=empty(p.n, dtype=p.dtype), accumulate=False)
    segments.segment_expand(s, plan, factors, x, by_a=True, seed=seed)
    size = segment_grads.segment_ds_db_workspace(dy, plan, factors)
    segment_grads.segment_ds_db(dy, plan, factors, s, torch.empty_like(s), db, workspace(size))
    size = segment_grads.segment_weight_grad_workspace(x, plan, factors)
    segment_grads.segment_weight_grad(x, plan, factors, s, da, workspace(size), seed=seed)


def describe(launched: Launch) -> str:
    words = [f"{name.removeprefix('BLOCK_').lower()}={value}" for name, value in launched.constants().items()]
    options = launched.options
    return f"{launched.name} {' '.join(words)} warps={options['num_warps']} stages={options['num_stages']}"


@pytest.fixture(scope="module", params=["usual", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, tmp_path_factory) -> dict[int, dict[str, Census | str]]:
    """By architecture: what each launch is, and what was made of it."""
    problems = PROBLEMS if request.param == "all" else PROBLEMS[:1]
    launches = {}
    for arch in ARCHS:
        with pretend(arch) as recorded:
            for problem in problems:
                launch(problem)
        launches[arch] = [one for one in recorded if one.name.startswith("_segment")]
    every = [one for several in launches.values() for one in several]
    censuses = take_censuses(every, tmp_path_factory.mktemp("triton"))
    return {
        arch: {f"{describe(one)} {one.key[:6]}": censuses[one.key] for one in several}
        for arch, several in launches.items()
    }


def faults(compiled, arch, wrong) -> list[str]:
    return [f"{name}: {census}" for name, census in compiled[arch].items() if wrong(name, census)]


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_into_what_was_meant(compiled, arch):
    """Without spills, atomics or memory that the launch would have to allocate, within the shared memory's limit."""
    assert len(compiled[arch]) >= 7
    assert not faults(compiled, arch, lambda _, census: not isinstance(census, Census))
    assert not faults(compiled, arch, lambda _, census: census.spills or census.local or census.stack)
    assert not faults(compiled, arch, lambda _, census: census.shared > SHARED_MEMORY_LIMIT[arch])
    assert not faults(compiled, arch, lambda _, census: census.atomics or census.scratch)


@pytest.mark.parametrize("arch", ARCHS)
def test_half_precision_runs_on_the_matrix_units(compiled, arch):
    with pretend(arch) as recorded:
        launch(PROBLEMS[0])
    names = {f"{describe(one)} {one.key[:6]}" for one in recorded if "reduce" not in one.name}
    products = [census for name, census in compiled[arch].items() if name in names]
    assert len(products) >= 5
    assert all(isinstance(census, Census) and census.matrix_instructions for census in products)
    # x and dY come by asynchronous copies: the compiler knows that rows in any order are aligned.
    copied = [census for census in products if "expand" not in census.name]
    assert copied and all(census.count("LDGSTS") for census in copied)


def test_short_segments_get_short_tiles():
    """One token a sequence: sixteen rows, what `tl.dot` asks for, rather than 64 that are mostly empty."""
    with pretend(90) as recorded:
        launch(Problem(1, (16, 8)))
    tiles = {one.name: one.constants()["BLOCK_M"] for one in recorded if "BLOCK_M" in one.constants()}
    assert tiles["_segment_shrink_kernel"] == tiles["_segment_expand_kernel"] == 16
