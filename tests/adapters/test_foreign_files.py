"""Files and places that PEFT and the world make: names that are not UTF-8, shared factors, layers under two names,
embeddings next to LoRA, settings of a later PEFT, and models whose layers came by transformers' add_adapter."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import safetensors.torch
import torch
from plain_models import Tied
from tiny_models import tiny_batch, tiny_model

import fastlora

SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_batch("llama")["input_ids"]).logits


def patched(**settings) -> Any:
    model = tiny_model("llama")
    torch.manual_seed(1)
    fastlora.patch(model, **SETTINGS | settings)
    return model


def from_peft(directory, **settings) -> Any:
    """PEFT's model of this configuration, saved."""
    torch.manual_seed(2)
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], **SETTINGS, **settings})
    model: Any = peft.get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def test_a_directory_whose_name_is_not_utf8(tmp_path):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ad\xe9l\xff"))
    model = patched()
    fastlora.save_adapter(model, directory)
    into = tiny_model("llama")
    fastlora.load_adapter(into, directory)
    torch.testing.assert_close(logits(into), logits(model), rtol=0, atol=0)
    theirs: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fastlora.patch(theirs)
    fastlora.load_adapter(theirs, directory, "second")
    theirs.set_adapter("second")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    fastlora.save_adapter(theirs, directory, "second")


def test_adapters_that_share_a_factor(tmp_path):
    model = patched(target_modules=["q_proj", "o_proj"])
    attention = model.model.layers[0].self_attn
    attention.o_proj.lora_A["default"] = attention.q_proj.lora_A["default"]
    whole = torch.randn(2, 48)  # and views of one buffer
    attention.q_proj.lora_B["default"].data = whole[:, :24].t()
    attention.o_proj.lora_B["default"].data = whole[:, 24:].t()
    fastlora.save_adapter(model, tmp_path)
    into = tiny_model("llama")
    fastlora.load_adapter(into, tmp_path)
    torch.testing.assert_close(logits(into), logits(model), rtol=0, atol=0)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model), rtol=0, atol=1e-6
    )


def test_one_layer_under_two_names_is_said_to_be_one_in_peft(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    fastlora.patch(model, **SETTINGS)
    with pytest.warns(UserWarning, match="'first' is the same layer as again, and PEFT adapts only the first"):
        fastlora.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    into = Tied()
    fastlora.load_adapter(into, tmp_path)
    tokens = torch.arange(7)
    torch.testing.assert_close(into(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["a/b", "/nowhere", "a\\b"])
def test_adapter_names_with_slashes(name, tmp_path):
    for refused in (
        lambda: patched(adapter_name=name),
        lambda: fastlora.FusedLoraLinear(4, 4).add_adapter(name),
    ):
        with pytest.raises(ValueError, match="want a non-empty string without dots and slashes"):
            refused()
    model: Any = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name=name
    )
    with pytest.raises(ValueError, match="has a slash and is no name of a subdirectory"):
        fastlora.save_adapter(model, tmp_path / "all")
    assert not (tmp_path / "all").exists()
    if name == "/nowhere":
        with pytest.raises(ValueError, match="no absolute path as a name"):
            fastlora.save_adapter(model, tmp_path / "one", name)
        return
    fastlora.save_adapter(model, tmp_path / "one", name)
    assert sorted(os.listdir(tmp_path / "one"))[:2] == ["README.md", "adapter_config.json"]


def test_embeddings_next_to_lora_are_loaded_where_the_model_has_the_place(tmp_path):
    torch.manual_seed(2)
    base: Any = tiny_model("llama")
    base.resize_token_embeddings(70)
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], **SETTINGS)
    theirs: Any = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    small: Any = tiny_model("llama")
    before = {key: value.clone() for key, value in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"got shape \(70, 24\), the model has .*resize_token_embeddings\(70\)"):
        fastlora.load_adapter(small, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    small.resize_token_embeddings(70)
    fastlora.load_adapter(small, tmp_path)
    torch.testing.assert_close(logits(small), logits(theirs), rtol=0, atol=1e-6)


def test_modules_to_save_are_loaded(tmp_path):
    theirs = from_peft(tmp_path, modules_to_save=["norm", "lm_head"])
    model = tiny_model("llama")
    fastlora.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["norm", "absent"]}))
    with pytest.raises(ValueError, match="modules_to_save: absent are in the configuration, and not in the file"):
        fastlora.load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("module", "targets"),
    [("lm_head", ["q_proj"]), ("embed_tokens", ["q_proj"]), ("lm_head", ["q_proj", "embed_tokens"])],
    ids=str,
)
def test_a_module_to_save_that_the_model_ties_is_parted_from_the_other(tmp_path, module, targets):
    """PEFT trains a copy of it, and the other end keeps the weight."""
    base: Any = tiny_model("qwen3")
    config = peft.LoraConfig(target_modules=targets, modules_to_save=[module])
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    theirs.eval().save_pretrained(tmp_path)
    fastlora.load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base), logits(theirs), rtol=0, atol=1e-6)
    assert not base.config.tie_word_embeddings
    base.tie_weights()
    torch.testing.assert_close(logits(base), logits(theirs), rtol=0, atol=1e-6)
    if "embed_tokens" in targets:
        fastlora.merge(base)
        with pytest.raises(ValueError, match=r"merged into 'model\.embed_tokens'; call fastlora\.unmerge"):
            fastlora.load_adapter(base, tmp_path, "second")


