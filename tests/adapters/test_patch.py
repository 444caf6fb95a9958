"""fastlora.patch and unpatch on plain models: what a swap changes, and that nothing stays behind. (What is selected:
test_targets.py.)"""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from model_state import ModelState
from plain_models import LINEARS, Net, Tied, submodule
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import FusedLoraLinear

# What a swap changes.


def test_patch_swaps_instances_and_shares_their_weights():
    model = Net()
    before = {name: (module, module.weight, module.bias) for name, module in model.named_modules() if name in LINEARS}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    x = torch.randn(4, 6)
    expected = model(x)
    report = fastlora.patch(model, r=3, lora_alpha=5, lora_dropout=0.25)
    assert report.patched == LINEARS and not report.left_alone
    assert fastlora.is_patched(model)
    for name, (module, weight, bias) in before.items():
        layer = submodule(model, name)
        assert layer is module and type(layer) is FusedLoraLinear and isinstance(layer, nn.Linear)
        assert layer.weight is weight and layer.bias is bias
        assert layer.r == {"default": 3} and layer.scaling == {"default": 5 / 3}
        assert layer.lora_dropout == {"default": 0.25} and layer.active_adapters == ["default"]
        assert layer.lora_A["default"].shape == (3, layer.in_features)
        assert layer.lora_B["default"].shape == (layer.out_features, 3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{side}.default" for name in LINEARS for side in "AB"}
    assert any(flags.values())
    torch.testing.assert_close(model.eval()(x), expected)


def test_conv1d_is_computed_in_its_own_layout():
    model = nn.Sequential(Conv1D(10, 6))
    fastlora.patch(model, r=3, lora_alpha=6, init_lora_weights=False)
    layer = submodule(model, "0")
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (6, 10, (6, 10))
    x = torch.randn(2, 5, 6, requires_grad=True)
    y = model(x)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    expected = x @ layer.weight + layer.bias + 2 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, a, b), dy)
    for gradient, wanted in zip(got, torch.autograd.grad(expected, (x, a, b), dy), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_settings_reach_the_layers():
    model = nn.Sequential(nn.Linear(64, 64))
    torch.manual_seed(0)
    fastlora.patch(
        model, r=4, lora_alpha=6, use_rslora=True, init_lora_weights="gaussian", adapter_name="mine", backend="torch"
    )
    layer = submodule(model, "0")
    assert layer.scaling == {"mine": 3.0} and layer.use_rslora == {"mine": True} and layer.backend == "torch"
    assert abs(layer.lora_A["mine"].std().item() - 0.25) < 0.05 and not layer.lora_B["mine"].any()


@pytest.mark.parametrize("dtype, adapter_dtype", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_adapters_of_a_half_precision_base_are_float32(dtype, adapter_dtype):
    model = Net().to(dtype)
    fastlora.patch(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {adapter_dtype}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


def negate(module, args, output):
    return -output


def test_optimiser_and_hooks_from_before_stay_valid():
    model = Net()
    fired = []
    model.head.register_forward_pre_hook(lambda module, args: fired.append("pre"))
    model.head.register_forward_hook(negate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 6)
    expected = model(x)
    fastlora.patch(model)
    torch.testing.assert_close(model(x), expected)
    assert fired == ["pre", "pre"] and optimizer.param_groups[0]["params"][0] is submodule(model, "blocks.0.up").weight
    fastlora.unpatch(model)
    assert torch.equal(model(x), expected) and len(fired) == 3


# The report.


def test_report_has_a_line_per_module_and_reads_as_a_table():
    model = Net()
    report = fastlora.patch(model, r=3, target_modules=["up", "conv", "norm"], exclude_modules=["blocks.1.up"])
    assert report.patched == ["blocks.0.up", "blocks.0.conv", "blocks.1.conv"]
    assert report.left_alone == {
        "blocks.0.norm": "LayerNorm is not a linear layer",
        "blocks.0.down": "not among target_modules",
        "blocks.1.up": "in exclude_modules",
        "blocks.1.norm": "LayerNorm is not a linear layer",
        "blocks.1.down": "not among target_modules",
        "head": "not among target_modules",
    }
    assert str(report) == repr(report) == report.summary
    assert report.summary.splitlines() == [
        "fastlora: 3 modules patched, 6 left alone",
        "  patched     blocks.0.up, blocks.0.conv, blocks.1.conv: adapter 'default', r=3",
        "  left alone  blocks.0.down, blocks.1.down, head: not among target_modules",
        "  left alone  blocks.0.norm, blocks.1.norm: LayerNorm is not a linear layer",
        "  left alone  blocks.1.up: in exclude_modules",
    ]
    lines = report.table().splitlines()
    assert lines[0].split() == ["module", "kind", "why"] and len(lines) == 1 + 9
    assert lines[1].split(maxsplit=3) == ["blocks.0.up", "Linear", "patched", "adapter 'default', r=3"]
    assert lines[2].split()[:4] == ["blocks.0.norm", "LayerNorm", "left", "alone"]
    kinds = ["Linear", "LayerNorm", "Conv1D", "Linear", "Linear", "LayerNorm", "Conv1D", "Linear", "Linear"]
    assert [line.kind for line in report.modules] == kinds
    again = fastlora.patch(model, r=3, target_modules=["conv", "norm"], exclude_modules=["norm"])
    assert [line.kind for line in again.modules] == kinds, "a patched layer's kind is its former one"
    column = lines[0].index("why")
    assert all(line[column - 2 : column] == "  " for line in lines[1:]), "the columns do not line up"


def test_a_model_that_is_itself_a_linear_layer():
    model = nn.Linear(4, 5)
    before = ModelState(model)
    report = fastlora.patch(model, r=2)
    assert report.patched == [""] and "(the model itself)" in str(report)
    assert type(model) is FusedLoraLinear and fastlora.is_patched(model)
    fastlora.unpatch(model)
    before.assert_unchanged()


# Once more, and a second adapter.


def test_patching_twice_with_the_same_settings_changes_nothing():
    model = Net()
    settings: Any = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["up", "conv"]}
    fastlora.patch(model, **settings)
    before = ModelState(model)
    report = fastlora.patch(model, **settings)
    before.assert_unchanged()
    assert report.patched == ["blocks.0.up", "blocks.0.conv", "blocks.1.up", "blocks.1.conv"]
    assert all("was there already" in line.reason for line in report.modules if line.patched)


def test_the_same_adapter_in_more_layers():
    model = Net()
    fastlora.patch(model, r=3, target_modules=["up"])
    kept = submodule(model, "blocks.0.up").lora_A["default"]
    fastlora.patch(model, r=3, target_modules=["up", "down"])
    assert submodule(model, "blocks.0.up").lora_A["default"] is kept
    assert submodule(model, "blocks.0.down").active_adapters == ["default"]
    assert submodule(model, "blocks.0.down").lora_A["default"].requires_grad


def test_a_second_adapter_is_added_inactive():
    model = Net()
    x = torch.randn(4, 6)
    fastlora.patch(model, r=3, target_modules=["up"], init_lora_weights=False)
    with torch.no_grad():
        expected = model(x)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    report = fastlora.patch(model, r=2, target_modules=["up", "conv"], adapter_name="second", init_lora_weights=False)
    assert report.patched == ["blocks.0.up", "blocks.0.conv", "blocks.1.up", "blocks.1.conv"]
    assert list(submodule(model, "blocks.0.up").r.items()) == [("default", 3), ("second", 2)]
    with torch.no_grad():
        assert torch.equal(model(x), expected), "the second adapter was active before set_adapter"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    fastlora.set_adapter(model, "second")
    assert submodule(model, "blocks.0.conv").active_adapters == ["second"]
    assert submodule(model, "blocks.0.conv").lora_A["second"].requires_grad
    assert not torch.equal(model(x), expected)


def test_a_new_adapter_stays_inactive_where_the_active_one_is_absent():
    model = Net()
    fastlora.patch(model, r=3, target_modules=["up"])
    fastlora.patch(model, r=3, target_modules=["up", "conv"], adapter_name="second")
    fastlora.set_adapter(model, "default")
    assert submodule(model, "blocks.0.conv").active_adapters == []
    fastlora.patch(model, r=3, target_modules=["up", "conv"], adapter_name="third")
    assert submodule(model, "blocks.0.conv").active_adapters == []
    assert not submodule(model, "blocks.0.conv").lora_A["third"].requires_grad


def test_what_the_user_unfroze_stays_so_when_an_adapter_is_added():
    model = Net()
    fastlora.patch(model, target_modules=["up"])
    model.head.weight.requires_grad_(True)
    fastlora.patch(model, target_modules=["up"], adapter_name="second")
    assert model.head.weight.requires_grad


def test_a_layer_added_later_is_frozen_where_it_is_patched():
    model = nn.Sequential(nn.Linear(4, 4))
    fastlora.patch(model, r=2, target_modules=["0"])
    model.extend([nn.Linear(4, 4), nn.Linear(4, 3)])
    fastlora.patch(model, r=2, target_modules=["0", "1"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*(f"{i}.lora_{side}.default" for i in "01" for side in "AB"), "2.weight", "2.bias"}
    fastlora.unpatch(model)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_added_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.inference_mode():
        fastlora.patch(model, r=2)
    model(torch.randn(2, 4)).sum().backward()
    assert submodule(model, "0").lora_B["default"].grad.norm() > 0


# Modules that are shared, tied or hidden.


def test_a_module_used_twice_gets_one_adapter_and_gradients_from_both_uses():
    model = Tied().double()
    report = fastlora.patch(model, r=2, init_lora_weights=False)
    assert report.patched == ["first", "output"]
    assert model.again is model.first
    a = submodule(model, "first").lora_A["default"]
    tokens = torch.tensor([[0, 3, 6]])
    (gradient,) = torch.autograd.grad(model(tokens).square().sum(), a)

    def loss(a: Tensor) -> Tensor:
        layer = submodule(model, "first")
        weight = layer.weight + layer.scaling["default"] * layer.lora_B["default"] @ a
        x = model.embedding(tokens)
        for activation in (torch.relu, lambda t: t):
            x = activation(nn.functional.linear(x, weight, layer.bias))
        return model.output(x).square().sum()

    leaf = a.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(gradient, expected)


def test_tied_weights_stay_tied():
    model = Tied()
    before = ModelState(model)
    fastlora.patch(model, r=2)
    assert submodule(model, "output").weight is model.embedding.weight
    assert not model.embedding.weight.requires_grad
    fastlora.unpatch(model)
    before.assert_unchanged()
    assert model.output.weight is model.embedding.weight and model.embedding.weight.requires_grad


def test_a_module_only_in_a_plain_list_is_no_part_of_the_model():
    model = Net()
    hidden = nn.Linear(6, 6)
    cast(Any, model).hidden = [hidden]
    report = fastlora.patch(model)
    assert len(report.modules) == len(LINEARS) and type(hidden) is nn.Linear and hidden.weight.requires_grad


def test_a_layer_on_the_meta_device_is_patched_there():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6))
    fastlora.patch(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# Unpatching.


@pytest.mark.parametrize("architecture", ["net", "tied", "gpt2", "llama"])
def test_unpatch_leaves_no_trace(architecture):
    model = {"net": Net, "tied": Tied}.get(architecture, lambda: tiny_model(architecture))()
    model.register_forward_hook(lambda module, args, output: None)
    before = ModelState(model)
    fastlora.patch(model, r=3, lora_dropout=0.1, init_lora_weights=False)
    fastlora.patch(model, r=2, adapter_name="second")
    fastlora.set_adapter(model, ["default", "second"])
    fastlora.merge(model)
    fastlora.unpatch(model)
    before.assert_unchanged()
    assert not fastlora.is_patched(model)
    fastlora.patch(model, r=4)
    fastlora.unpatch(model)
    before.assert_unchanged()


def test_unpatch_of_a_model_that_is_not_patched_does_nothing():
    model = Net()
    before = ModelState(model)
    fastlora.unpatch(model)
    before.assert_unchanged()


def test_unpatch_leaves_layers_that_the_user_built():
    layer = FusedLoraLinear(6, 6, r=2)
    model = nn.Sequential(nn.Linear(6, 6), layer)
    fastlora.patch(model, r=2)
    fastlora.unpatch(model)
    assert type(model[0]) is nn.Linear and type(layer) is FusedLoraLinear and list(layer.r) == ["default"]


@pytest.mark.parametrize("build", [Net, Tied])
def test_keep_merged_keeps_the_merged_weights(build):
    model = build()
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    x = torch.randn(4, 6) if build is Net else torch.tensor([[0, 3, 6]])
    fastlora.patch(model, r=3, init_lora_weights=False)
    with torch.no_grad():
        adapted = model(x)
    fastlora.merge(model)
    with torch.no_grad():
        merged = model(x)
    fastlora.unpatch(model, keep_merged=True)
    assert not any(isinstance(module, FusedLoraLinear) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x), merged)
    torch.testing.assert_close(merged, adapted)
    assert {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)} == flags


