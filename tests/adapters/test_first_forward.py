"""Layers that a model never calls: known ones are left alone, others a warning after its first training forward."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from transformers import MambaConfig, MambaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, WavLMConfig, WavLMModel

import fastlora
from fastlora.introspect.targets import lora_layers


class Reader(nn.Module):
    """Calls `called`, and computes with the weight of `read` itself, as a fused loss does with the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return functional.linear(self.called(x), self.read.weight)


def messages(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if "fastlora" in str(one.message)]


def hooks(model: nn.Module) -> int:
    """But for the one of each adapter's container, which is there to stay."""
    containers = (nn.ParameterDict, nn.ModuleDict)
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules() if not isinstance(m, containers)
    )


def test_a_layer_that_is_only_read_is_a_warning_once():
    model = Reader()
    fastlora.patch(model, r=2)
    x = torch.randn(2, 4)
    model.eval()
    assert not messages(lambda: model(x)) and hooks(model), "not before it trains"
    model.train()
    with torch.no_grad():
        assert not messages(lambda: model(x)) and hooks(model)
    (message,) = messages(lambda: model(x).sum().backward())
    assert "did not call 1 of its 2 patched layers: read." in message and "exclude_modules" in message
    assert hooks(model) == 0, "free afterwards"
    assert not messages(lambda: model(x))
    fastlora.patch(model, r=2, adapter_name="second", target_modules=["read"])
    fastlora.set_adapter(model, "second")
    assert "read" in messages(lambda: model(x))[0]


def test_pefts_layers_are_watched_too():
    model: Any = peft.get_peft_model(Reader(), peft.LoraConfig(r=2, target_modules=["called", "read"]))
    fastlora.patch(model)
    (message,) = messages(lambda: model(torch.randn(2, 4)))
    assert "did not call 1 of its 2 patched layers: base_model.model.read." in message


def test_an_exception_and_frozen_merged_or_disabled_layers_are_not_held_against_a_model():
    model = Reader()
    fastlora.patch(model, r=2)
    with pytest.raises(ValueError, match="shapes"):
        model(torch.randn(2, 5))
    assert hooks(model), "the next one counts"
    model.read.lora_A.requires_grad_(False)
    model.read.lora_B.requires_grad_(False)
    assert not messages(lambda: model(torch.randn(2, 4)))


@pytest.mark.parametrize("how", ["unpatch", "copy", "pickle", "state"])
def test_the_hooks_are_no_burden(how):
    model = Reader()
    before = hooks(model)
    fastlora.patch(model, r=2)
    if how == "unpatch":
        fastlora.unpatch(model)
        assert hooks(model) == before
        return
    other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert "read" in messages(lambda: other(torch.randn(2, 4)))[0] and hooks(other) == 0
    assert hooks(model), "the copy's hooks are its own"
    assert "read" in messages(lambda: model(torch.randn(2, 4)))[0]


@pytest.mark.parametrize("part", ["whole", "in place", "block"])
def test_compiled_code_is_not_accused(part):
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    fastlora.patch(model, r=2)
    counter = CompileCounter()
    run = model
    if part == "whole":
        run = torch.compile(model, backend=counter, fullgraph=True)
    elif part == "in place":
        model.compile(backend=counter, fullgraph=True)
    else:
        model[1] = torch.compile(model[1], backend=counter, fullgraph=True)
    assert not messages(lambda: [run(torch.randn(2, 4)).sum().backward() for _ in range(3)])
    assert counter.frame_count == 1, "compiled once"


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model: Any = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fastlora.patch(model, r=2)
    model.enable_input_require_grads()
    assert not messages(lambda: model(**tiny_batch("llama"), use_cache=False).loss.backward())
    assert all(layer.lora_B["default"].grad is not None for _, layer in lora_layers(model))


@pytest.mark.parametrize("settings", [{"group": "auto"}, {"mlp": True}, {"group": "auto", "mlp": True}], ids=str)
def test_layers_that_run_together_count_as_called(settings):
    model: Any = tiny_model("llama").train()
    fastlora.patch(model, r=2, **settings)
    assert not messages(lambda: model(**tiny_batch("llama")).loss.backward())


