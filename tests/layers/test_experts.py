"""Mixtures of experts with adapters: PEFT's numbers in every family, plain and in place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from mixtures import FAMILIES, experts_in, mixture, peft_mixture, randomise, step, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.introspect.targets import lora_layers
from fastlora.layers.experts import ExpertWeight, delta_of


def wrapper_of(peft_model: Any, name: str, layer: ExpertWeight) -> Any:
    wrapper = peft_model.base_model.model.get_submodule(name.rpartition(".")[0])
    while wrapper.parameter_name != layer.key:
        wrapper = wrapper.base_layer
    return wrapper


def pairs(model: nn.Module, peft_model: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our factors and PEFT's."""
    return [
        (getattr(layer, factor)["default"], getattr(wrapper_of(peft_model, name, layer), factor)["default"].weight)
        for name, layer in lora_layers(model)
        for factor in ("lora_A", "lora_B")
    ]


def patched(family: str = "qwen3_moe", **settings: Any) -> tuple[Any, Any]:
    """A model and a patched copy whose adapters are not zero."""
    base = mixture(family)
    model = copy.deepcopy(base)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": experts_in(base)} | settings
    fastlora.patch(model, **settings)
    randomise(model)
    return base, model


def close(got: Any, want: Any, bound: float) -> bool:
    return bool((got - want).norm() <= bound * want.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_numbers_plain_and_in_place(family):
    base, model = patched(family)
    eager = peft_mixture(base)
    with torch.no_grad():
        for ours, theirs in pairs(model, eager):
            ours.copy_(theirs)
    in_place = copy.deepcopy(eager)
    report = fastlora.patch(in_place)
    experts = [name for name, p in base.named_parameters() if p.dim() == 3 and ".experts." in name]
    assert sorted(report.patched) == sorted(f"base_model.model.{name}" for name in experts)
    x = tokens()
    want = step(eager, x)
    assert not close(base(x).logits, want, 0.1)
    for got, other in ((step(model, x), model), (step(in_place, x), in_place)):
        assert torch.allclose(got, want, atol=1e-4)
        theirs = {name: p for name, p in eager.named_parameters() if p.requires_grad}
        found = (
            [(mine.grad, p.grad) for mine, p in pairs(model, eager)]
            if other is model
            else [(p.grad, theirs[name].grad) for name, p in in_place.named_parameters() if p.requires_grad]
        )
        assert found and all(close(grad, expected, 1e-3) for grad, expected in found)
    assert fastlora.fallbacks(in_place) == {}
    for other in (model, in_place):
        before = {name: p.detach().clone() for name, p in other.named_parameters()}
        with torch.no_grad():
            with fastlora.disable_adapter(other):
                assert torch.allclose(other(x).logits, base(x).logits, atol=1e-5)
            fastlora.merge(other)
            merged = other(x).logits
            assert torch.allclose(merged, want, atol=1e-4)
            with fastlora.disable_adapter(other):
                assert torch.allclose(other(x).logits, base(x).logits, atol=1e-5)
            assert torch.equal(other(x).logits, merged)
            fastlora.unmerge(other)
        assert all(torch.equal(before[name], p) for name, p in other.named_parameters())
    fastlora.unpatch(in_place)
    assert torch.equal(in_place(x).logits, eager(x).logits)
    kinds = [type(module) for module in base.modules()]
    flags = [p.requires_grad for p in base.parameters()]
    fastlora.unpatch(model)
    assert [type(module) for module in model.modules()] == kinds and [
        p.requires_grad for p in model.parameters()
    ] == flags
    assert torch.equal(model(x).logits, base(x).logits)


def test_copies_pickles_checkpoints_and_state_dicts():
    _, model = patched()
    x = tokens()
    want = step(model, x)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).logits, want)
        weights = [layer for _, layer in lora_layers(other)]
        assert all(layer.weight is layer.experts._parameters[layer.key] for layer in weights)
    fresh = patched()[1]
    randomise(fresh, seed=8)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x).logits, want)
    fastlora.merge(fresh)
    with pytest.raises(
        ValueError, match=r"experts.gate_up_proj: adapters \['default'\] are merged into the layer's weight"
    ):
        fresh.load_state_dict(model.state_dict())
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(step(model, x), want)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)


