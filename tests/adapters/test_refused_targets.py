"""What was asked for and cannot be adapted: a warning that names it, one line per reason; an error with strict=True."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from tiny_models import tiny_batch, tiny_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fastlora


def moe() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))


def hooked(model: nn.Module, **settings) -> list[str]:
    """As accelerate's device_map and cpu_offload leave it: the names of its linear layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(execution_device="cpu", **settings))
    return names


def warned(model: nn.Module, **settings) -> tuple[fastlora.PatchReport, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = fastlora.patch(model, **settings)
    return report, [str(one.message) for one in caught if "fastlora" in str(one.message)]


def test_a_norm_that_was_asked_for_is_named():
    report, messages = warned(tiny_model("llama"), target_modules=["q_proj", "model.norm", "lm_head", "embed_tokens"])
    assert len(report.patched) == 4
    assert len(messages) == 1
    assert "1 of the targets were left" in messages[0]
    assert messages[0].endswith("\n  model.norm: LlamaRMSNorm is not a linear layer")
    with pytest.raises(ValueError, match=r"strict=True, and 'model.norm' cannot be patched: LlamaRMSNorm is not"):
        fastlora.patch(tiny_model("llama"), target_modules=["q_proj", "model.norm"], strict=True)


def test_a_module_that_holds_layers_is_named_as_what_it_is():
    _, (message,) = warned(tiny_model("llama"), target_modules=["q_proj", "mlp"])
    assert message.endswith("model.layers.0.mlp, model.layers.1.mlp: LlamaMLP is not a linear layer")
    _, messages = warned(tiny_model("llama"), target_modules=r"model\.layers\..*")
    assert len(messages) == 1 and "LlamaMLP" not in messages[0] and "LlamaRMSNorm" in messages[0]


EXPERTS = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]


def test_expert_weights_are_in_the_report_with_the_remedy_and_a_warning_where_they_were_asked_for():
    report, messages = warned(moe())
    assert not messages, "all-linear leaves experts alone, as PEFT does"
    assert {name for name in report.left_alone if "experts" in name} == set(EXPERTS)
    assert "target_parameters=['experts.down_proj']" in report.left_alone[EXPERTS[1]]
    assert "target_parameters=['experts.down_proj']" in report.summary

    report, (message,) = warned(moe(), target_modules=["q_proj", "down_proj"])
    assert "2 of the targets" in message and "Did you mean" not in message
    assert f"{EXPERTS[1]}, {EXPERTS[3]}: experts" in message
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj', .* cannot be patched: experts"
    ):
        fastlora.patch(moe(), target_modules=["q_proj", "gate_up_proj"], strict=True)
    with pytest.raises(ValueError, match="selects nothing") as error:
        fastlora.patch(moe(), target_modules=["down_proj"])
    assert "Did you mean" not in str(error.value)


def test_convolutions_and_positions_are_no_experts():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)
            self.positions = nn.Parameter(torch.zeros(1, 8, 4))
            self.proj = nn.Linear(4, 4)

    assert not fastlora.patch(Net()).left_alone


@pytest.mark.parametrize(
    ("typed", "meant"), [("q_porj", "q_proj"), ("qproj", "q_proj"), ("up_projj", "up_proj"), ("w_gate", None)]
)
def test_a_hint_is_a_misspelling_or_nothing(typed, meant):
    _, (message,) = warned(tiny_model("llama"), target_modules=["o_proj", typed])
    assert f"no module is called {typed!r}" in message
    assert ("Did you mean" in message) == (meant is not None)
    assert meant is None or f"{meant!r} for {typed!r}" in message


def test_other_projections_are_no_hint():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    _, (message,) = warned(Net(), target_modules=["o_proj", "down_proj", "q_proj"])
    assert "no module is called 'down_proj', 'q_proj'" in message and "Did you mean" not in message


def test_layers_that_accelerate_offloads_are_one_line():
    model: Any = tiny_model("llama")
    hooked(model, offload=True)
    with pytest.raises(ValueError, match="selects nothing that can be patched") as error:
        fastlora.patch(model)
    assert len(str(error.value)) < 700
    remove_hook_from_module(model.lm_head)  # what the message says
    names = [*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "lm_head"]
    report, (message,) = warned(model, target_modules=names)
    assert report.patched == ["lm_head"]
    assert "14 of the targets" in message and "and 11 more: accelerate's hook" in message and len(message) < 600
    with pytest.raises(
        ValueError, match=r"strict=True, and .* and 11 more cannot be patched: accelerate's hook"
    ) as error:
        fastlora.patch(model, adapter_name="second", target_modules=names, strict=True)
    assert len(str(error.value)) < 600
    remove_hook_from_module(model, recurse=True)
    assert len(fastlora.patch(model, strict=True).patched) == 14
    model(**tiny_batch("llama")).loss.backward()