def test_keep_merged_without_a_merge_is_refused():
    model = Net()
    fastlora.patch(model, r=3, init_lora_weights=False)
    x = torch.randn(4, 6)
    before = model(x)
    with pytest.raises(ValueError, match=r"unpatch: keep_merged: no adapter is merged .* call fastlora.merge"):
        fastlora.unpatch(model, keep_merged=True)
    assert fastlora.is_patched(model)
    assert torch.equal(model(x), before)


# Parts of a model.


def test_a_part_first_and_then_the_whole():
    model = Net()
    before = ModelState(model)
    part = model.blocks[0]
    fastlora.patch(part, r=3, target_modules=["up"])
    assert model.head.weight.requires_grad and not submodule(model, "blocks.0.down").weight.requires_grad
    report = fastlora.patch(model, r=3)
    assert report.patched == LINEARS
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{side}.default" for name in LINEARS for side in "AB"
    }
    fastlora.unpatch(model)
    before.assert_unchanged()


def test_the_whole_first_and_then_a_part():
    model = Net()
    before = ModelState(model)
    fastlora.patch(model, r=3, target_modules=["up"])
    fastlora.patch(model.blocks[1], r=3)
    fastlora.unpatch(model)
    before.assert_unchanged()


def test_unpatching_a_part_alone():
    model = Net()
    before, part = ModelState(model), ModelState(model.blocks[0])
    fastlora.patch(model, r=3)
    fastlora.unpatch(model.blocks[0])
    part.assert_unchanged()
    assert isinstance(model.head, FusedLoraLinear) and not model.head.weight.requires_grad
    fastlora.unpatch(model)
    before.assert_unchanged()


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel])
def test_unpatching_through_a_wrapper(wrap):
    model = Net()
    before = ModelState(model)
    fastlora.patch(model, r=3)
    wrapped = wrap(model)
    assert fastlora.is_patched(wrapped)
    fastlora.unpatch(wrapped)
    before.assert_unchanged()


