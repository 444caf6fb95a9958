"""Ranks by layer: against every possible choice, and through init_lora_ga, patch and the adapter's files."""

from __future__ import annotations

import itertools
import random
from typing import Any

import peft
import pytest
import torch
from model_state import ModelState
from torch import nn

import fastlora
from fastlora import FusedLoraLinear, GradientSketch, allocate_ranks
from fastlora.init.ranks import fill


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


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_the_least_ranks_for_a_share_are_those_of_the_exact_singular_values(share):
    """Spectra that differ: 0.6ⁱ, 0.85ⁱ and flat but for rounding."""
    model = make_model()
    sketch, wanted = GradientSketch(model, r=2, width=40), {}
    for (name, (n, m)), decay in zip(SIZES.items(), (0.6, 0.85, 0.999)):
        x, dy = torch.randn(60, m), torch.randn(60, n)
        u, _, vh = torch.linalg.svd(dy.t() @ x, full_matrices=False)
        gradient = u * decay ** torch.arange(min(n, m)) @ vh
        sketch.layer(name, n, m).update(torch.eye(m), gradient.t().contiguous())
        squares = torch.linalg.svdvals(gradient.double()).square()
        held = (squares.cumsum(0) / squares.sum())[1::2]
        wanted[name] = int((held < share).sum()) + 1
    assert allocate_ranks(sketch, captured=share) == wanted
    assert allocate_ranks(sketch, captured=share, min_rank=3, max_rank=4) == {
        name: min(max(rank, 3), 4) for name, rank in wanted.items()
    }


def test_a_share_that_the_sketch_does_not_hold_is_an_error():
    model = make_model()
    sketch = sketch_of(model, width=4)
    sketch.layer("2", 20, 30).scale_by(0.0)
    assert allocate_ranks(sketch, captured=0.5) == {"0": 1, "1": 1, "2": 1}
    message = (
        r"allocate_ranks: captured: got 0.99, and a sketch of width 4 holds less of 0 \(0.9\d\), 1 \(0.9\d\); sketch"
    )
    with pytest.raises(ValueError, match=message):
        allocate_ranks(sketch, captured=0.99)
    assert allocate_ranks(sketch, captured=0.99, max_rank=2) == {"0": 2, "1": 2, "2": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parameters": 1000, "total_rank": 6}, "parameters, total_rank: got 2 of them, want one"),
        ({"captured": 0.9, "total_rank": 6}, "captured, total_rank: got 2 of them, want one"),
        ({"captured": 1}, r"captured: got 1, want a share in \(0, 1\)"),
        ({"captured": float("nan")}, r"captured: got nan, want a share in \(0, 1\)"),
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


def scaled_layers(model: nn.Module) -> dict[str, FusedLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base", ["exact", "offset"])
def test_a_plain_model_is_patched_with_the_ranks(tmp_path, base, use_rslora):
    model, x = make_model(), torch.randn(5, 24)
    before = model(x)
    sketch = sketch_of(model)
    ranks = {"0": 1, "1": 4}  # and r=2 in the last
    fastlora.init_lora_ga(model, sketch, ranks=ranks, base=base, use_rslora=use_rslora, gamma=64)
    layers = scaled_layers(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks | {"2": 2}
    s = 16 / (2**0.5 if use_rslora else 2)
    assert [layer.scaling["default"] for layer in layers.values()] == pytest.approx([s] * 3)
    assert torch.allclose(model(x), before, atol=1e-5)
    for name, layer in layers.items():  # orthonormal, from disjoint halves of the 2r leading triplets
        rank, a, b = layer.r["default"], layer.lora_A["default"], layer.lora_B["default"]
        u, _, vh = sketch.layers[name].svd(2 * rank)
        size = layer.out_features**0.25 / 64**0.5
        assert torch.allclose((a @ vh[:rank].t()).abs() / size, torch.eye(rank), atol=1e-4)
        assert torch.allclose((b.t() @ u[:, rank:]).abs() / size, torch.eye(rank), atol=1e-4)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"] += 0.1
    expected = model(x)
    fastlora.save_adapter(model, tmp_path)
    back = make_model()
    fastlora.load_adapter(back, tmp_path)
    assert torch.allclose(back(x), expected, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(make_model(), str(tmp_path))
    assert torch.allclose(theirs(x), expected, atol=1e-4)


def test_more_of_the_gradient_is_captured_than_with_one_rank():
    """By the first step of SGD, at the same number of parameters."""
    left = {}
    for kind in ("uniform", "allocated"):
        model = make_model()
        sketch = sketch_of(model, width=24)
        ranks = allocate_ranks(sketch) if kind == "allocated" else None
        fastlora.init_lora_ga(model, sketch, ranks=ranks, scale="gd")
        left[kind] = parameters = 0
        for name, layer in scaled_layers(model).items():
            q, z = sketch.layers[name].factors()
            g, s = q @ z.t(), layer.scaling["default"]
            a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
            left[kind] += (g - s * s * (b @ (b.t() @ g) + (g @ a.t()) @ a)).square().sum().item()
            parameters += a.numel() + b.numel()
        assert parameters <= sum(2 * (n + m) for n, m in SIZES.values())
    assert left["allocated"] < 0.25 * left["uniform"]


def test_patched_and_peft_models_must_have_the_ranks():
    for ranks, message in [({"0": 1}, "r: ranks say r=1, but the adapter 'default' of '0' has r=2"), (None, "")]:
        model = make_model()
        fastlora.patch(model, r=2)
        if message:
            state = ModelState(model)
            with pytest.raises(ValueError, match=message):
                fastlora.init_lora_ga(model, sketch_of(make_model()), ranks=ranks)
            state.assert_unchanged()
        else:
            fastlora.init_lora_ga(model, sketch_of(make_model()), ranks=ranks)
    model = make_model()
    fastlora.patch(model, r=2, rank_pattern={"0": 3})
    fastlora.init_lora_ga(model, sketch_of(make_model()), ranks={"0": 3, "1": 2})
    names = ["0", "1", "2"]
    config = peft.LoraConfig(r=2, target_modules=names, rank_pattern={"0": 4, "1": 1}, lora_alpha=4)
    adapted: Any = peft.get_peft_model(make_model(), config)
    x = torch.randn(5, 24)
    before = adapted(x)
    sketch = GradientSketch(adapted, r=2, width=16)
    plain = sketch_of(make_model())
    sketch.layers = {f"base_model.model.{name}": plain.layers[name] for name in names}
    fastlora.init_lora_ga(adapted, sketch, ranks={"base_model.model.0": 4, "base_model.model.1": 1})
    assert torch.allclose(adapted(x), before, atol=1e-5)
    assert adapted.base_model.model[0].lora_B["default"].weight.any()


@pytest.mark.parametrize(
    "ranks, message",
    [
        ({"3": 1}, "ranks: got 3, which the sketch has not seen"),
        ({"0": 0}, r"ranks: got 0 for '0', want an integer in \[1, 8\]"),
        ({"0": 9}, r"ranks: got 9 for '0', want an integer in \[1, 8\] \(half of the sketch's width\)"),
    ],
)
def test_wrong_ranks(ranks, message):
    model = make_model()
    state = ModelState(model)
    with pytest.raises(ValueError, match=f"init_lora_ga: {message}"):
        fastlora.init_lora_ga(model, sketch_of(model), ranks=ranks)
    state.assert_unchanged()
