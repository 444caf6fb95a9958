"""Gradients of several optimiser steps with a discount, and of several tasks with weights, against exact gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import GradientSketch

Loss = Callable[[nn.Module], Tensor]
SIZES = (20, 30, 24)
NAMES = ["0", "2"]


def make_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.Tanh(), nn.Linear(SIZES[1], SIZES[2]))


def batch_of(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, SIZES[0], generator=generator), torch.randn(tokens, SIZES[2], generator=generator)


def loss_of(batch: tuple[Tensor, Tensor], scale: float = 1.0) -> Loss:
    """A mean over tokens."""
    return lambda model: scale * (model(batch[0]) - batch[1]).square().sum(-1).mean()


def gradients(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    state, model = model.state_dict(), make_model()  # no copy: that would have the sketch's hooks
    model.load_state_dict(state)
    model.double()
    weights = [model.get_submodule(name).weight for name in NAMES]
    for weight in weights:
        weight.requires_grad_(True)  # type: ignore[union-attr]
    return dict(zip(NAMES, torch.autograd.grad(loss(model), weights)))  # type: ignore[arg-type]


def double(loss_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return loss_batch[0].double(), loss_batch[1].double()


def held(sketch: GradientSketch) -> dict[str, Tensor]:
    out = {}
    for name in sketch.names:
        q, z = sketch.layers[name].factors()
        out[name] = (q @ z.t()).double()
    return out


def assert_is(sketch: GradientSketch, expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    for name, g in held(sketch).items():
        error = ((g - expected[name]).norm() / expected[name].norm()).item()
        assert error < tolerance, f"{name}: {error}"


def weighted(parts: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    return {name: torch.stack([w * part[name] for w, part in parts]).sum(0) for name in NAMES}


# Steps.

# Three optimiser steps of two micro-batches each, of different sizes.
STEPS = [[batch_of(11 + 3 * t, 10 * t), batch_of(6 + 2 * t, 10 * t + 1)] for t in range(3)]


def trained(model: nn.Module, t: int) -> None:
    """What an optimiser does between two steps."""
    generator = torch.Generator().manual_seed(100 + t)
    with torch.no_grad():
        for name in NAMES:
            weight = model.get_submodule(name).weight
            weight += 0.05 * torch.randn(weight.shape, generator=generator)  # type: ignore[operator,arg-type]


def sketch_steps(sketch: GradientSketch, scale: float = 1.0) -> None:
    model = sketch._model
    before = copy.deepcopy(model.state_dict())
    for t, batches in enumerate(STEPS):
        with sketch:
            for batch in batches:
                loss_of(batch, scale)(model).backward()
        if t < len(STEPS) - 1:
            sketch.step()
            trained(model, t)
    model.load_state_dict(before)


def exact_steps(discount: float) -> tuple[dict[str, Tensor], float]:
    """Σ βᵀ⁻ᵗ Σ gradient, and Σ βᵀ⁻ᵗ passes."""
    model, parts, total = make_model(), [], 0.0
    for t, batches in enumerate(STEPS):
        beta = discount ** (len(STEPS) - 1 - t)
        for batch in batches:
            parts.append((beta, gradients(model, loss_of(double(batch)))))
            total += beta
        trained(model, t)
    return weighted(parts), total


@pytest.mark.parametrize("discount", [0.6, 1.0, 1 / 0.6])
def test_steps_are_discounted(discount):
    sketch = GradientSketch(make_model(), r=2, width=64, discount=discount)
    sketch_steps(sketch)
    expected, total = exact_steps(discount)
    if discount > 1:  # Σ 0.6ᵗ Gₜ: what is left away is a factor
        expected = {name: g / discount**2 for name, g in expected.items()}
        total /= discount**2
    assert_is(sketch, expected)
    assert sketch.total_weight == pytest.approx(total)
    line = sketch.report().layers[0]
    assert line.norm == pytest.approx(expected["0"].norm().item(), rel=1e-4)


def test_a_narrow_sketch_of_steps_is_near_the_best_and_refining_nearer():
    expected, _ = exact_steps(0.5)
    sketch = GradientSketch(make_model(), r=2, width=8, discount=0.5)

    def excess(name: str) -> float:
        u, s, vh = (part.double() for part in sketch.layers[name].svd(4))
        g = expected[name]
        return ((g - (u * s) @ vh).norm() / torch.linalg.svdvals(g)[4:].norm()).item()

    sketch_steps(sketch)
    first = [excess(name) for name in NAMES]
    sketch.refine()
    sketch_steps(sketch)
    refined = [excess(name) for name in NAMES]
    assert all(value < 1.1 for value in first) and all(value < 1.02 for value in refined)
    assert sketch.total_weight == pytest.approx(exact_steps(0.5)[1])


def test_the_factors_of_steps_do_not_depend_on_the_loss_scale():
    models = []
    for scale in (1.0, 2.0**10):
        sketch = GradientSketch(make_model(), r=2, discount=0.7)
        sketch_steps(sketch, scale)
        model = make_model()
        fastlora.init_lora_ga(model, sketch)
        models.append(model.state_dict())
    for key, value in models[0].items():
        assert torch.allclose(value, models[1][key], atol=1e-5), key


def test_steps_may_be_made_inside_the_context_of_a_training_run():
    model = make_model()
    sketch = GradientSketch(model, r=2, width=64, discount=0.5, freeze=False, dropout=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    parts, grads = [], []
    with sketch:
        for t, batches in enumerate(STEPS):
            optimizer.zero_grad()
            loss = loss_of(batches[0])
            expected = gradients(model, loss_of(double(batches[0])))
            parts.append((0.5 ** (2 - t), expected))
            loss(model).backward()
            grads.append((model[0].weight.grad.double() - expected["0"]).norm() / expected["0"].norm())
            optimizer.step()
            if t < 2:
                sketch.step()
    assert max(grads) < 1e-5  # the training run is what it was
    assert_is(sketch, weighted(parts))


def test_steps_are_saved(tmp_path):
    sketch = GradientSketch(make_model(), r=2, width=64, discount=2.0)
    for t, batches in enumerate(STEPS):
        if t == 1:
            sketch.save(tmp_path / "sketch")
            sketch = GradientSketch.load(tmp_path / "sketch", make_model())
        with sketch:
            loss_of(batches[0])(sketch._model).backward()
        sketch.step()
    same = make_model()
    expected = weighted([(0.5**t, gradients(same, loss_of(double(b[0])))) for t, b in enumerate(STEPS)])
    assert_is(sketch, expected)
    assert sketch.total_weight == pytest.approx(1.75)


@pytest.mark.parametrize("discount", [0, -0.5, float("inf"), float("nan"), "0.9", True])
def test_wrong_discounts(discount):
    with pytest.raises(ValueError, match="GradientSketch: discount: got"):
        GradientSketch(make_model(), discount=discount)


# Tasks.

TASKS = [[batch_of(8, 40), batch_of(13, 41)], [batch_of(90, 42)], [batch_of(5, 43)]]
WEIGHTS = [1.0, 0.5, 3.0]


def sketch_task(task: int, scale: float = 1.0, **options: Any) -> GradientSketch:
    with GradientSketch(make_model(), **{"r": 2, "width": 64, **options}) as sketch:
        for batch in TASKS[task]:
            loss_of(batch, scale)(sketch._model).backward()
    return sketch


def exact_task(task: int) -> tuple[dict[str, Tensor], float]:
    """The sum over passes, and how many they are."""
    parts = [(1.0, gradients(make_model(), loss_of(double(batch)))) for batch in TASKS[task]]
    return weighted(parts), float(len(parts))


def exact_joint(normalize: str) -> dict[str, Tensor]:
    parts = []
    for task, weight in enumerate(WEIGHTS):
        g, passes = exact_task(task)
        size = {"sum": 1.0, "mean": passes, "norm": sum(part.square().sum().item() for part in g.values()) ** 0.5}
        parts.append((weight / size[normalize], g))
    return weighted(parts)


@pytest.mark.parametrize("normalize", ["mean", "norm", "sum"])
def test_tasks_are_joined_with_their_weights(normalize):
    joint = GradientSketch.combine([sketch_task(task) for task in range(3)], WEIGHTS, normalize)
    expected = exact_joint(normalize)
    assert_is(joint, expected)
    report = joint.report()
    assert [line.norm for line in report.layers] == pytest.approx(
        [g.norm().item() for g in expected.values()], rel=1e-3
    )
    assert report.layers[0].tokens == 21 + 90 + 5
    assert list(fastlora.init_lora_ga(make_model(), joint)) == NAMES


def test_the_mean_is_over_passes_that_gave_something():
    """Forwards without a backward, and passes that were not finite, are no part of a mean."""
    task = sketch_task(0)
    with GradientSketch(make_model(), r=2, width=64) as sparse:
        for batch in TASKS[1]:
            sparse._model(batch[0])
            (loss_of(batch)(sparse._model) * float("inf")).backward()
            loss_of(batch)(sparse._model).backward()
    expected = weighted([(1.0 / exact_task(i)[1], exact_task(i)[0]) for i in (0, 1)])
    assert_is(GradientSketch.combine([task, sparse]), expected)


def test_only_the_norm_takes_the_tasks_loss_scale_away():
    plain = [sketch_task(task) for task in (0, 1)]
    scaled = [plain[0], sketch_task(1, scale=1000.0)]
    for normalize, alike in (("norm", True), ("mean", False)):
        one, other = (held(GradientSketch.combine(tasks, normalize=normalize))["0"] for tasks in (plain, scaled))
        assert torch.allclose(one, other, atol=1e-5 * one.abs().max().item()) is alike


def test_narrow_tasks_join_to_the_sketchs_accuracy_and_refine_together():
    tasks = [sketch_task(task, width=width) for task, width in enumerate((8, 10, 8))]
    expected = exact_joint("mean")

    def excess(sketch: GradientSketch, name: str) -> float:
        u, s, vh = (part.double() for part in sketch.layers[name].svd(4))
        g = expected[name]
        return ((g - (u * s) @ vh).norm() / torch.linalg.svdvals(g)[4:].norm()).item()

    joint = GradientSketch.combine(tasks, WEIGHTS)
    assert joint.width == 10
    first = [excess(joint, name) for name in NAMES]
    for task, sketch in enumerate(tasks):
        with sketch.refine(joint):
            for batch in TASKS[task]:
                loss_of(batch)(sketch._model).backward()
    refined = [excess(GradientSketch.combine(tasks, WEIGHTS), name) for name in NAMES]
    assert all(value < 1.1 for value in first), first
    assert all(value < 1.01 for value in refined), refined
    assert sum(refined) < sum(first)


def test_a_joint_sketch_is_saved_and_takes_no_passes(tmp_path):
    joint = GradientSketch.combine([sketch_task(0), sketch_task(1)])
    joint.save(tmp_path / "joint")
    back = GradientSketch.load(tmp_path / "joint", make_model())
    for sketch in (joint, back):
        with pytest.raises(RuntimeError, match="joint sketch"), sketch:
            pass
    for name, g in held(joint).items():
        assert torch.equal(g, held(back)[name])
    assert back.total_weight == joint.total_weight == 2.0


def test_a_task_that_does_not_reach_a_layer_counts_nothing_there():
    model = make_model()
    task = sketch_task(0)
    with GradientSketch(model, r=2, width=64) as other:
        model[0](TASKS[1][0][0]).square().sum(-1).mean().backward()
    joint = GradientSketch.combine([task, other])
    assert torch.allclose(held(joint)["2"], held(task)["2"] / 2, atol=1e-6)
    assert not torch.allclose(held(joint)["0"], held(task)["0"] / 2, atol=1e-3)


def test_tasks_that_cannot_be_joined():
    task = sketch_task(0)
    for sketches, weights, normalize, message in [
        ([], None, "mean", r"sketches: got \[\], want one GradientSketch or more"),
        ([task, "x"], None, "mean", r"sketches: got \[GradientSketch, str\]"),
        ([task, task], [1.0], "mean", r"weights: got \[1.0\], want 2 positive numbers"),
        ([task, task], [1.0, -1.0], "mean", r"weights: got \[1.0, -1.0\], want 2 positive numbers"),
        ([task], None, "max", "normalize: got 'max', want one of mean, norm, sum"),
        ([task, sketch_task(1, seed=5)], None, "mean", "sketches: got sketches of seed 0 and 5, want the same"),
        ([task, sketch_task(1, r=3)], None, "mean", "sketches: got sketches of r 2 and 3, want the same"),
        ([task, sketch_task(1, target_modules=["0"])], None, "mean", "sizes 0 30×20, 2 24×30 and 0 30×20, want"),
        ([task, GradientSketch(make_model(), r=2)], None, "mean", "got one without a gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            GradientSketch.combine(sketches, weights, normalize)
    with pytest.raises(ValueError, match="refine: bases: got sketches of r 3 and 2"):
        task.refine(sketch_task(1, r=3))