def test_an_expert_without_tokens_may_be_no_fault():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.experts[0](x)

    model = Experts()
    fastlora.patch(model, r=2)
    (message,) = messages(lambda: model(torch.randn(2, 4)))
    assert "2 of its 3 patched layers: experts.1, experts.2." in message and "Experts that got no token" in message


def test_a_head_that_has_been_replaced_is_seen():
    model: Any = tiny_model("llama").train()
    fastlora.patch(model, r=2, target_modules=["q_proj", "lm_head"])
    head = model.lm_head
    model.lm_head = nn.Linear(24, 61, bias=False)
    model.kept = head  # as an optimiser or a list may keep it
    (message,) = messages(lambda: model(**tiny_batch("llama")))
    assert "1 of its 3 patched layers: kept." in message


def test_wavlms_attention_and_mambas_mixers_are_left_alone():
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    wavlm = WavLMModel(WavLMConfig(**sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))
    report = fastlora.patch(wavlm)
    attention = [name for name in report.left_alone if "attention" in name and name.endswith("_proj")]
    assert len(attention) == 4 and "WavLMAttention reads this layer's weight" in report.left_alone[attention[0]]
    assert any(name.endswith("intermediate_dense") for name in report.patched)

    mamba: Any = MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)).train()
    report = fastlora.patch(mamba, r=2)
    assert [name.rpartition(".")[2] for name in report.patched] == ["in_proj"]
    assert all("MambaMixer reads" in report.left_alone[f"backbone.layers.0.mixer.{n}"] for n in ("dt_proj", "out_proj"))
    ids = torch.randint(0, 31, (1, 6))
    assert not messages(lambda: mamba(input_ids=ids, labels=ids).loss.backward())
    with pytest.raises(ValueError, match="dt_proj' cannot be patched: MambaMixer reads this layer's weight"):
        fastlora.patch(mamba, r=2, target_modules=["in_proj", "dt_proj"], strict=True)


def test_experts_of_transformers_do_not_disturb():
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 8}
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)).train()
    fastlora.patch(model, r=2)
    ids = torch.randint(0, 32, (1, 6))
    assert not messages(lambda: model(input_ids=ids, labels=ids).loss.backward())


# PEFT put around a patched model.
@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize(("small", "task"), [(True, None), (False, None), (False, "CAUSAL_LM")])
def test_training_adapters_of_peft_around_fastloras_is_refused(kind, small, task):
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) if small else tiny_model("llama")
    targets = ["0", "2"] if small else ["q_proj", "down_proj"]
    fastlora.patch(model, r=2)
    config = (
        peft.LoraConfig(r=2, target_modules=targets, task_type=task)
        if kind == "lora"
        else peft.IA3Config(target_modules=targets, feedforward_modules=targets[1:], task_type=task)
    )
    around: Any = peft.get_peft_model(model, config).eval()
    inputs: dict[str, Any] = {"input": torch.randn(2, 4)} if small else tiny_batch("llama")
    with torch.no_grad():
        assert not messages(lambda: around(**inputs))
    (message,) = messages(lambda: [around(**inputs) for _ in range(2)])  # a loop without train(): said once
    assert "around fastlora's own" in message
    around.train()
    with pytest.raises(ValueError, match=r"got PEFT's adapters .* around fastlora's own.*no peft_config"):
        around(**inputs)
    fastlora.unpatch(model)
    around(**inputs)


def test_prompts_around_fastloras_adapters_are_a_warning():
    model: Any = tiny_model("llama")
    fastlora.patch(model, r=2)
    around = peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).train()
    (message,) = messages(lambda: around(**tiny_batch("llama")))
    assert "all adapters of its patched layers are frozen" in message


def test_a_head_that_is_passed_by_is_an_error(monkeypatch):
    """As Liger's loss does, which multiplies by the head's weight."""
    model: Any = tiny_model("llama")
    fastlora.patch(model, target_modules=["q_proj", "lm_head"])
    head = model.lm_head

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).last_hidden_state @ head.weight.t()

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(RuntimeError, match=r"did not call its output head 'lm_head'.*leave 'lm_head' out of target"):
        model.train()(torch.tensor([[3, 4]]))
    assert model(torch.tensor([[3, 4]])).shape == (1, 2, 61)  # said once
