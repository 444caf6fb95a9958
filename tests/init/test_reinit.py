"""reinit_lora_ga: the function is kept, factors are aligned before they are averaged, files are right."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import started_nets
import torch
from model_state import ModelState
from plain_models import Net
from started_nets import BASES, SKETCHED, R, inputs, layers_of, loss_of, optimizer_of
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import fastlora
from fastlora import FusedLoraLinear
from fastlora.init import reinit
from fastlora.init.factors import align, smoothed


def sketch_of(model: nn.Module, seed: int = 1, **options: Any) -> fastlora.GradientSketch:
    loss = lambda model: loss_of(model, seed)  # noqa: E731
    return started_nets.sketch_of(model, loss=loss, target_modules=SKETCHED, **options)


def started(base: str | None = "exact", **options: Any) -> Net:
    """By LoRA-GA, or (None) an ordinary adapter."""
    model = Net()
    torch.manual_seed(2)
    if base is None:
        fastlora.patch(model, r=R, target_modules=SKETCHED, **options)
    else:
        fastlora.init_lora_ga(model, sketch_of(model), base=base, norm_clip=0.5, **options)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 10) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed + step).backward()
        optimizer.step()


def change_of(layer: FusedLoraLinear) -> Tensor:
    """What the adapter adds to the original weight, (out, in), from the parameters in float64."""
    a, b, _, _ = layer.as_plain_adapter("default")
    return (layer.scaling["default"] * b.double() @ a.double()).detach()


# The function.
@pytest.mark.parametrize("base", [None, *BASES])
def test_the_function_is_kept_over_several_rounds(base):
    model = started(base)
    optimizer = optimizer_of(model)
    for round in range(3):
        train(model, optimizer, seed=10 * round)
        before, changes = model(inputs()), {name: change_of(layer) for name, layer in layers_of(model).items()}
        factors = {name: layer.lora_A["default"].detach().clone() for name, layer in layers_of(model).items()}
        report = fastlora.reinit_lora_ga(model, sketch_of(model, seed=round), optimizer)
        assert torch.allclose(model(inputs()), before, atol=1e-5 * before.abs().max().item())
        assert list(report.layers) == SKETCHED and report.skipped == {}
        for name, layer in layers_of(model).items():
            # The same products in another order: what is left is this test's own rounding.
            assert (change_of(layer) - changes[name]).norm() < 1e-14 * changes[name].norm()
            assert not torch.allclose(layer.lora_A["default"], factors[name], atol=1e-3)
            line = report.layers[name]
            assert 0 < line.before <= 1 and 0 < line.after <= 1 and line.dropped == 0.0
            # Twice r a round, and the first start, if there was one.
            assert line.frozen_rank == len(layer.lora_A0["default"]) == 2 * R * (round + 1) + (R if base else 0)
            assert not layer.lora_A0["default"].requires_grad
    assert "alignment before" in str(report) and str(report).count("blocks") == 6


def test_in_bfloat16_nothing_is_rounded_either():
    """W0 keeps its bits, and the learned change is the same numbers, although a merge would lose them."""
    model: Any = tiny_model("llama").bfloat16()
    fastlora.patch(model, r=R)
    bits = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    optimizer = optimizer_of(model)
    batch: Any = tiny_batch("llama")
    for _ in range(2):
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        before, changes = model(**batch).logits, {name: change_of(layer) for name, layer in layers_of(model).items()}
        with fastlora.GradientSketch(model, r=R) as sketch:
            model(**batch).loss.backward()
        fastlora.reinit_lora_ga(model, sketch, optimizer)
        error = (model(**batch).logits - before).float().norm() / before.float().norm()
        assert error < 1e-2  # the outputs' own rounding: 4e-3 an element
        for name, layer in layers_of(model).items():
            assert (change_of(layer) - changes[name]).norm() < 1e-14 * changes[name].norm()
            assert torch.equal(layer.weight, bits[name])
    fastlora.unpatch(model)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in bits.items())


@pytest.mark.parametrize("base", [*BASES, "pissa"])
def test_unpatch_and_merge_afterwards(base):
    model = Net()
    state = ModelState(model)
    if base == "pissa":  # W0 is shifted, as with "offset"
        fastlora.patch(model, r=R, target_modules=SKETCHED, init_lora_weights="pissa")
    else:
        fastlora.init_lora_ga(model, sketch_of(model), base=base, norm_clip=0.5)
    optimizer = optimizer_of(model)
    for _ in range(2):
        train(model, optimizer)
        before = model(inputs())
        fastlora.reinit_lora_ga(model, sketch_of(model), optimizer)
        assert torch.allclose(model(inputs()), before, atol=1e-5 * before.abs().max().item())
    trained = model(inputs())
    fastlora.merge(model)
    assert torch.allclose(model(inputs()), trained, atol=1e-5)
    fastlora.unmerge(model)
    assert torch.equal(model(inputs()), trained)
    fastlora.unpatch(model)
    state.assert_unchanged()


def test_with_dropout_the_frozen_part_has_the_same_mask():
    model = started(lora_dropout=0.5).train()
    train(model, optimizer_of(model))
    sketch = sketch_of(model)
    torch.manual_seed(0)
    before = model(inputs())
    fastlora.reinit_lora_ga(model, sketch)
    torch.manual_seed(0)
    assert torch.allclose(model(inputs()), before, atol=1e-5 * before.abs().max().item())


@pytest.mark.parametrize("max_rank", [1, 5])
def test_max_rank_says_what_it_loses(max_rank):
    model = started()
    optimizer = optimizer_of(model, lr=1e-1)
    for round in range(2):
        train(model, optimizer, seed=10 * round)
        changes = {name: change_of(layer) for name, layer in layers_of(model).items()}
        report = fastlora.reinit_lora_ga(model, sketch_of(model), optimizer, max_rank=max_rank)
        for name, layer in layers_of(model).items():
            lost = (change_of(layer) - changes[name]).norm() / layer.weight.norm()
            sigma = torch.linalg.svdvals(changes[name])[max_rank:].norm() / layer.weight.norm()
            assert lost.item() == pytest.approx(sigma.item(), rel=1e-2, abs=1e-5)
            assert lost.item() == pytest.approx(report.layers[name].dropped, rel=1e-2, abs=1e-5)
            assert report.layers[name].frozen_rank == min(max_rank, (2 + 3 * round) * R) + R
        assert (max(line.dropped for line in report.layers.values()) > 1e-3) == ((2 + 3 * round) * R > max_rank)


# The factors.
def orthogonal(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def test_smoothing_with_a_rotated_copy_of_itself_is_the_identity():
    """The plain average of the two is not."""
    old = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    new = orthogonal(4) @ old
    assert torch.allclose(align(new, old), old, atol=1e-12)
    for smoothing in (0.0, 0.3, 1.0):
        assert torch.allclose(smoothed(new, old, smoothing), old, atol=1e-12)
    assert (0.5 * old + 0.5 * new - old).norm() > 0.1 * old.norm()


def test_the_rotation_is_the_nearest():
    generator = torch.Generator().manual_seed(1)
    old, new = (torch.randn(3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    aligned = align(new, old)
    assert torch.allclose(aligned @ aligned.t(), align(aligned, old) @ align(aligned, old).t())
    assert torch.allclose(torch.linalg.svdvals(aligned), torch.linalg.svdvals(new))
    distances = [(orthogonal(3, seed) @ new - old).norm() for seed in range(200)]
    assert (aligned - old).norm() < min(distances)


def test_smoothing_goes_from_the_gradient_to_the_present():
    """0: the gradient's own triplets, with the optimum's alignment; 1: the factors as they are."""
    model = started()
    train(model, optimizer_of(model, lr=1e-1))
    sketch = sketch_of(model)
    alignments = []
    for smoothing in (1.0, 0.7, 0.0):
        other = copy.deepcopy(model)
        report = fastlora.reinit_lora_ga(other, sketch, smoothing=smoothing)
        alignments.append([line.after for line in report.layers.values()])
        for name, layer in layers_of(model).items():
            again = layers_of(other)[name]
            for mine, theirs in ((layer.lora_A, again.lora_A), (layer.lora_B, again.lora_B)):
                a, b = mine["default"], theirs["default"]
                assert b.norm().item() == pytest.approx(a.norm().item(), rel=1e-5)  # scale="keep"
                assert torch.allclose(a, b, atol=1e-6) == (smoothing == 1.0)
            if smoothing == 0.0:
                sigma = sketch.layers[name].svd(min(sketch.sizes[name]))[1]
                best = (sigma[: 2 * R].norm() / sigma.norm()).item()
                assert report.layers[name].after == pytest.approx(best, rel=1e-2)
    assert all(c > max(a, b) for a, b, c in zip(*alignments))


@pytest.mark.parametrize("scale, size", [("unit", 1.0), ("gd", R / 16), ("stable", None)])
def test_scales(scale, size):
    model = started()
    fastlora.reinit_lora_ga(model, sketch_of(model), smoothing=0.0, scale=scale, gamma=64)
    for layer in layers_of(model).values():
        wanted = layer.out_features**0.25 / 8 if size is None else size
        assert torch.allclose(layer.lora_A["default"].norm(dim=1), torch.tensor(wanted), rtol=1e-4)
        assert torch.allclose(layer.lora_B["default"].norm(dim=0), torch.tensor(wanted), rtol=1e-4)


def test_an_adapter_that_has_learned_nothing_is_not_averaged_with():
    """An ordinary start has a random A, and B = 0: the new factors are the gradient's alone."""
    model = started(None)
    fastlora.reinit_lora_ga(model, sketch_of(model), smoothing=0.9)
    for layer in layers_of(model).values():
        a = layer.lora_A["default"]
        gram = a @ a.t()
        assert torch.allclose(gram, gram[0, 0] * torch.eye(R), atol=1e-5 * gram[0, 0].item())
        assert len(layer.lora_A0["default"]) == R
    assert torch.allclose(model(inputs()), Net()(inputs()), atol=1e-5)


