"""The adapters of a whole plain model: which are active, disabled, merged. (PEFT's layers: test_peft_lora.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_state import ModelState
from numerics import units_in_last_place
from torch import Tensor, nn

import fastlora
from fastlora import FusedLoraLinear


def build(dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("default", "second")) -> nn.Sequential:
    """Three adapted layers with random adapters of different ranks; the last layer has the first one alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20, bias=False), nn.Tanh(), nn.Linear(20, 5))
    model.to(dtype)
    for rank, name in enumerate(names, start=2):
        targets = ["0", "2", "4"] if name == names[0] else ["0", "2"]
        fastlora.patch(model, r=rank, target_modules=targets, adapter_name=name, init_lora_weights=False)
    return model


def layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, FusedLoraLinear)]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(inputs(dtype))


@torch.no_grad()
def expected_output(model: nn.Module, *names: str) -> Tensor:
    """What the model should compute with these adapters, from the parameters alone."""
    x = inputs()
    for module in model:  # type: ignore[attr-defined]
        if isinstance(module, FusedLoraLinear):
            y = nn.functional.linear(x, module.weight, module.bias)
            for name in names:
                if name in module.lora_A:
                    y += module.scaling[name] * x @ module.lora_A[name].t() @ module.lora_B[name].t()
            x = y
        else:
            x = module(x)
    return x


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# set_adapter


@pytest.mark.parametrize(
    "chosen", ["default", "second", ["second"], ["default", "second"], ("second", "default", "second")]
)
def test_set_adapter_chooses_what_runs_and_what_is_trained(chosen):
    model = build()
    before = ModelState(model)
    fastlora.set_adapter(model, chosen)
    names = [chosen] if isinstance(chosen, str) else list(dict.fromkeys(chosen))
    torch.testing.assert_close(output(model), expected_output(model, *names))
    assert [layer.active_adapters for layer in layers(model)] == [
        names,
        names,
        [name for name in names if name == "default"],
    ]
    has = {"default": (0, 2, 4), "second": (0, 2)}
    assert trainable(model) == {f"{i}.lora_{side}.{name}" for name in names for i in has[name] for side in "AB"}
    fastlora.set_adapter(model, "default")
    before.assert_unchanged()
    fastlora.set_adapter(model, chosen)
    model(inputs()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)


def test_outputs_of_different_adapters_differ():
    model = build()
    base = expected_output(model)
    outputs = [base, *(expected_output(model, *names) for names in (["default"], ["second"], ["default", "second"]))]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).norm() > 0.01 * base.norm()


def test_a_changed_scale_counts_at_once():
    model = build()
    for layer in layers(model):
        layer.scaling["default"] *= 3
    torch.testing.assert_close(output(model), expected_output(model, "default"))


# disable_adapter


def test_disabled_adapters_leave_the_base_model():
    model = build()
    before, expected = ModelState(model), output(model)
    with fastlora.disable_adapter(model) as inside:
        assert inside is model
        torch.testing.assert_close(output(model), expected_output(model), rtol=0, atol=0)
        with fastlora.disable_adapter(model):
            torch.testing.assert_close(output(model), expected_output(model), rtol=0, atol=0)
        torch.testing.assert_close(output(model), expected_output(model), rtol=0, atol=0)
    before.assert_unchanged()
    assert torch.equal(output(model), expected)


def test_an_exception_enables_the_adapters_again():
    model = build()
    before = ModelState(model)
    with pytest.raises(KeyboardInterrupt), fastlora.disable_adapter(model):
        raise KeyboardInterrupt
    before.assert_unchanged()