def test_tensors_without_a_place_are_named(tmp_path):
    from_peft(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"the file has lm_head\.weight .*which this LlamaModel has not"):
        fastlora.load_adapter(cast(Any, tiny_model("llama")).model, tmp_path)


def test_settings_of_a_later_peft_are_a_warning(tmp_path):
    theirs = from_peft(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_telepathy": None, "zeal": 3}))
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="unknown settings 'use_telepathy', 'zeal' are ignored"):
        fastlora.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    fastlora.save_adapter(model, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.load_adapter(tiny_model("llama"), tmp_path / "again")


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_model_with_adapters_by_transformers_takes_load_adapter(prefixed, tmp_path):
    theirs = from_peft(tmp_path / "a")
    model: Any = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "first")
    if prefixed:
        fastlora.patch(model)
    model(**tiny_batch("llama"))
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    fastlora.load_adapter(model, tmp_path / "a", "second")
    after = dict(model.named_parameters())
    for name, (value, flag) in before.items():
        name = name if name in after else name.replace("down_proj.", "down_proj.base_layer.")
        assert torch.equal(after[name], value) and after[name].requires_grad == flag
    torch.testing.assert_close(logits(model), logits(tiny_model("llama")), rtol=0, atol=0)  # inactive
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    if prefixed:
        assert len(fastlora.patch(model, strict=True).patched) == 4

    again = from_peft(tmp_path / "b", init_lora_weights="gaussian")
    fastlora.load_adapter(model, tmp_path / "b", "second")  # overwrites
    torch.testing.assert_close(logits(model), logits(again), rtol=0, atol=1e-6)
    shutil.rmtree(tmp_path / "b")
    from_peft(tmp_path / "b", target_modules=["k_proj"], r=3)
    path = tmp_path / "c" / "adapter_model.safetensors"
    shutil.copytree(tmp_path / "b", path.parent)
    tensors = safetensors.torch.load_file(path)
    tensors.popitem()
    safetensors.torch.save_file(tensors, path)
    classes = [type(module) for module in model.modules()]
    for folder, name in (("b", "second"), ("c", "third")):  # other layers; a new adapter, some of which is missing
        with pytest.raises(ValueError, match="does not fit this model: keys or shapes differ"):
            fastlora.load_adapter(model, tmp_path / folder, name)
        assert [type(module) for module in model.modules()] == classes and "third" not in model.peft_config
    fastlora.load_adapter(model, tmp_path / "b", "third")