def test_several_adapters_and_their_switches():
    base, model = patched()
    x = tokens()
    one = model(x).logits
    targets = experts_in(base)
    report = fastlora.patch(
        model, adapter_name="b", r=2, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    assert {line.reason for line in report.modules if line.patched} == {"adapter 'b', r=2 of each of 4 experts"}
    assert torch.equal(model(x).logits, one)
    fastlora.set_adapter(model, "b")
    two = model(x).logits
    layer = dict(lora_layers(model))["model.layers.0.mlp.experts.down_proj"]
    assert layer.lora_A["b"].requires_grad and not layer.lora_A["default"].requires_grad
    assert layer.lora_A["b"].shape == (8, 16) and layer.lora_B["b"].shape == (24, 8)
    fastlora.set_adapter(model, ["default", "b"])
    both = model(x).logits
    assert not torch.allclose(both, one, atol=1e-3) and not torch.allclose(both, two, atol=1e-3)
    fastlora.merge(model)
    assert torch.allclose(model(x).logits, both, atol=1e-4)
    fastlora.unmerge(model)
    done = fastlora.add_weighted_adapter(model, {"default": 1.0, "b": 1.0}, "sum")
    assert {combined.r for combined in done.values()} == {5}
    fastlora.add_weighted_adapter(model, {"default": 1.0, "b": 0.5}, "less", r=4)
    fastlora.set_adapter(model, "sum")
    assert torch.allclose(model(x).logits, both, atol=1e-4)
    expert = torch.zeros(24, 16, dtype=torch.float64)
    for name, weight in (("default", 1.0), ("b", 0.5)):
        (term,) = layer._terms([name])
        expert += weight * delta_of(term, 2, False).double()
    (term,) = layer._terms(["less"])
    best = torch.linalg.svdvals(expert)[4:].norm()
    assert float((delta_of(term, 2, False).double() - expert).norm()) < 1.0001 * float(best)
    fastlora.set_adapter(model, "b")
    fastlora.delete_adapter(model, "default")
    assert torch.equal(model(x).logits, two)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.gate_up_proj' is a weight of experts"):
        fastlora.adapter_names(model, ["b", "b"]).__enter__()
    assert fastlora.explain(layer, torch.randn(4, 16)).forward == "grouped"


def test_dropout_drops_in_training_only_and_follows_the_seed():
    _, model = patched(lora_dropout=0.5)
    x = tokens()
    quiet = model(x).logits
    assert torch.equal(model(x).logits, quiet)
    model.train()
    torch.manual_seed(4)
    one = step(model, x)
    torch.manual_seed(4)
    assert torch.equal(step(model, x), one)
    assert not torch.allclose(step(model, x), one, atol=1e-3) and not torch.allclose(one, quiet, atol=1e-3)


class Sizes(TorchDispatchMode):
    """The largest tensor that was made, in bytes, but for views of what there was."""

    def __init__(self, there: set[int]) -> None:
        super().__init__()
        self.there, self.largest = there, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.there:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_nothing_of_the_weights_size_is_made_or_saved():
    model = mixture("qwen3_moe", hidden_size=64, moe_intermediate_size=96, num_experts=32)
    fastlora.patch(model, r=1, target_modules=[], target_parameters=experts_in(model), init_lora_weights=False)
    experts = model.model.layers[0].mlp.experts
    there = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            saved.append(tensor.untyped_storage().nbytes())
        return tensor

    x, index = torch.randn(6, 64, requires_grad=True), torch.randint(32, (6, 2))
    with Sizes(there) as made, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x, index, torch.rand(6, 2)).sum().backward()
    weight = experts.down_proj.nbytes
    assert saved and max(saved) < weight / 8 and 0 < made.largest < weight / 8


def test_one_expert_takes_all_and_nan_weights_stay_with_their_token():
    _, model = patched()
    experts = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(5, 24), torch.full((5, 2), 3), torch.rand(5, 2)
    alone = experts(x, index, weights)
    experts.config._experts_implementation, layers = "eager", [layer for _, layer in lora_layers(model)]
    fastlora.merge(model)
    assert torch.allclose(alone, experts(x, index, weights), atol=1e-5)
    fastlora.unmerge(model)
    experts(x, index, weights).sum().backward()
    grad = layers[0].lora_A["default"].grad.view(4, 3, -1)
    assert not grad[:3].any() and grad[3].any()
    weights[2, 0] = float("nan")
    out = experts(x, index, weights)
    assert out[2].isnan().all() and torch.equal(out[[0, 1, 3, 4]], alone[[0, 1, 3, 4]])
