"""PEFT's AdaLoRA models: patched against the same model unpatched; PEFT's allocator beside ours."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from adalora_problem import NAMES, TARGET, R, loss_of, optimizer_of, plain
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.adalora.model import AdaLoraModel
from peft_problems import (
    K,
    Mlp,
    N,
    adalora_config,
    adalora_model,
    assert_agree,
    assert_within_twice_in_bf16,
    counts,
    fused_layers,
    patched_copy,
)
from torch import nn

import fastlora
from fastlora.integrations.peft import adopt as peft_adopt
from fastlora.integrations.peft.tuner import FusedAdaLoraModel
from fastlora.ops import call
from fastlora.variants import RankAllocator

STEPS = 12


def test_float32_adapters_on_a_bf16_base_and_under_autocast():
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = adalora_model(Mlp(dtype=dtype))
        fused = patched_copy(model)
        grads = assert_within_twice_in_bf16(model, fused, torch.randn(64, K, dtype=dtype), autocast)
        assert counts(fused) == [1, 1]
        assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_disabled_merged_absent_and_changed_adapters():
    model = adalora_model()
    fused = patched_copy(model)
    x = torch.randn(4, K)
    with fused.disable_adapter(), model.disable_adapter():
        assert torch.equal(fused(x), model(x))
    assert counts(fused, "base") == [1, 1]
    want = fused(x)
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-6)
    fused.unmerge_adapter()
    for change in (
        lambda m: m.base_model.model.up.scaling.update(default=3.0),
        lambda m: m.base_model.model.up.ranknum["default"].data.fill_(2.0),
        lambda m: m.base_model.model.down.lora_E["default"].data.zero_(),
    ):
        for each in (model, fused):
            change(each)
        assert_agree(model, fused, x)
    assert not any(layer.calls.fallback for layer in fused_layers(fused))


def test_later_adapters_are_picked_up(tmp_path):
    """PEFT trains one AdaLoRA adapter; others may be loaded, also into modules that had none."""
    wide = adalora_model(seed=5)
    wide.save_pretrained(tmp_path)
    model = adalora_model(target_modules=["up"])
    fused = patched_copy(model)
    assert type(fused.base_model) is FusedAdaLoraModel and isinstance(fused.base_model, AdaLoraModel)
    for each in (model, fused):
        each.load_adapter(tmp_path, "wide")
        each.set_adapter("wide")
    x = torch.randn(5, K)
    assert_agree(model, fused, x)
    assert counts(fused) == [1, 1]
    for each in (model, fused):
        each.base_model.set_adapter(["default", "wide"])
    assert_agree(model, fused, x)
    fastlora.unpatch(fused)
    assert type(fused.base_model) is AdaLoraModel and not fused_layers(fused)


def test_sequences_with_adapters_of_their_own(tmp_path):
    """PEFT's own layer has no such batches."""
    adalora_model(seed=5).save_pretrained(tmp_path)
    fused = patched_copy(adalora_model()).eval()
    fused.load_adapter(tmp_path, "other")
    x, names = torch.randn(3, 5, K), ["default", "__base__", "other"]
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with fused.disable_adapter():
                rows.append(fused(x[i : i + 1]))
        else:
            fused.set_adapter(name)
            rows.append(fused(x[i : i + 1]))
    torch.testing.assert_close(fused(x, adapter_names=names), torch.cat(rows), rtol=1e-5, atol=1e-6)
    with fastlora.adapter_names(fused, names):
        torch.testing.assert_close(fused(x), torch.cat(rows), rtol=1e-5, atol=1e-6)


def test_layers_that_share_an_input_are_grouped(monkeypatch):
    from fastlora.ops.group import group as group_op

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, N) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)

    monkeypatch.setattr(group_op, "SMALL", 0)
    monkeypatch.setattr(call, "SMALL", 0)
    opened = []
    original = group_op.open_group
    monkeypatch.setattr(group_op, "open_group", lambda x, ms, *a: opened.append(len(ms)) or original(x, ms, *a))
    names = ["q_proj", "k_proj", "v_proj"]
    model = adalora_model(Attention(), target_modules=names)
    fused = copy.deepcopy(model)
    report = fastlora.patch(fused, group="auto")
    assert report.groups == [tuple(f"base_model.model.{name}" for name in names)]
    assert_agree(model, fused, torch.randn(5, K))
    assert opened == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_same_bits_back(dtype):
    fused = patched_copy(adalora_model(Mlp(dtype=dtype)))
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    layer = fused.base_model.model.up
    fastlora.merge(fused)
    delta = (
        layer.lora_B["default"].double() @ (layer.lora_A["default"] * layer.lora_E["default"]).double() * 8 / 4.00001
    )
    wide = before["base_model.model.up.base_layer.weight"].double() + delta
    error = (layer.weight.double() - wide).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * 1.01 * wide.abs() + 1e-6).all()
    fastlora.unmerge(fused)
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())
    merged = patched_copy(fused)
    merged.merge_adapter()
    fastlora.unpatch(merged)  # as PEFT would have merged it
    fastlora.unpatch(fused)
    fused.merge_adapter()
    assert torch.equal(merged.base_model.model.up.weight, fused.base_model.model.up.weight)


