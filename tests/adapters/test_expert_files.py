"""Experts' adapters on disk: PEFT loads and merges ours, ours are PEFT's, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from mixtures import experts_in, mixture, peft_mixture, randomise, tokens

import fastlora
from fastlora.introspect.targets import lora_layers


def patched(family: str = "qwen3_moe", **settings: Any) -> tuple[Any, Any]:
    base = mixture(family)
    model = copy.deepcopy(base)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj"], "target_parameters": experts_in(base)} | settings
    fastlora.patch(model, **settings)
    randomise(model)
    return base, model


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3_moe", {"rank_pattern": {"gate_up_proj": 2}, "use_rslora": True}),
        ("gpt_oss", {"target_modules": []}),
        ("nemotron_h", {"rank_per_token": True}),
        ("mixtral", {"target_parameters": ["experts.down_proj"], "target_modules": []}),
        ("deepseek_v3", {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}),
    ],
)
def test_peft_loads_and_merges_ours(tmp_path, family, settings):
    base, model = patched(family, **settings)
    x = tokens()
    want = model(x).logits
    fastlora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(loaded(x).logits, want, atol=1e-5) and not torch.allclose(base(x).logits, want, atol=1e-2)
    assert torch.allclose(loaded.merge_and_unload()(x).logits, want, atol=1e-4)
    again = copy.deepcopy(base)
    fastlora.load_adapter(again, tmp_path)
    assert torch.equal(again(x).logits, want)
    randomise(again, seed=9)
    fastlora.load_adapter(again, tmp_path)
    assert torch.equal(again(x).logits, want)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_ours_are_pefts_own_files(tmp_path, family):
    base = mixture(family)
    eager = peft_mixture(base, target_modules=["o_proj"])
    eager.save_pretrained(tmp_path / "peft")
    x = tokens()
    want = eager(x).logits
    model = copy.deepcopy(base)
    fastlora.load_adapter(model, tmp_path / "peft")
    assert torch.allclose(model(x).logits, want, atol=1e-5)
    fastlora.save_adapter(model, tmp_path / "ours")
    files = [safetensors.torch.load_file(tmp_path / made / "adapter_model.safetensors") for made in ("peft", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    fastlora.patch(eager)
    fastlora.save_adapter(eager, tmp_path / "in place")
    in_place = safetensors.torch.load_file(tmp_path / "in place" / "adapter_model.safetensors")
    assert in_place.keys() == files[0].keys() and all(torch.equal(files[0][key], in_place[key]) for key in in_place)


def test_a_second_adapter_is_added_inactive_and_taken_back_where_the_file_does_not_fit(tmp_path):
    _, model = patched()
    x = tokens()
    want = model(x).logits
    fastlora.save_adapter(model, tmp_path)
    fastlora.load_adapter(model, tmp_path, adapter_name="b")
    randomise(model, seed=7)
    fastlora.set_adapter(model, "b")
    assert torch.equal(model(x).logits, want)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        (
            {"r": 2},
            r"'model.layers.0.mlp.experts.gate_up_proj': .* have rank 12 and 12, .* says 2 for each of 4 experts",
        ),
        ({"target_parameters": ["experts.gone"]}, "target_parameters: no parameter is called 'experts.gone'"),
        ({"target_parameters": ["experts.down_proj"]}, "'model.layers.0.mlp.experts.base_layer': .* have rank"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        plain = mixture("qwen3_moe")
        with pytest.raises(ValueError, match=f"load_adapter: .*{message}"):
            fastlora.load_adapter(plain, tmp_path)
        assert not list(lora_layers(plain))


def test_dropout_is_said_to_be_left_out(tmp_path):
    _, model = patched(lora_dropout=0.1)
    with pytest.warns(
        UserWarning, match=r"lora_dropout 0.1, and PEFT reads no file with target_parameters and dropout"
    ):
        fastlora.save_adapter(model, tmp_path)
    assert json.loads((Path(tmp_path) / "adapter_config.json").read_text())["lora_dropout"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.load_adapter(mixture("qwen3_moe"), tmp_path)