# Failures half way.


@pytest.mark.parametrize("allocation", range(1, 9))
def test_running_out_of_memory_anywhere_leaves_the_model_as_it_was(monkeypatch, allocation):
    model = Net()
    before = ModelState(model)
    empty, calls = torch.empty, []

    def failing_empty(*args, **kwargs):
        calls.append(args)
        if len(calls) == allocation:
            raise MemoryError
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", failing_empty)
    with pytest.raises(MemoryError):
        fastlora.patch(model, r=3)
    monkeypatch.undo()
    before.assert_unchanged()


def test_an_interruption_while_freezing_leaves_the_flags_as_they_were(monkeypatch):
    model = Net()
    before = ModelState(model)
    requires_grad_, calls = torch.Tensor.requires_grad_, []

    def interrupted(tensor, flag=True):
        calls.append(flag)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return requires_grad_(tensor, flag)

    monkeypatch.setattr(torch.Tensor, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastlora.patch(model, r=3)
    assert calls[:5] == [False] * 5
    before.assert_unchanged()


# Copies.


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("build", [Net, Tied])
def test_a_copy_of_a_patched_model_lives_its_own_life(duplicate, merged, build):
    model = build()
    plain = ModelState(model)
    x = torch.randn(4, 6) if build is Net else torch.tensor([[0, 3, 6]])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    fastlora.patch(model, r=3, init_lora_weights=False)
    if merged:
        fastlora.merge(model)
    with torch.no_grad():
        expected = model(x)
    other = duplicate(model)
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        for p in other.parameters():
            if p.requires_grad:
                p.add_(1)
        assert torch.equal(model(x), expected)
    fastlora.unpatch(other)
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags
    plain.assert_same_tensors(other)
    assert {type(module) for module in other.modules()} == plain.types
    assert fastlora.is_patched(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    fastlora.unpatch(model)
    plain.assert_unchanged()