# Files.
@pytest.mark.parametrize("base, use_rslora", [("exact", True), ("offset", False)])
def test_peft_loads_the_whole_change_on_the_original_base(tmp_path, use_rslora, base):
    model: Any = tiny_model("gpt2")
    batch: Any = tiny_batch("gpt2")

    def sketch(model: nn.Module) -> fastlora.GradientSketch:
        with fastlora.GradientSketch(model, r=R) as sketch:
            model(**batch).loss.backward()
        return sketch

    fastlora.init_lora_ga(model, sketch(model), base=base, lora_alpha=6, use_rslora=use_rslora, norm_clip=0.5)
    optimizer = optimizer_of(model)
    for _ in range(2):
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        fastlora.reinit_lora_ga(model, sketch(model), optimizer)
    trained = model(**batch).logits
    fastlora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)  # type: ignore[arg-type]
    config: Any = loaded.peft_config["default"]
    rank = R + R + 2 * 2 * R
    growth = rank / R
    assert config.r == rank and config.lora_alpha == pytest.approx(6 * (math.sqrt(growth) if use_rslora else growth))
    untrained = (tiny_model("gpt2")(**batch).logits - trained).abs().max()
    assert (loaded(**batch).logits - trained).abs().max() < 1e-4 * trained.abs().max() < 1e-2 * untrained
    ours = tiny_model("gpt2")
    fastlora.load_adapter(ours, tmp_path)
    assert torch.allclose(ours(**batch).logits, trained, atol=1e-4 * trained.abs().max().item())