def test_explain():
    fused = patched_copy(adalora_model())
    x = torch.randn(5, K)
    assert fastlora.explain(fused.base_model.model.up, x).forward == "torch"
    unpatched = fastlora.explain(adalora_model().base_model.model.up, x)
    assert unpatched.forward == "eager" and unpatched.needed == ("fastlora.patch(model)",)


# What is left to PEFT.
def test_what_is_left_to_peft_s_forward():
    for change, reason in (
        (lambda up: up.base_layer.register_forward_hook(lambda *_: None), "hooks on the base layer"),
        (lambda up: up.lora_dropout.__setitem__("default", nn.Sigmoid()), "lora_dropout is a Sigmoid"),
        (lambda up: up.lora_dropout["default"].register_forward_hook(lambda *_: None), "hooks on lora_dropout"),
        (lambda up: up.scaling.__setitem__("default", torch.tensor(2.0)), "scaling is a Tensor"),
        (
            lambda up: up.lora_B.__setitem__("default", nn.Parameter(up.lora_B["default"].data.double())),
            "adapter dtypes",
        ),
    ):
        model = adalora_model(lora_dropout=0.1)
        fused = patched_copy(model)
        for each in (model, fused):
            change(each.base_model.model.up)
        layer = fused.base_model.model.up
        assert reason in (peft_adopt.prediction(layer) or "")
        if "dtypes" not in reason:  # PEFT cannot multiply them
            assert_agree(model, fused, torch.randn(4, K))
            assert reason in layer.calls.last_reason and layer.calls.fused == 0
    layer = adalora_model().base_model.model.up
    layer.forward = lambda x: x
    assert "replaced on the instance" in (peft_adopt.unsupported(layer) or "")


def test_a_model_that_is_still_being_loaded_is_patched():
    """PEFT puts new adapters on the meta device first, but for ranknum."""
    fused: Any = peft.get_peft_model(Mlp(), adalora_config(inference_mode=True), "first", low_cpu_mem_usage=True)
    assert fused.base_model.model.up.lora_A["first"].is_meta
    report = fastlora.patch(fused)
    assert len(report.patched) == 2 and all("run fused" in line.reason for line in report.modules)


def test_convolutions_are_left_alone():
    model = adalora_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)), target_modules=["0", "2"])
    report = fastlora.patch(model)
    assert report.patched == ["base_model.model.2"]
    assert "adalora.layer.SVDConv2d: only" in report.left_alone["base_model.model.0"]


def test_ranks_of_zero_add_nothing():
    model = adalora_model()
    for name in ("lora_A", "lora_B", "lora_E"):
        factors = getattr(model.base_model.model.up, name)
        factors["default"] = nn.Parameter(
            factors["default"].data[:0] if name != "lora_B" else factors["default"].data[:, :0]
        )
    fused = patched_copy(model)
    with torch.no_grad():
        x = torch.randn(4, K)
        torch.testing.assert_close(fused(x), model(x))
    assert (counts(fused), counts(fused, "base")) == ([0, 1], [1, 0])


# PEFT's own allocation and ours.
def trained(model: Any, end_of_step: Any) -> list[float]:
    optimizer = optimizer_of(model)
    losses = []
    for step in range(1, STEPS + 1):
        loss = loss_of(model, step, gamma=0.0)
        loss.backward()
        optimizer.step()
        end_of_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_peft_s_allocator_goes_on_working_on_fused_layers(tmp_path):
    model = adalora_model(plain(), target_modules=NAMES, tinit=2, tfinal=3, init_lora_weights=True)
    fused = patched_copy(model)
    theirs = trained(model, model.base_model.update_and_allocate)
    ours = trained(fused, fused.base_model.update_and_allocate)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert fused.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    fused.save_pretrained(tmp_path)
    x = torch.randn(5, 6)
    again = peft.PeftModel.from_pretrained(plain(), tmp_path)
    fastlora.patch(again)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert {layer.r["default"] for layer in fused_layers(again)} != {R}


