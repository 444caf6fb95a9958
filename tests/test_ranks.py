"""Ranks by layer: against every possible choice, and through init_lora_ga, patch and the adapter's files."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import GradientSketch
from fastlora.init.ranks import allocate_ranks, fill


def problem(seed: int, alike: bool) -> tuple[dict[str, list[float]], dict[str, int], int]:
    draw = random.Random(seed)
    worths = {f"layer{i}": sorted((draw.random() ** 3 for _ in range(4)), reverse=True) for i in range(4)}
    costs = {name: 3 if alike else draw.randint(2, 9) for name in worths}
    return worths, costs, sum(costs.values()) + draw.randint(0, 40)


def captured(worths: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(sum(worths[name][:rank]) for name, rank in ranks.items())


@pytest.mark.parametrize("alike", [True, False], ids=["costs-alike", "costs-differ"])
@pytest.mark.parametrize("seed", range(12))
def test_no_choice_captures_more(seed, alike):
    worths, costs, budget = problem(seed, alike)
    best = max(
        captured(worths, dict(zip(worths, choice)))
        for choice in itertools.product(range(1, 5), repeat=4)
        if sum(rank * cost for rank, cost in zip(choice, costs.values())) <= budget
    )
    ranks = fill(worths, costs, budget, min_rank=1)
    left = budget - sum(ranks[name] * costs[name] for name in ranks)
    assert left >= 0 and all(rank == 4 or costs[name] > left for name, rank in ranks.items())
    largest = max(worth for layer in worths.values() for worth in layer[1:])
    assert captured(worths, ranks) == pytest.approx(best) if alike else captured(worths, ranks) > best - largest


def test_worthless_ranks_and_ties():
    worths = {"a": [1.0, 1.0, 0.0], "b": [1.0, 1.0, 1.0], "idle": [0.0, 0.0, 0.0]}
    costs = dict.fromkeys(worths, 1)
    assert fill(worths, costs, 4, 1) == {"a": 2, "b": 1, "idle": 1}
    assert fill(worths, costs, 100, 1) == {"a": 2, "b": 3, "idle": 1}


SIZES = {"0": (40, 24), "1": (30, 40), "2": (20, 30)}
SPECTRA = {"0": 1.0, "1": 10.0, "2": 0.1}


def make_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(m, n) for n, m in SIZES.values()])


def sketch_of(model: nn.Module, r: int = 2, width: int = 16) -> GradientSketch:
    """A sketch that was handed its layers' gradients: spectra decay as 0.6ⁱ, at different heights."""
    sketch = GradientSketch(model, r=r, width=width)
    generator = torch.Generator().manual_seed(3)
    for name, (n, m) in SIZES.items():
        k = min(n, m)
        u = torch.linalg.qr(torch.randn(n, k, generator=generator))[0]
        v = torch.linalg.qr(torch.randn(m, k, generator=generator))[0]
        sketch.layer(name, n, m).update(v.t(), (u * (SPECTRA[name] * 0.6 ** torch.arange(k))).t())
    return sketch


def test_budgets_and_bounds():
    sketch = sketch_of(make_model())
    parameters = sum(2 * (n + m) for n, m in SIZES.values())
    ranks = allocate_ranks(sketch)
    assert list(ranks) == list(SIZES) and max(ranks.values()) <= 4 and min(ranks.values()) >= 1
    assert ranks["1"] > ranks["0"] >= ranks["2"]
    assert sum(rank * sum(SIZES[name]) for name, rank in ranks.items()) <= parameters
    assert sum(allocate_ranks(sketch, total_rank=9, max_rank=8).values()) == 9
    by_share = allocate_ranks(sketch, total_rank=6, by="share")
    assert set(by_share.values()) == {2}  # the spectra are alike but for their heights
    assert allocate_ranks(sketch, total_rank=6, by="gradient")["1"] == 4
    assert min(allocate_ranks(sketch, total_rank=8, min_rank=2).values()) == 2
    assert max(allocate_ranks(sketch, total_rank=100, max_rank=50).values()) == 8  # half of the sketch's width


def test_ranks_follow_the_exact_singular_values():
    sketch = sketch_of(make_model(), width=24)
    exact = {name: [SPECTRA[name] ** 2 * (0.36 ** (2 * k) + 0.36 ** (2 * k + 1)) for k in range(6)] for name in SIZES}
    costs = {name: n + m for name, (n, m) in SIZES.items()}
    assert allocate_ranks(sketch, parameters=700, max_rank=6) == fill(exact, costs, 700, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parameters": 1000, "total_rank": 6}, "parameters, total_rank: got both, want one of them"),
        ({"parameters": 100}, "parameters: got 100, want at least 184, which min_rank=1 costs"),
        ({"total_rank": 2}, "total_rank: got 2, want at least 3, which min_rank=1 costs"),
        ({"total_rank": 6.5}, "total_rank: got 6.5, want at least 3"),
        ({"min_rank": 0}, "min_rank: got 0, want an integer of at least 1"),
        ({"min_rank": 4, "max_rank": 3}, "max_rank: got 3, want an integer of at least 4"),
        ({"min_rank": 9}, "min_rank: got 9, but '0' can have at most 8"),
        ({"by": "size"}, "by: got 'size', want one of gradient, share"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=f"allocate_ranks: {message}"):
        allocate_ranks(sketch_of(make_model()), **options)
