"""`target_parameters`: what is chosen, with which rank, and what is refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from mixtures import experts_in, mixture
from torch import nn

import fastlora
from fastlora.introspect.targets import lora_layers

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def ranks(model: nn.Module) -> set[tuple[int, float, float]]:
    return {
        (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) for _, layer in lora_layers(model)
    }


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"r": 6}, {(6, 16, 16 / 6)}),
        ({"r": 6, "rank_per_token": True}, {(3, 8, 16 / 6)}),  # two experts a token
        ({"r": 4, "rank_per_token": True, "use_rslora": True}, {(2, 16 / 2**0.5, 8)}),
        ({"r": 1, "rank_per_token": True}, {(1, 16, 16)}),
        ({"r": 6, "rank_per_token": True, "rank_pattern": {"down_proj": 5}}, {(3, 8, 16 / 6), (5, 16, 16 / 5)}),
    ],
)
def test_ranks_and_scales(settings, wanted):
    model = mixture("qwen3_moe")
    fastlora.patch(model, target_modules=[], target_parameters=BOTH, **settings)
    assert {tuple(round(number, 9) for number in found) for found in ranks(model)} == {
        tuple(round(number, 9) for number in found) for found in wanted
    }


def test_the_report_has_a_line_for_each_weight_and_names_match_as_in_peft():
    for targets in (BOTH, ["experts.down_proj"], ["model.layers.1.mlp.experts.gate_up_proj"]):
        model = mixture("qwen3_moe")
        report = fastlora.patch(model, r=2, target_modules=["q_proj"], target_parameters=targets)
        experts = [name for name in report.patched if "experts" in name]
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
        reference = peft.get_peft_model(mixture("qwen3_moe"), config)
        trained = sum(p.numel() for p in reference.parameters() if p.requires_grad)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
        assert len(experts) == len([name for name, layer in lora_layers(reference) if "experts" in name])
        assert {name for name, _ in lora_layers(model)} == set(report.patched)
        assert f"{experts[0]}" in report.table() and "adapter 'default', r=2 of each of 4 experts" in report.summary
        assert (
            fastlora.patch(model, r=2, target_modules=["q_proj"], target_parameters=targets).patched == report.patched
        )


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no such name": (
        {"target_parameters": ["experts.gate_proj"]},
        r"target_parameters: no parameter is called 'experts.gate_proj' .* mlp.exp",
    ),
    "one string": (
        {"target_parameters": "experts.down_proj"},
        "target_parameters: got 'experts.down_proj', want a list",
    ),
    "no experts": ({"target_parameters": ["norm.weight"], "target_modules": [], "strict": True}, "it has 1 dimensions"),
    "rank": ({"target_parameters": BOTH, "r": 17}, "r: got 17 for .* want at most 16, the smaller side .* 24×16"),
    "DoRA": ({"target_parameters": BOTH, "use_dora": True}, "use_dora: got True with target_parameters"),
    "AdaLoRA": ({"target_parameters": BOTH, "use_adalora": True}, "use_adalora: got True with target_parameters"),
    "PiSSA": (
        {"target_parameters": BOTH, "init_lora_weights": "pissa"},
        "init_lora_weights: got .pissa., .* experts want True",
    ),
    "flag": ({"target_parameters": BOTH, "rank_per_token": 2}, "rank_per_token: got 2, want True or False"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_leaves_the_model_as_it_was(case):
    settings, message = CASES[case]
    model = mixture("qwen3_moe")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"patch: {message}" if case != "no experts" else message):
        fastlora.patch(model, **settings)
    assert [type(module) for module in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_adapted_is_left_alone_with_the_reason():
    class Quantised(nn.Parameter):
        pass

    model = mixture("qwen3_moe")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    first._parameters["down_proj"] = Quantised(first.down_proj.detach())
    second._is_expert_parallel = True
    with pytest.warns(UserWarning, match="3 of the targets were left"):
        report = fastlora.patch(model, target_modules=[], target_parameters=BOTH)
    assert report.patched == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert "Quantised of torch.float32, quantised or sharded" in report.refused["model.layers.0.mlp.experts.down_proj"]
    assert "expert parallel" in report.refused["model.layers.1.mlp.experts.down_proj"]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 4, 5))
            self.proj = nn.Linear(4, 4)

    with pytest.warns(UserWarning, match="Own is not run by transformers' experts interface"):
        fastlora.patch(Own(), target_parameters=["down_proj"])
    with pytest.raises(ValueError, match="selects nothing that can be patched"):
        fastlora.patch(Own(), target_modules=[], target_parameters=["down_proj"])


def test_the_remedy_for_experts_that_were_not_asked_for():
    model = mixture("gpt_oss")
    left = fastlora.patch(model).left_alone
    assert (
        left["model.layers.0.mlp.experts.down_proj"] == "experts: target_parameters=['experts.down_proj'] adapts them"
    )
    assert experts_in(model) == sorted(BOTH)
