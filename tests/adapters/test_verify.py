"""`verify_adapter` finds what a server would compute otherwise, and nothing where it would not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from mixtures import experts_in, mixture, peft_mixture, randomise
from tiny_models import tiny_model

import fastlora
from fastlora.introspect.targets import lora_layers


def model_of(kind: str) -> Any:
    """A model whose adapters are not zero."""
    if kind in ("peft", "peft patched"):
        model = peft_mixture(mixture("gpt_oss"), target_modules=["o_proj"], rank_pattern={"down_proj": 2})
        if kind == "peft patched":
            fastlora.patch(model)
        return model
    if kind == "peft embedding":
        config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(tiny_model("llama"), config)
    else:
        dense = {"llama": "llama", "gpt2": "gpt2", "embedding": "llama", "pissa": "llama"}
        base = tiny_model(dense[kind]) if kind in dense else mixture(kind.removesuffix(" half"))
        model = base.to(torch.bfloat16) if kind.endswith("half") else base
        settings: dict[str, Any] = {
            "llama": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 3}},
            "gpt2": {"use_dora": True},
            "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
            "pissa": {"init_lora_weights": "pissa"},
        }.get(kind, {"target_parameters": experts_in(base), "rank_per_token": True})
        fastlora.patch(model, **({"r": 4, "target_modules": "all-linear"} | settings))
    randomise(model)
    return model


KINDS = (
    "llama",
    "gpt2",
    "qwen3_moe",
    "gpt_oss",
    "nemotron_h",
    "qwen3_moe half",
    "peft",
    "peft patched",
    "peft embedding",
    "embedding",
    "pissa",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_what_is_computed(tmp_path, kind):
    model = model_of(kind)
    fastlora.save_adapter(model, tmp_path)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    check = fastlora.verify_adapter(model, tmp_path)
    assert check.ok and check.compared >= len(list(lora_layers(model))) and model.training, str(check)
    assert check.error < (0.05 if kind.endswith("half") else 1e-5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fastlora.merge(model)
    assert fastlora.verify_adapter(model, tmp_path).ok
    fastlora.unmerge(model)
    name, layer = next(iter(lora_layers(model)))
    layer.scaling["default"] *= 1.25
    check = fastlora.verify_adapter(model, tmp_path)
    where = name.removeprefix("base_model.model.").removesuffix(".gate_up_proj").removesuffix(".up_proj")
    assert list(check.mismatches) == [where] and "differs from the file's by" in str(check)
    with pytest.raises(ValueError, match=r"verify_adapter: fastlora: .* 1 mismatch,"):
        fastlora.verify_adapter(model, tmp_path, strict=True)


def rewritten(folder: Path, change: Any) -> None:
    """The file with its tensors changed."""
    place = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(place)
    change(tensors)
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, place)


def columns_by_expert(tensors: dict[str, torch.Tensor]) -> None:
    """lora_B with the expert slowest, which some have trained with for months."""
    for key, tensor in tensors.items():
        if "experts.lora_B" in key:
            tensors[key] = tensor.reshape(len(tensor), -1, 4).transpose(1, 2).reshape(tensor.shape)


def one_expert(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"][2 * 3] += 1.0  # expert 2's


def lost(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.0.self_attn" in key]:
        del tensors[key]


def foreign(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.gone.lora_A.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            columns_by_expert,
            {"model.layers.0.mlp.experts": "of expert 0, 1, 2, 3 d", "model.layers.1.mlp.experts": "of"},
        ),
        (one_expert, {"model.layers.1.mlp.experts": "the output of expert 2 differs"}),
        (lost, {"model.layers.0.self_attn.o_proj": "adapted in the model, and not in the file"}),
        (foreign, {"gone": "in the file, and not in the model"}),
    ],
)
def test_a_file_that_says_something_else_is_named(tmp_path, change, wanted):
    model = mixture("olmoe")
    fastlora.patch(model, r=3, target_modules=["o_proj"], target_parameters=experts_in(model))
    randomise(model)
    fastlora.save_adapter(model, tmp_path)
    rewritten(tmp_path, change)
    found = fastlora.verify_adapter(copy.deepcopy(model), tmp_path).mismatches
    assert found.keys() == wanted.keys() and all(wanted[name] in found[name] for name in wanted), found


def test_bad_input(tmp_path):
    model = model_of("llama")
    with pytest.raises(ValueError, match="verify_adapter: this LlamaForCausalLM has no LoRA layers"):
        fastlora.verify_adapter(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="verify_adapter: directory: no adapter can be read in"):
        fastlora.verify_adapter(model, tmp_path)
    fastlora.save_adapter(model, tmp_path)
    place = tmp_path / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"peft_type": "LOKR"}))
    with pytest.raises(ValueError, match="got peft_type 'LOKR', want 'LORA'"):
        fastlora.verify_adapter(model, tmp_path)
    place.write_text(json.dumps(json.loads(place.read_text()) | {"peft_type": "LORA", "lora_bias": True}))
    with pytest.raises(ValueError, match="its files use lora_bias, which nothing here compares"):
        fastlora.verify_adapter(model, tmp_path)
