# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# Attributes of modules are typed as tensors or modules; these tests know which they made.
"""Groups of PEFT's layers, run fused in place: the numbers of the same model unpatched, whatever is done in between."""

import contextlib
import copy
import warnings

import peft
import pytest
import torch
from grouped_models import CALLS, SURROUNDINGS, Attention, Block, K, around_one, counted_rounds, randn, step
from problems import path
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.integrations.peft import starts as peft_starts
from fastlora.integrations.peft.lora import FusedPeftLinear
from fastlora.layers import group as grouping
from fastlora.layers.group import dissolve_groups, watching

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def groups_of_every_size():
    with path("function"):
        yield
    grouping._here.round = None


@pytest.fixture
def shrinks(monkeypatch):
    return counted_rounds(monkeypatch)


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


def assert_as_peft(plain, grouped, run, rounds, shrinks, **options):
    """`run(model)` gives a function of x; `rounds`: how many members are in each round of the grouped model."""
    want = step(plain, run(inner(plain)), **options)
    shrinks.clear()
    got = step(grouped, run(inner(grouped)), **options)
    assert shrinks == rounds
    torch.testing.assert_close(got, want)


def assert_near(got, want, tolerance):
    """Each within this relative error, in the norm: some of their numbers went through bfloat16."""
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and (one - other).norm() <= tolerance * other.norm()


def itself(model):
    return model


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


def test_the_kernels_are_those_of_the_group_and_calls_are_counted(shrinks):
    plain, grouped = pair(Block)
    assert_as_peft(plain, grouped, itself, [3, 2], shrinks)
    layers = [module for module in grouped.modules() if isinstance(module, FusedPeftLinear)]
    assert len(layers) == 7 and all(layer.calls.fused == 1 and not layer.calls.fallback for layer in layers)
    y = inner(grouped).attn.q_proj(randn(3, K).requires_grad_())
    assert type(y.grad_fn).__name__ == "GroupMemberBackward"


@pytest.mark.parametrize("name", CALLS)
def test_what_models_do(name, shrinks):
    run, rounds = CALLS[name]
    assert_as_peft(*pair(), run, rounds, shrinks)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings_in_between(name, shrinks):
    autocast = "autocast" in name
    plain, grouped = pair(dtype=torch.float32 if autocast else torch.float64)
    x = randn(3, 5, K).to(inner(plain).q_proj.weight.dtype)
    want, got = (step(m, SURROUNDINGS[name](inner(m)), x=x.clone()) for m in (plain, grouped))
    assert_near(got, want, 2e-2 if autocast else 1e-12)
    assert len(shrinks) >= 2


def _in_place(factor):
    def change(layer):
        with torch.no_grad():
            factor(layer).mul_(2)

    return change


def _data_swapped(layer):
    weight = layer.lora_A["default"].weight
    weight.data = weight.data * 2


def _new_parameter(layer):
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach() * 2)


def _if_fused(change):
    return lambda layer: change(layer) if isinstance(layer, FusedPeftLinear) else None


@pytest.mark.parametrize("change", ["switched", "both", "deleted", "added", "scaled", "merged and unmerged"])
def test_the_model_changed_between_calls(change, shrinks):
    plain, grouped = pair(second=True)
    assert_as_peft(plain, grouped, itself, [3], shrinks)
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
    assert_as_peft(plain, grouped, itself, [3], shrinks)


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


@pytest.mark.parametrize("state", STATES)
def test_states_of_the_whole_model(state, shrinks):
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

    assert_as_peft(plain, grouped, run, rounds, shrinks)
    assert_as_peft(plain, grouped, run, rounds, shrinks)


def test_dropout_on_a_cpu_draws_what_it_draws_alone(shrinks):
    plain, grouped = pair(Block, lora_dropout=0.5)
    assert_as_peft(plain, grouped, itself, [], shrinks)
    for model in (plain, grouped):
        for layer in (inner(model).attn.k_proj, inner(model).attn.v_proj):
            layer.lora_dropout["default"] = nn.Identity()
    assert_as_peft(plain, grouped, itself, [2], shrinks)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_a_block(reentrant, dropout):
    plain, grouped = pair(Block, lora_dropout=dropout)
    for model in (plain, grouped):
        for layer in (inner(model).gate_proj, inner(model).up_proj):
            layer.lora_dropout["default"] = nn.Identity()
    run = lambda module: lambda x: checkpoint(module, x, use_reentrant=reentrant)  # noqa: E731
    once = step(grouped)
    for want, got in zip(once, step(grouped, run(inner(grouped))), strict=True):
        assert torch.equal(want, got)
    torch.testing.assert_close(once, step(plain, run(inner(plain))))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_checkpointing_one_member(reentrant, name):
    plain, grouped = pair()
    run = around_one(name, reentrant)
    for _ in range(2):
        torch.testing.assert_close(step(grouped, run(inner(grouped))), step(plain, run(inner(plain))))


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


def test_compile_and_inference_mode_run_one_by_one(shrinks):
    plain, grouped = pair()
    compiled = torch.compile(inner(grouped), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(grouped, compiled), step(plain))
    with torch.inference_mode():
        torch.testing.assert_close(grouped(randn(3, K)), plain(randn(3, K)))
    assert shrinks == []
    with torch.no_grad():
        torch.testing.assert_close(grouped(randn(3, K)), plain(randn(3, K)))
    assert shrinks == [3]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_with_float32_adapters(autocast, shrinks):
    alone, grouped = pair(dtype=torch.bfloat16)
    fastlora.patch(alone)
    x = randn(3, 5, K).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        got, want = step(grouped, x=x.clone()), step(alone, x=x.clone())
    assert shrinks == [3]
    assert_near(got, want, 2e-2)


def test_conv1d(shrinks):
    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = Conv1D(16, K), Conv1D(8, K)

        def forward(self, x):
            return torch.cat((self.q(x), self.k(x)), -1)

    plain, grouped = pair(Gpt, target_modules=["q", "k"], fan_in_fan_out=True)
    assert_as_peft(plain, grouped, itself, [2], shrinks)


def test_watching_and_dissolving(shrinks):
    plain, grouped = pair(group=None)
    with watching(grouped) as groups, torch.no_grad():
        grouped(randn(3, K))
    assert groups == [tuple(f"base_model.model.{name}" for name in NAMES[:3])]
    assert_as_peft(plain, grouped, itself, [3], shrinks)
    dissolve_groups(grouped)
    assert_as_peft(plain, grouped, itself, [], shrinks)


def test_layers_that_a_later_adapter_brings_join_when_patched_again(shrinks):
    plain, grouped = pair(target_modules=["q_proj"])
    for model in (plain, grouped):
        torch.manual_seed(5)
        model.add_adapter("b", peft.LoraConfig(r=2, target_modules=NAMES[:3], init_lora_weights=False))
        model.set_adapter("b")
    assert_as_peft(plain, grouped, itself, [], shrinks)
    assert len(fastlora.patch(grouped, group="auto").groups) == 1
    assert_as_peft(plain, grouped, itself, [3], shrinks)
