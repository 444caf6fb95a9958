"""A loop of one's own: every model, dropout, optimisers, casts."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from problems import through_the_function
from tiny_models import ARCHITECTURES
from training_runs import (
    LEARNING_RATE,
    adapters,
    assert_fused,
    assert_same_training,
    batches,
    trainable_model,
)

import fastlora

the_function = pytest.fixture(autouse=True)(through_the_function)


def loop(model: Any, name: str, steps: int = 4, optimizer: Any = torch.optim.AdamW, **settings: Any) -> list[float]:
    model.train()
    optimizer = optimizer(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE.get(name, 1e-2), **settings
    )
    torch.manual_seed(3)
    losses = []
    for batch in batches(name, steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@cache
def peft_s(name: str, **dropouts: Any) -> tuple[list[float], Any]:
    model = trainable_model(name, "PEFT", **dropouts)
    return loop(model, name), model


@pytest.mark.parametrize("way", ["PEFT patched", "patched"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "minilm"])
def test_the_same_as_peft(name, way):
    model = trainable_model(name, way)
    assert_same_training(loop(model, name), model, *peft_s(name))
    if way == "PEFT patched":
        assert_fused(model)


@pytest.mark.parametrize("name, way", [("llama", "PEFT patched"), *((name, "patched") for name in ARCHITECTURES)])
def test_the_same_as_peft_with_dropout(name, way):
    dropouts: dict[str, Any] = {"dropout": 0.2, "hidden_dropout": 0.1}
    model = trainable_model(name, way, **dropouts)
    assert_same_training(loop(model, name), model, *peft_s(name, **dropouts))


@pytest.mark.parametrize(
    "optimizer, settings",
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
        (torch.optim.Adafactor, {}),
    ],
    ids=["adamw foreach", "adamw fused", "sgd fused", "adafactor"],
)
def test_optimisers(optimizer, settings):
    model, other = trainable_model("qwen3", "patched"), trainable_model("qwen3", "PEFT")
    got, want = (loop(m, "qwen3", optimizer=optimizer, **settings) for m in (model, other))
    assert_same_training(got, model, want, other)


def test_bf16_base_with_fp32_adapters_keeps_them_through_to():
    """Moving a model does not change a dtype: fp32 adapters on a bf16 base stay fp32."""
    model = trainable_model("llama", "patched").to(torch.bfloat16)
    for parameter in adapters(model).values():
        parameter.data = parameter.data.float()
    moved = copy.deepcopy(model).to("cpu")
    assert {p.dtype for p in adapters(moved).values()} == {torch.float32}
    assert loop(moved, "llama") == loop(model, "llama")
    fastlora.unpatch(moved)
    assert {p.dtype for p in moved.parameters()} == {torch.bfloat16}
