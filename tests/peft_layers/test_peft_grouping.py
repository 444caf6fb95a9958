# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# Attributes of modules are typed as tensors or modules; these tests know which they made.
"""Groups of PEFT's layers, run fused in place: the numbers of the same model unpatched, whatever is done in between."""

import contextlib
import copy
import warnings

import peft
import pytest
import torch
from grouped_models import Attention, Block, Groups, K, at_every_size, counted_rounds, itself, randn, step
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.integrations.peft import starts as peft_starts
from fastlora.integrations.peft.lora import FusedPeftLinear
from fastlora.layers.group import dissolve_groups, watching

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

every_size = pytest.fixture(autouse=True)(at_every_size)
shrinks = pytest.fixture(counted_rounds)


def with_peft(module_class=Attention, dtype=torch.float64, second=False, **config):
    """A `PeftModel` whose adapters are not zero; with `second`, a waiting one called "b"."""
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": NAMES, "init_lora_weights": False, **config}
    model = peft.get_peft_model(module_class().to(dtype), peft.LoraConfig(**config))
    if second:
        model.add_adapter("b", peft.LoraConfig(**config | {"r": 3, "lora_alpha": 5}))
    return model


def pair(*args, group="auto", **settings):
    """The same model twice: PEFT's, and patched with groups."""
    plain = with_peft(*args, **settings)
    grouped = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.patch(grouped, group=group)
    return plain, grouped


def inner(model):
    return model.base_model.model


def test_the_report():
    model = with_peft(Block)
    prefix = "base_model.model."
    qkv = tuple(f"{prefix}attn.{name}" for name in NAMES[:3])
    report = fastlora.patch(model, group="auto")
    assert report.groups == [(prefix + "gate_proj", prefix + "up_proj"), qkv]
    assert "2 groups" in str(report)
    seat = inner(model).attn.q_proj.group
    assert fastlora.patch(model, group="auto").groups == [] and inner(model).attn.q_proj.group is seat
    assert fastlora.patch(with_peft(Block)).groups == []
    chosen = fastlora.patch(with_peft(), group=[("k_proj", "v_proj")]).groups
    assert chosen == [(prefix + "k_proj", prefix + "v_proj")]
    assert fastlora.patch(with_peft(), target_modules=["q_proj", "o_proj"], group="auto").groups == []


STATES = {
    "eval with dropout": ({"lora_dropout": 0.5}, [3]),
    "merged": ({}, []),
    "disabled": ({}, []),
    "lora_bias": ({"lora_bias": True}, [3]),
    "rank-stabilised, no base bias": ({"use_rslora": True}, [3]),
    "LoRA-GA's start": ({}, [3]),
    "one with DoRA": ({}, [2]),
    "a batch that mixes adapters": ({"second": True}, []),
}


class TestPeft(Groups):
    def pair(self, module_class=Attention, dtype=torch.float64, dropout=0.0):
        return pair(module_class, dtype, lora_dropout=dropout)

    def inner(self, model):
        return inner(model)

    def fuse(self, model):
        fastlora.patch(model)

    def undrop(self, layer):
        layer.lora_dropout["default"] = nn.Identity()

    def test_calls_are_counted(self):
        _, grouped = self.pair(Block)
        step(grouped)
        layers = [module for module in grouped.modules() if isinstance(module, FusedPeftLinear)]
        assert len(layers) == 7 and all(layer.calls.fused == 1 and not layer.calls.fallback for layer in layers)

    @pytest.mark.parametrize("change", ["switched", "both", "deleted", "added", "scaled", "merged and unmerged"])
    def test_the_model_changed_between_calls(self, change, shrinks):
        plain, grouped = pair(second=True)
        self.check((plain, grouped), itself, [3], shrinks)
        for model in (plain, grouped):
            if change == "switched":
                model.set_adapter("b")
            elif change == "both":
                model.base_model.set_adapter(["default", "b"])
            elif change == "deleted":
                model.set_adapter("b")
                model.delete_adapter("default")
            elif change == "added":
                torch.manual_seed(4)
                config = peft.LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False)
                model.add_adapter("c", config)
                model.set_adapter("c")
            elif change == "scaled":
                inner(model).k_proj.set_scale("default", 3.0)
            else:
                model.merge_adapter()
                model(randn(3, K))
                model.unmerge_adapter()
        self.check((plain, grouped), itself, [3], shrinks)

    @pytest.mark.parametrize("state", STATES)
    def test_states_of_the_whole_model(self, state, shrinks):
        settings, rounds = STATES[state]
        plain, grouped = pair(**settings)
        context = {}
        for model in (plain, grouped):
            context[id(inner(model))] = contextlib.nullcontext
            layer = inner(model).k_proj
            if state == "eval with dropout":
                model.eval()
            elif state == "merged":
                model.merge_adapter()
            elif state == "disabled":
                context[id(inner(model))] = model.disable_adapter
            elif state == "lora_bias":
                with torch.no_grad():
                    layer.lora_B["default"].bias.add_(0.3)
            elif state == "LoRA-GA's start":
                peft_starts.begin(layer.lora_A["default"], layer.lora_B["default"], randn(4, K), randn(8, 4), True)
            elif state == "one with DoRA":
                torch.manual_seed(2)
                dora = peft.LoraConfig(r=4, use_dora=True)
                layer.update_layer("default", r=4, lora_alpha=8, config=dora)

        def run(module):
            def forward(x):
                given = {"adapter_names": ["default", "b", "__base__"]} if "mixes" in state else {}
                with context[id(module)]():
                    return torch.cat([getattr(module, name)(x, **given) for name in NAMES[:3]], -1)

            return forward

        self.check((plain, grouped), run, rounds, shrinks)
        self.check((plain, grouped), run, rounds, shrinks)

    def test_conv1d(self, shrinks):
        class Gpt(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k = Conv1D(16, K), Conv1D(8, K)

            def forward(self, x):
                return torch.cat((self.q(x), self.k(x)), -1)

        plain, grouped = pair(Gpt, target_modules=["q", "k"], fan_in_fan_out=True)
        self.check((plain, grouped), itself, [2], shrinks)

    def test_watching_and_dissolving(self, shrinks):
        plain, grouped = pair(group=None)
        with watching(grouped) as groups, torch.no_grad():
            grouped(randn(3, K))
        assert groups == [tuple(f"base_model.model.{name}" for name in NAMES[:3])]
        self.check((plain, grouped), itself, [3], shrinks)
        dissolve_groups(grouped)
        self.check((plain, grouped), itself, [], shrinks)

    def test_layers_that_a_later_adapter_brings_join_when_patched_again(self, shrinks):
        plain, grouped = pair(target_modules=["q_proj"])
        for model in (plain, grouped):
            torch.manual_seed(5)
            model.add_adapter("b", peft.LoraConfig(r=2, target_modules=NAMES[:3], init_lora_weights=False))
            model.set_adapter("b")
        self.check((plain, grouped), itself, [], shrinks)
        assert len(fastlora.patch(grouped, group="auto").groups) == 1
        self.check((plain, grouped), itself, [3], shrinks)


def test_unpatch_is_exact_and_patching_again_without_groups_has_none():
    plain, grouped = pair(Block)
    fastlora.unpatch(grouped)
    kept = {name: module.__dict__.keys() for name, module in plain.named_modules()}
    assert {name: module.__dict__.keys() for name, module in grouped.named_modules()} == kept
    assert {name: type(module) for name, module in grouped.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    fastlora.patch(grouped)
    assert inner(grouped).attn.q_proj.group is None
