"""patch's rank_pattern and alpha_pattern: PEFT's meaning, and through the adapter's files."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from model_state import ModelState
from plain_models import Net
from tiny_models import tiny_model

import fastlora
from fastlora import FusedLoraLinear

PATTERNS: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 2, r"^model.layers.1.mlp.*": 5}, "alpha_pattern": {"mlp.up_proj": 7, "q_proj": 3.5}},
    {"rank_pattern": {r".*\.1\..*_proj": 1, "k_proj": 6}, "use_rslora": True},
]


def adapters(model: Any) -> dict[str, FusedLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)}


@pytest.mark.parametrize("options", PATTERNS, ids=["names", "expressions"])
def test_patterns_mean_what_they_mean_in_peft(options):
    model: Any = tiny_model("llama")
    fastlora.patch(model, r=4, lora_alpha=8, **options)
    theirs = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options),
    )
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    assert list(adapters(model)) == list(layers) and len({layer.r["default"] for layer in layers.values()}) > 1
    for name, layer in adapters(model).items():
        assert layer.r == layers[name].r
        assert layer.scaling["default"] == pytest.approx(layers[name].scaling["default"])
        assert layer.lora_A["default"].shape == layers[name].lora_A["default"].weight.shape
        assert layer.lora_B["default"].shape == layers[name].lora_B["default"].weight.shape


def test_the_report_tells_the_ranks_and_patching_again_does_nothing():
    model, options = Net(), {"r": 4, "rank_pattern": {"blocks.0.up": 2}, "alpha_pattern": {"head": 4}}
    report = fastlora.patch(model, **options)  # type: ignore[arg-type]
    lines = {line.name: line.reason for line in report.modules}
    assert lines["blocks.0.up"] == "adapter 'default', r=2" and lines["blocks.1.up"] == "adapter 'default', r=4"
    state = ModelState(model)
    again = fastlora.patch(model, **options)  # type: ignore[arg-type]
    assert {line.reason for line in again.modules} == {"adapter 'default' was there already"}
    state.assert_unchanged()
    with pytest.raises(ValueError, match=r"patch: r: got 4, but 'blocks\.0\.up' already has .* with r=2"):
        fastlora.patch(model, r=4, alpha_pattern={"head": 4})
    head: Any = model.head
    assert head.scaling == {"default": 4 / 4} and head.r == {"default": 4}


def test_patterns_without_a_target():
    model = Net()
    with pytest.raises(ValueError, match=r"rank_pattern: no target matches 'heads' \(strict=True\)"):
        fastlora.patch(model, target_modules=["head", "up"], rank_pattern={"heads": 2}, strict=True)
    with pytest.warns(UserWarning, match=r"patch: alpha_pattern: no target matches 'down'"):
        fastlora.patch(model, target_modules=["head"], alpha_pattern={"down": 2})
    adapted = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["head"]))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"rank_pattern=\{'head': 2\} had no effect"):
        fastlora.patch(adapted, rank_pattern={"head": 2})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank_pattern": {"head": 0}}, r"patch: rank_pattern\['head'\]: r: got 0, want an integer of at least 1"),
        ({"rank_pattern": {"head": 2.0}}, r"patch: rank_pattern\['head'\]: r: got 2.0"),
        (
            {"alpha_pattern": {"head": "8"}},
            r"patch: alpha_pattern\['head'\]: lora_alpha: got '8', want a finite number",
        ),
        ({"rank_pattern": {"(": 2}}, r"patch: rank_pattern: got '\(', want a regular expression"),
        ({"rank_pattern": {3: 2}}, "patch: rank_pattern: got 3, want a regular expression"),
        ({"rank_pattern": ["head"]}, r"patch: rank_pattern: got \['head'\], want a dict"),
    ],
)
def test_wrong_patterns(options, message):
    model = Net()
    state = ModelState(model)
    with pytest.raises(ValueError, match=message):
        fastlora.patch(model, **options)
    state.assert_unchanged()


def test_a_loaded_adapter_waits_in_layers_that_have_none_left(tmp_path):
    """Whichever its rank there: `set_adapter` chooses it, not `load_adapter`."""
    saved, model, x = Net(), Net(), torch.randn(3, 6)
    fastlora.patch(saved, r=4, rank_pattern={"head": 2}, init_lora_weights=False)
    fastlora.save_adapter(saved, tmp_path)
    fastlora.patch(model, r=3, init_lora_weights=False)
    waiting = [adapters(model)[name] for name in ("head", "blocks.0.up")]
    for layer in waiting:
        layer.delete_adapter("default")
    expected = model(x)
    fastlora.load_adapter(model, tmp_path, "second")
    assert torch.equal(model(x), expected)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    assert all(layer.active_adapters == [] for layer in waiting)
    assert [layer.r for layer in waiting] == [{"second": 2}, {"second": 4}]
    fastlora.set_adapter(model, "second")
    for name, layer in adapters(model).items():
        assert torch.equal(layer.get_delta_weight("second"), adapters(saved)[name].get_delta_weight("default"))