@pytest.mark.parametrize("fails", [False, True], ids=["", "exception"])
def test_merged_adapters_are_taken_out_and_merged_again(fails):
    model = build(torch.bfloat16)
    with fastlora.disable_adapter(model):
        base = output(model, torch.bfloat16)
    fastlora.merge(model)
    merged, expected = ModelState(model), output(model, torch.bfloat16)
    try:
        with fastlora.disable_adapter(model):
            assert torch.equal(output(model, torch.bfloat16), base)
            with fastlora.disable_adapter(model):
                assert torch.equal(output(model, torch.bfloat16), base)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(output(model, torch.bfloat16), expected)
    merged.assert_same_tensors(model)
    assert all(layer.merged_adapters == ["default"] for layer in layers(model))


def test_only_what_was_merged_is_merged_again():
    model = build()
    first, *others = layers(model)
    first.merge()
    with fastlora.disable_adapter(model):
        torch.testing.assert_close(output(model), expected_output(model))
    assert first.merged_adapters == ["default"] and not any(layer.merged_adapters for layer in others)


def test_adapters_chosen_while_disabled_are_the_ones_afterwards():
    model = build()
    fastlora.merge(model)
    with fastlora.disable_adapter(model):
        fastlora.set_adapter(model, "second")
        torch.testing.assert_close(output(model), expected_output(model))
    merged = output(model)
    fastlora.unmerge(model)
    torch.testing.assert_close(merged, expected_output(model, "second"))


def test_a_merge_while_disabled_has_no_effect_on_the_output():
    model = build()
    base, adapted = expected_output(model), expected_output(model, "default")
    with fastlora.disable_adapter(model):
        fastlora.merge(model)
        torch.testing.assert_close(output(model), base)
    torch.testing.assert_close(output(model), adapted)


# Deleted.


def test_a_deleted_adapter_is_gone_and_the_other_runs():
    model = build()
    fastlora.set_adapter(model, "second")
    fastlora.delete_adapter(model, "default")
    assert [list(layer.r) for layer in layers(model)] == [["second"], ["second"], []]
    assert not [name for name, _ in model.named_parameters() if "default" in name]
    torch.testing.assert_close(output(model), expected_output(model, "second"))
    fastlora.delete_adapter(model, "second")
    torch.testing.assert_close(output(model), expected_output(model))


def test_a_deleted_start_gives_the_weights_bits_back():
    model = build(names=())
    before = [p.clone() for p in model.parameters()]
    fastlora.patch(model, r=2, init_lora_weights="pissa")
    fastlora.delete_adapter(model, "default")
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("patched", [True, False])
def test_in_a_peft_model_the_configuration_goes_too(patched):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), config)
    model.add_adapter("second", config)
    if patched:
        fastlora.patch(model)
    fastlora.merge(model)
    with pytest.raises(ValueError, match=r"delete_adapter: \['default'\] merged into 'base_model.model.0'"):
        fastlora.delete_adapter(model, "default")
    fastlora.unmerge(model)
    fastlora.delete_adapter(model, "default")
    assert list(model.peft_config) == ["second"] and model.active_adapters == ["second"]
    assert not [name for name, _ in model.named_parameters() if "default" in name]


def test_what_cannot_be_deleted_stays():
    model = build()
    with pytest.raises(
        ValueError, match=r"delete_adapter: adapter_name: got 'third', want one of \['default', 'second'"
    ):
        fastlora.delete_adapter(model, "third")
    fastlora.merge(model)
    with pytest.raises(ValueError, match=r"delete_adapter: \['default'\] merged into '0'; call fastlora.unmerge"):
        fastlora.delete_adapter(model, "default")
    assert len(layers(model)[0].r) == 2
    fastlora.delete_adapter(model, "second")  # which is not merged
    fastlora.unmerge(model)
    torch.testing.assert_close(output(model), expected_output(model, "default"))