def test_layers_that_accelerate_placed_run_fused():
    """As after device_map on several devices: a hook on every layer that moves its input."""
    plain, model = tiny_model("llama"), tiny_model("llama")
    hooked(model)
    for one in (plain, model):
        torch.manual_seed(1)
        fastlora.patch(one, r=2, init_lora_weights=False, strict=True)
    for one in (model, copy.deepcopy(model)):
        output = one(**tiny_batch("llama"))
        torch.testing.assert_close(output.loss, plain(**tiny_batch("llama")).loss, rtol=0, atol=0)
        layers = [module for module in one.modules() if isinstance(module, fastlora.FusedLoraLinear)]
        assert [layer.calls.fused for layer in layers] == [1] * 14
    fastlora.unpatch(model)
    output = model(**tiny_batch("llama"))
    torch.testing.assert_close(output.loss, tiny_model("llama")(**tiny_batch("llama")).loss, rtol=0, atol=0)


def peft_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


def hooked_bases(model: nn.Module, **settings) -> None:
    for layer in peft_layers(model):
        add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="cpu", **settings))


def test_a_peft_layer_that_will_fall_back_is_not_counted_as_patched():
    model: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    hooked_bases(model, offload=True)
    report, (message,) = warned(model)
    assert not report.patched and len(report.left_alone) == 14
    assert report.counts == "fastlora: 0 modules patched, 14 left alone"
    assert "none of this model's PEFT layers can run fused" in message and len(message) < 500
    model(**tiny_batch("llama"))
    layers = peft_layers(model)
    assert [layer.calls.fused for layer in layers] == [0] * 14, "what the report says is what happens"
    with pytest.raises(ValueError, match=r"strict=True, and .* and 11 more cannot be patched: hooks on the base layer"):
        fastlora.patch(model, strict=True)

    remove_hook_from_module(model, recurse=True)
    assert len(fastlora.patch(model, strict=True).patched) == 14
    model(**tiny_batch("llama"))
    assert [layer.calls.fused for layer in layers] == [1] * 14


def test_pefts_layers_on_placed_bases_run_fused():
    model: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    hooked_bases(model)
    wanted = model(**tiny_batch("llama")).loss
    assert len(fastlora.patch(model, strict=True).patched) == 14
    torch.testing.assert_close(model(**tiny_batch("llama")).loss, wanted)
    layers = peft_layers(model)
    assert [layer.calls.fused for layer in layers] == [1] * 14


def test_some_of_pefts_layers_fall_back():
    model: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    add_hook_to_module(
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer,
        AlignDevicesHook(execution_device="cpu", offload=True),
    )
    report, (message,) = warned(model)
    assert len(report.patched) == 13
    assert message.startswith("fastlora.patch: 1 PEFT layers cannot run fused")
    assert "layers.0.mlp.up_proj: hooks on the base layer" in message


@pytest.mark.parametrize("mlp", [None, True])
def test_pefts_layers_that_accelerate_placed_run_fused(mlp):
    """A hook on the LoRA layers and everything in them, as `dispatch_model` leaves a PeftModel."""
    model: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    wanted = model(**tiny_batch("llama")).loss
    layers = peft_layers(model)
    for layer in layers:
        for module in layer.modules():
            if next(module.parameters(recurse=False), None) is not None or module is layer:
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    report = fastlora.patch(model, strict=True, mlp=mlp)
    assert len(report.patched) == 14 and len(report.mlps) == (2 if mlp else 0)
    assert all("forward" in layer.__dict__ for layer in layers), "accelerate's hooks stay"
    for one in (model, copy.deepcopy(model)):
        torch.testing.assert_close(one(**tiny_batch("llama")).loss, wanted)
        assert fastlora.fallbacks(one) == {}
    before = [layer.calls.fused for layer in layers]
    fastlora.unpatch(model)
    torch.testing.assert_close(model(**tiny_batch("llama")).loss, wanted)
    assert min(before) >= 1 and not any(hasattr(layer, "calls") for layer in layers)


def test_pefts_layers_that_accelerate_offloads_say_so():
    model: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    for module in list(model.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True))
    report, _ = warned(model)
    assert set(report.left_alone.values()) == {"accelerate's hook offloads its weights"}