@pytest.mark.parametrize("base", [None, *BASES])
def test_a_state_dict_goes_into_a_fresh_model(base):
    """Into one with a frozen part of another rank, or none; then training goes on the same."""
    model = started(base)
    optimizer = optimizer_of(model)
    for _ in range(2):
        train(model, optimizer)
        fastlora.reinit_lora_ga(model, sketch_of(model), optimizer)
    other = started(None if base == "exact" else base)
    again = optimizer_of(other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other(inputs()), model(inputs()))
    for each, its in ((model, optimizer), (other, again)):
        train(each, its)
        fastlora.reinit_lora_ga(each, sketch_of(each), its)
    assert torch.equal(other(inputs()), model(inputs()))
    fastlora.unpatch(other)
    assert torch.equal(other(inputs()), Net()(inputs()))


# All or nothing.
def state_of(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def assert_same(now: Any, then: Any) -> None:
    if isinstance(then, dict):
        assert list(now) == list(then)
        for key in then:
            assert_same(now[key], then[key])
    elif isinstance(then, list):
        assert len(now) == len(then)
        for one, other in zip(now, then):
            assert_same(one, other)
    elif isinstance(then, Tensor):
        assert torch.equal(now, then)
    else:
        assert now == then


@pytest.mark.parametrize("moments", ["rotate", "reset"])
@pytest.mark.parametrize("base", BASES)
def test_an_exception_inside_leaves_model_and_optimiser_as_they_were(monkeypatch, base, moments):
    model = started(base)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    fastlora.reinit_lora_ga(model, sketch_of(model), optimizer)
    train(model, optimizer, steps=2)
    sketch = sketch_of(model)
    state, moments_before = ModelState(model), state_of(optimizer)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    calls = []

    def fails_late(self: FusedLoraLinear, *args: Any) -> None:
        calls.append(self)
        original(self, *args)
        if len(calls) == 4:
            raise MemoryError("no room")

    original = FusedLoraLinear.set_frozen_factors
    monkeypatch.setattr(FusedLoraLinear, "set_frozen_factors", fails_late)
    with pytest.raises(MemoryError):
        fastlora.reinit_lora_ga(model, sketch, optimizer, moments=moments)
    assert len(calls) == 4
    monkeypatch.undo()
    state.assert_unchanged()
    assert_same(state_of(optimizer), moments_before)
    assert_same([p.grad for p in model.parameters() if p.grad is not None], grads)
    monkeypatch.setattr(reinit, "_learned", lambda *_: 1 / 0)  # while it is planned
    with pytest.raises(ZeroDivisionError):
        fastlora.reinit_lora_ga(model, sketch, optimizer, moments=moments)
    state.assert_unchanged()
    assert_same(state_of(optimizer), moments_before)


def test_gradients_of_the_old_factors_are_dropped():
    model = started()
    sketch = sketch_of(model)
    loss_of(model).backward()
    fastlora.reinit_lora_ga(model, sketch)
    assert all(layer.lora_A["default"].grad is None for layer in layers_of(model).values())


def test_layers_without_a_gradient():
    model = started()
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    sketch = sketch_of(model)
    state = ModelState(model)
    with pytest.raises(ValueError, match="3 of 6 layers have no gradient"):
        fastlora.reinit_lora_ga(model, sketch)
    state.assert_unchanged()
    report = fastlora.reinit_lora_ga(model, sketch, missing="skip")
    assert list(report.layers) == SKETCHED[3:] and report.skipped == dict.fromkeys(SKETCHED[:3], "no gradient")
    assert "blocks.0.up: skipped: no gradient" in str(report)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"smoothing": 1.5}, r"smoothing: got 1.5, want a number in \[0, 1\]"),
        ({"moments": "keep"}, "moments: got 'keep', want one of rotate, reset"),
        ({"split": "AB"}, "split: got 'AB'"),
        ({"scale": "big"}, "scale: got 'big', want one of keep, stable, unit, gd"),
        ({"gamma": 0}, "gamma: got 0"),
        ({"max_rank": 0}, "max_rank: got 0"),
        ({"missing": "kaiming"}, "missing: got 'kaiming', want one of error, skip"),
        ({"adapter_name": "other"}, "has no adapter 'other'"),
        ({"optimizer": "adam"}, "optimizer: got str"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1)}, "none of the adapters' parameters"),
        ({"sketch": "file"}, "sketch: got str"),
        ({"model": "model"}, "model: got str"),
    ],
)
def test_wrong_arguments(options, message):
    model = started()
    sketch = sketch_of(model)
    state = ModelState(model)
    with pytest.raises(ValueError, match=message):
        fastlora.reinit_lora_ga(options.pop("model", model), options.pop("sketch", sketch), **options)
    state.assert_unchanged()


def test_wrong_models():
    model = started()
    sketch = sketch_of(model)
    fastlora.merge(model)
    with pytest.raises(ValueError, match="are merged"):
        fastlora.reinit_lora_ga(model, sketch)
    larger = Net()
    fastlora.patch(larger, r=4, target_modules=SKETCHED)
    narrow = sketch_of(Net(), width=2 * R)
    with pytest.raises(ValueError, match="r=4 and wants 2r triplets"):
        fastlora.reinit_lora_ga(larger, narrow)
    with pytest.raises(ValueError, match="has no adapter 'default'"):
        fastlora.reinit_lora_ga(Net(), sketch)
    config = peft.LoraConfig(r=R, target_modules=["up", "down"])
    with pytest.raises(ValueError, match="PEFT's LoRA layers"):
        fastlora.reinit_lora_ga(peft.get_peft_model(Net(), config), sketch)  # type: ignore[arg-type]