# merge and unmerge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_merging_rounds_once_and_unmerging_gives_the_bits_back(dtype):
    model = build(dtype)
    before = ModelState(model)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [layer.weight.detach().to(torch.float64, copy=True) for layer in layers(model)]
    for names in (["default"], ["default", "second"], ["second"]):
        fastlora.set_adapter(model, names)
        fastlora.merge(model)
        for layer, weight in zip(layers(model), weights, strict=True):
            exact = weight.clone()
            for name in (name for name in names if name in layer.lora_A):
                exact += layer.scaling[name] * (layer.lora_B[name].double() @ layer.lora_A[name].double()).detach()
            allowed = 0.5 * units_in_last_place(exact, dtype) + 8 * torch.finfo(accumulator).eps
            assert ((layer.weight.detach().double() - exact).abs() <= allowed).all()
        assert (layers(model)[0].weight.detach().double() - weights[0]).abs().max() > 0.1
        fastlora.unmerge(model)
        before.assert_same_tensors(model)
    fastlora.set_adapter(model, "default")
    fastlora.unmerge(model)  # nothing is merged
    before.assert_unchanged()


def test_the_merged_model_computes_the_same_and_trains_nothing():
    model = build()
    expected = output(model)
    fastlora.merge(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
    y = model(inputs().requires_grad_())
    y.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    fastlora.unmerge(model)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_merge_that_would_not_be_finite_is_refused_as_a_whole(poison):
    """1e30 is finite in the adapter, and too large for the fp16 weight."""
    model = build(torch.float16)
    with torch.no_grad():
        layers(model)[2].lora_B["default"][0, 0] = poison
    before = ModelState(model)
    with pytest.raises(ValueError, match=r"merge: '4': .*non-finite.*nothing was changed"):
        fastlora.merge(model)
    before.assert_unchanged()


@pytest.mark.parametrize("failure", [MemoryError(), KeyboardInterrupt()])
def test_a_failure_at_the_last_layer_unmerges_the_others(monkeypatch, failure):
    model = build(torch.bfloat16)
    before = ModelState(model)
    last, get_delta_weight = layers(model)[2], FusedLoraLinear.get_delta_weight

    def failing(layer, name):
        if layer is last:
            raise failure
        return get_delta_weight(layer, name)

    monkeypatch.setattr(FusedLoraLinear, "get_delta_weight", failing)
    with pytest.raises(type(failure)):
        fastlora.merge(model)
    before.assert_unchanged()


class TiedModel(nn.Module):
    """One weight for an embedding and two output layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.first = nn.Linear(6, 9, bias=False)
        self.second = nn.Linear(6, 9)
        self.first.weight = self.second.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        return self.first(x), self.second(x)


def test_a_tied_weight_merged_in_inference_mode_can_be_trained_through():
    model = TiedModel()
    fastlora.patch(model, r=2, init_lora_weights=False)
    x = torch.randn(3, 6, requires_grad=True)
    with torch.inference_mode():
        fastlora.merge(model)
    model.second(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, model.second.weight.detach().sum(0).expand(3, 6))


@pytest.mark.parametrize("change", ["cast", "cast and back", "state_dict", "copy of data"])
def test_unmerging_after_the_model_was_changed(change):
    """The former weights come back in the dtype that the model has now; a tied model is tied again where it can be."""
    model = build(torch.float32)
    weights = [layer.weight.detach().clone() for layer in layers(model)]
    fastlora.merge(model)
    if change == "cast":
        model.to(torch.bfloat16)
        weights = [weight.to(torch.bfloat16) for weight in weights]
    elif change == "cast and back":
        model.to(torch.bfloat16).to(torch.float32)
    elif change == "state_dict":
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    else:
        for layer in layers(model):
            layer.weight.data = layer.weight.data.clone()
    fastlora.unmerge(model)
    for layer, weight in zip(layers(model), weights, strict=True):
        assert layer.weight.dtype == weight.dtype and torch.equal(layer.weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tied_model_that_was_cast_while_merged(dtype):
    model = TiedModel()
    fastlora.patch(model, r=2, init_lora_weights=False)
    weight = model.embedding.weight.detach().to(dtype)
    fastlora.merge(model)
    model.to(dtype)
    fastlora.unmerge(model)
    for module in (model.embedding, model.first, model.second):
        assert torch.equal(module.weight, weight)
    assert model.first.weight is model.second.weight is model.embedding.weight
