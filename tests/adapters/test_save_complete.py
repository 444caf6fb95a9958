"""What save_adapter says of a file that lacks something: unmoved adapters, trainable parameters, replaced layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch import nn

import fastlora


def saved(model: Any, directory, **settings) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastlora.save_adapter(model, directory, **settings)
    return [str(one.message) for one in caught if "fastlora" in str(one.message)]


def step(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny_batch("llama")).loss.backward()
    optimizer.step()


def peft_model(**settings) -> Any:
    return peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **settings)
    )


@pytest.mark.parametrize("family", ["plain", "peft", "dora", "adalora"])
def test_adapters_that_never_moved_are_named(family, tmp_path):
    if family == "peft":
        model = peft_model()
    else:
        model = tiny_model("llama")
        kind: dict[str, Any] = {} if family == "plain" else {f"use_{family}": True}
        fastlora.patch(model, r=2, target_modules=["q_proj", "lm_head"], **kind)
    (message,) = saved(model, tmp_path)
    assert "'default' has not moved from its start in 3 of 3 layers" in message
    for name, p in model.named_parameters():
        if "lm_head" in name:  # as under a fused loss that reads its weight
            p.requires_grad_(False)
    step(model)
    (message,) = saved(model, tmp_path)
    assert "in 1 of 3 layers: lm_head." in message
    for name, p in model.named_parameters():
        if "lm_head" in name and "lora_" in name:
            p.requires_grad_(True)
    step(model)
    assert not saved(model, tmp_path)


def test_a_start_away_from_zero_that_never_moved_is_one(tmp_path):
    model: Any = tiny_model("llama")
    with fastlora.GradientSketch(model, r=2, target_modules=["q_proj"]) as sketch:
        model(**tiny_batch("llama")).loss.backward()
    fastlora.patch(model, r=2, target_modules=["q_proj"])
    fastlora.init_lora_ga(model, sketch)
    assert "in 2 of 2 layers" in saved(model, tmp_path)[0]
    step(model)
    assert not saved(model, tmp_path)


def test_trainable_parameters_that_the_file_leaves_out_are_named(tmp_path):
    model = tiny_model("llama")
    fastlora.patch(model, r=2, init_lora_weights=False)
    assert not saved(model, tmp_path)
    model.get_submodule("model.norm").requires_grad_(True)
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.requires_grad_(True)  # type: ignore[union-attr]
    (message,) = saved(model, tmp_path)
    assert "2 trainable parameters are no adapter's and not saved: " in message
    assert "model.layers.0.self_attn.q_proj.weight, model.norm.weight." in message

    kept = peft_model(init_lora_weights=False, modules_to_save=["norm"], bias="lora_only")
    assert not saved(kept, tmp_path)
    kept.base_model.model.model.embed_tokens.requires_grad_(True)
    assert "1 trainable parameters" in saved(kept, tmp_path)[0]


@pytest.mark.parametrize("how", ["resized", "set", "copied"])
def test_a_patched_layer_that_was_replaced_is_refused(how, tmp_path):
    model: Any = tiny_model("llama")
    fastlora.patch(model, r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    if how == "set":
        model.lm_head = nn.Linear(24, 61, bias=False)
        model.lm_head.requires_grad_(False)
    else:
        model.resize_token_embeddings(70)
        model = copy.deepcopy(model) if how == "copied" else model
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"save_adapter: model: lm_head had been patched .*want patch after that"):
        fastlora.save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (message,) = saved(model, tmp_path, allow_replaced=True)
    assert "lm_head had been patched" in message
    fastlora.unpatch(model)
    fastlora.patch(model, r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    assert not saved(model, tmp_path)


def test_a_part_that_was_patched_by_itself_is_watched_in_the_whole(tmp_path):
    model: Any = tiny_model("llama")
    fastlora.patch(model.model, r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.requires_grad_(False)
    assert not saved(model, tmp_path)
    other: Any = tiny_model("llama")
    model.model.layers[1] = other.model.layers[1]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: model\.layers\.1\.self_attn\.q_proj had been patched"):
        fastlora.save_adapter(model, tmp_path)
