"""Models in which PEFT holds adapters: whose they are decides, not which wrapper is outermost."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny_models import tiny_batch, tiny_model

import fastlora

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
OTHERS: dict[str, Any] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, **TASK),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, **TASK),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **TASK),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"], **TASK),
    "OFT": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"], **TASK),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **TASK),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"], **TASK),
}
LORA: dict[str, Any] = {"LORA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **TASK)}


def bits(model: Any) -> dict[str, Any]:
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name][0], other[name][0]) and one[name][1] == other[name][1] for name in one
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_with_other_adapters_of_pefts_is_refused_and_left_as_it_was(kind, tmp_path):
    model: Any = peft.get_peft_model(tiny_model("llama"), OTHERS[kind]())
    before = bits(model)
    for refused in (
        lambda: fastlora.patch(model),
        lambda: fastlora.patch(torch.nn.ModuleDict({"part": model})),
        lambda: fastlora.save_adapter(model, tmp_path / "none"),
    ):
        with pytest.raises(ValueError, match=rf"model: got PEFT's adapters \({kind}\).*want a plain model"):
            refused()
    assert same(bits(model), before)
    assert not (tmp_path / "none").exists()


def test_injected_layers_without_a_peft_model_are_found():
    model = tiny_model("llama")
    peft.inject_adapter_in_model(OTHERS["LOKR"](), model)
    with pytest.raises(ValueError, match="patch: model: got PEFT's adapters"):
        fastlora.patch(model)


def test_lora_next_to_other_adapters_of_pefts_is_accelerated():
    model: Any = peft.get_peft_model(tiny_model("llama"), LORA["LORA"](), mixed=True)
    model.add_adapter("other", peft.LoKrConfig(r=2, target_modules=["k_proj"]))
    assert len(fastlora.patch(model).patched) == 4


@pytest.mark.parametrize("kind", OTHERS | LORA)
def test_get_peft_model_over_a_patched_model_is_refused_with_the_remedy(kind, tmp_path):
    torch.manual_seed(1)
    model = tiny_model("llama")
    fastlora.patch(model, r=2, init_lora_weights=False)
    with torch.no_grad():
        wanted = model(**tiny_batch("llama")).logits
    around: Any = peft.get_peft_model(model, (OTHERS | LORA)[kind]())
    for refused in (
        lambda: fastlora.save_adapter(around, tmp_path / "none"),
        lambda: fastlora.patch(around),
        lambda: fastlora.load_adapter(around, tmp_path / "none"),
    ):
        with pytest.raises(ValueError, match=rf"model: got PEFT's adapters \({kind}\) around fastlora's own"):
            refused()
    assert not (tmp_path / "none").exists()

    prompts = kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
    inside = around.get_base_model() if prompts else around.unload()
    fastlora.save_adapter(inside, tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**tiny_batch("llama")).logits, wanted, rtol=0, atol=1e-6)


def test_a_peft_model_of_a_patched_models_copy_stays_peft(tmp_path):
    """What decides is what the model holds now: after `unpatch` PEFT is the only one."""
    model = tiny_model("llama")
    fastlora.patch(model, r=2)
    fastlora.unpatch(model)
    around = peft.get_peft_model(model, LORA["LORA"]())
    assert len(fastlora.patch(around).patched) == 4
    fastlora.save_adapter(around, tmp_path)
