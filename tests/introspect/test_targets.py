"""Which modules fastlora.patch selects, compared with PEFT itself, and which of these it leaves alone."""

from __future__ import annotations

import copy
from typing import Any, cast

import peft
import pytest
import torch
from model_state import ModelState
from plain_models import Net
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor, nn
from torch.nn.utils import prune

import fastlora

# Which modules are targets: PEFT's meaning of the names.


def peft_choice(model: nn.Module, **config: Any) -> list[str]:
    """The modules that PEFT itself gives an adapter, on a copy."""
    adapted: Any = peft.get_peft_model(cast(Any, copy.deepcopy(model)), peft.LoraConfig(r=2, **config)).base_model.model
    return [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)]


SELECTIONS = [
    {"target_modules": ["up"]},
    {"target_modules": ["up", "conv"]},
    {"target_modules": ["0.up", "blocks.1.down"]},
    {"target_modules": ["head"]},
    {"target_modules": ("blocks.0.up", "head")},
    {"target_modules": {"down"}},
    {"target_modules": ["n", "own", "up"]},
    {"target_modules": r"blocks\.\d+\.(up|down)"},
    {"target_modules": r".*\.1\..*(up|conv)"},
    {"target_modules": r".*p"},
    {"target_modules": "head"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR", "exclude_modules": ["conv"]},
    {"target_modules": ["up", "down"], "exclude_modules": ["blocks.0.up"]},
    {"target_modules": ["up", "down"], "exclude_modules": ["0.up", "1.down"]},
    {"target_modules": ["up", "down"], "exclude_modules": r"blocks\.1.*"},
    {"target_modules": "all-linear", "exclude_modules": r"blocks"},
]


@pytest.mark.filterwarnings("ignore:.*no module is called 'n', 'own':UserWarning")
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: " - ".join(map(str, s.values())))
def test_target_modules_mean_what_they_mean_in_peft(selection):
    model = Net()
    in_peft = {key: list(value) if isinstance(value, tuple) else value for key, value in selection.items()}
    expected = peft_choice(model, **in_peft)
    assert expected
    assert fastlora.patch(model, r=2, **selection).patched == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_is_peft_s_choice(architecture):
    model = tiny_model(architecture)
    task = {"task_type": "SEQ_CLS"} if architecture == "bert-classifier" else {}
    expected = peft_choice(model, target_modules="all-linear", **task)
    report = fastlora.patch(model, r=2)
    assert report.patched == expected
    heads = {"llama": "lm_head", "qwen3": "lm_head", "gpt2": "lm_head", "t5": "lm_head"}
    heads |= {"bert": "cls.predictions.decoder", "bert-classifier": "classifier"}
    assert list(report.left_alone) == [heads[architecture]] if architecture in heads else not report.left_alone
    assert all("head" in reason for reason in report.left_alone.values())


@pytest.mark.parametrize(
    "architecture, targets",
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", r".*\.1\.mlp\..*_proj"),
        ("gpt2", ["c_attn"]),
        ("t5", ["q", "v", "wo"]),
    ],
)
def test_named_targets_of_transformers_models_are_peft_s_choice(architecture, targets):
    model = tiny_model(architecture)
    assert fastlora.patch(model, target_modules=targets).patched == peft_choice(model, target_modules=targets)


def test_the_head_is_patched_where_it_is_named():
    model = tiny_model("llama")
    assert fastlora.patch(model, target_modules=["lm_head"]).patched == ["lm_head"]


def test_a_target_that_names_nothing_is_warned_of():
    model = Net()
    with pytest.warns(UserWarning, match="no module is called 'typo'"):
        report = fastlora.patch(model, target_modules=["up", "typo"])
    assert report.patched == ["blocks.0.up", "blocks.1.up"]


# Layers that are not what they seem.


class OwnLinear(nn.Linear):
    """A user's subclass, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def odd_layer(kind: str) -> nn.Module:
    linear = nn.Linear(6, 6)
    if kind == "subclass":
        return OwnLinear(6, 6)
    if kind == "weight_norm (old)":
        return torch.nn.utils.weight_norm(linear)
    if kind == "weight_norm":
        return torch.nn.utils.parametrizations.weight_norm(linear)
    if kind == "spectral_norm":
        return torch.nn.utils.spectral_norm(linear)
    if kind == "pruned":
        return prune.l1_unstructured(linear, "weight", amount=0.5)
    if kind == "own forward":
        forward = linear.forward
        cast(Any, linear).forward = lambda x: forward(x) + 1
    if kind == "int8":
        linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    if kind == "fp8":
        linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    if kind == "empty":
        linear.weight = nn.Parameter(torch.empty(0))
    if kind == "parameter subclass":
        linear.weight = type("ShardedParameter", (nn.Parameter,), {})(linear.weight.detach())
    return linear


ODD_LAYERS = {
    "subclass": "OwnLinear is a subclass of nn.Linear",
    "weight_norm (old)": "computed by a hook",
    "weight_norm": "ParametrizedLinear is a subclass",
    "spectral_norm": "computed by a hook",
    "pruned": "computed by a hook",
    "own forward": "forward was replaced",
    "int8": "dtype torch.int8",
    "fp8": "dtype torch.float8_e4m3fn",
    "empty": "weight is empty",
    "parameter subclass": "weight is a ShardedParameter",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ODD_LAYERS)
def test_layers_that_would_compute_something_else_are_left_alone(kind):
    model = nn.Sequential(nn.Linear(6, 6), odd_layer(kind)).eval()
    x = torch.randn(3, 6)
    runs = kind not in ("int8", "fp8", "empty")
    expected = model(x) if runs else None
    before, own = ModelState(model), ModelState(model[1])
    report = fastlora.patch(model)
    assert report.patched == ["0"] and list(report.left_alone) == ["1"]
    assert ODD_LAYERS[kind] in report.left_alone["1"]
    own.assert_unchanged(but_frozen=True)
    fastlora.unpatch(model)
    before.assert_unchanged()
    with pytest.raises(ValueError, match="strict=True, and '1' cannot be patched") as error:
        fastlora.patch(model, strict=True)
    assert ODD_LAYERS[kind] in str(error.value)
    before.assert_unchanged()
    fastlora.patch(model)
    if runs:
        torch.testing.assert_close(model(x), expected)


def test_multi_head_attention_keeps_its_output_projection():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    expected = model(x)
    report = fastlora.patch(model)
    assert report.patched == ["linear1", "linear2"]
    assert "MultiheadAttention" in report.left_alone["self_attn.out_proj"]
    torch.testing.assert_close(model(x), expected)