def test_same_scores_and_masks_as_peft_s_allocator():
    """As long as both do the same: no ties, before the last masks (PEFT's leave out the last step's gradients), called
    with t from 1 on."""
    model = adalora_model(plain(), target_modules=NAMES, init_lora_weights=True)
    ours = copy.deepcopy(model)
    theirs: PeftAllocator = model.base_model.rankallocator
    allocator = RankAllocator(ours, TARGET, STEPS)
    optimizers = [optimizer_of(model), optimizer_of(ours)]
    for step in range(1, STEPS):
        for each, optimizer in zip((model, ours), optimizers, strict=True):
            loss_of(each, step, gamma=0.0).backward()
            optimizer.step()
        model.base_model.update_and_allocate(step)
        allocator.step()
        budget, masks = theirs.budget_schedule(step)
        assert masks and budget == allocator.budget(step)
        for name, scores in allocator.scores.items():
            place = f"{name.removeprefix('base_model.model.')}.%s.default"
            element = {key: theirs._element_score(place % key) for key in ("lora_A", "lora_B", "lora_E")}
            want = element["lora_E"][:, 0] + element["lora_A"].mean(1) + element["lora_B"].mean(0)
            torch.testing.assert_close(scores, want, rtol=1e-4, atol=0.0)
        pattern = model.peft_config["default"].rank_pattern
        assert allocator.rank_pattern == {
            f"base_model.model.{key.removesuffix('.lora_E.default')}": kept for key, kept in pattern.items()
        }
        for optimizer in optimizers:
            optimizer.zero_grad()
    for (name, want), got in zip(model.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=name)


def test_where_peft_s_allocator_differs():
    """As docs/adalora.md says."""
    model = adalora_model(plain(), target_modules=NAMES, init_r=R, target_r=R)
    loss_of(model, 0, gamma=0.0).backward()
    with pytest.raises(RuntimeError, match="kthvalue"):  # no rank is to go
        model.base_model.update_and_allocate(1)
    model = adalora_model(plain(), target_modules=NAMES)
    with pytest.raises(TypeError):  # a parameter has no gradient
        model.base_model.update_and_allocate(1)
    model = adalora_model(plain(), target_modules=NAMES, total_step=1, target_r=1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.grad = torch.zeros_like(parameter)
    model.base_model.update_and_allocate(0)
    model.base_model.update_and_allocate(1)  # all scores are equal: all triplets go
    assert not any(any(kept) for kept in model.peft_config["default"].rank_pattern.values())
    allocator = RankAllocator(model, target_r=1, total_steps=1)
    allocator.step()
    assert sum(allocator.ranks.values()) == len(NAMES)


@pytest.mark.parametrize("patched", [False, True])
def test_our_allocator_and_penalty_on_peft_s_layers(patched):
    model = adalora_model(plain(), target_modules=NAMES, init_lora_weights=True)
    if patched:
        fastlora.patch(model)
    allocator = RankAllocator(model, TARGET, STEPS, t_final=4)
    optimizer = optimizer_of(model)
    allocator.follow(optimizer)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    assert allocator.is_final and set(allocator.ranks) == set(layers)
    kept = {name: [e != 0 for e in layer.lora_E["default"].flatten().tolist()] for name, layer in layers.items()}
    assert kept == allocator.rank_pattern and sum(map(sum, kept.values())) == TARGET * len(NAMES)


def test_lora_ga_and_the_monitor_are_refused():
    for patch in (False, True):
        model = adalora_model()
        if patch:
            fastlora.patch(model)
        with fastlora.GradientSketch(model, r=2) as sketch:  # looks at W0's gradient, whatever the adapter is
            model(torch.randn(9, K)).square().sum().backward()
        assert sketch.has_gradient("base_model.model.up")
        with pytest.raises(ValueError, match="SVDLinear, want one of"):
            fastlora.init_lora_ga(model, sketch)
        with pytest.raises(ValueError, match=r"'base_model.model.up' has an AdaLoRA adapter P Λ Q"):
            fastlora.AlignmentMonitor(model)
