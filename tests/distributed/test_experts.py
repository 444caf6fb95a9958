"""Experts in two gloo processes: DistributedDataParallel and `fully_shard` train them as one process does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mixtures import experts_in, mixture, randomise, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from two_processes import assert_close, outcome_of, raised

import fastlora


def patched() -> Any:
    model = mixture("qwen3_moe")
    fastlora.patch(model, r=2, target_modules=["o_proj"], target_parameters=experts_in(model))
    randomise(model)
    return model


def gradients(model: nn.Module, x: Tensor, whole: Any = lambda grad: grad) -> dict[str, Tensor]:
    model(input_ids=x).logits.square().mean().backward()
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def replicated(folder: str) -> None:
    x, rank = tokens(4), dist.get_rank()
    want = gradients(patched(), x)
    model = nn.parallel.DistributedDataParallel(patched())
    got = gradients(model, x.chunk(2)[rank])
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name])
    with torch.no_grad(), fastlora.disable_adapter(model):
        assert_close(model(x).logits, mixture("qwen3_moe")(x).logits)


def sharded(folder: str) -> None:
    x, rank = tokens(4), dist.get_rank()
    alone = patched()
    want = gradients(alone, x)
    model = patched()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    got = gradients(model, x.chunk(2)[rank], lambda grad: grad.full_tensor())
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name])
    place = Path(folder) / "adapter"
    fastlora.save_adapter(model, place)
    plain = copy.deepcopy(mixture("qwen3_moe"))
    fastlora.load_adapter(plain, place)
    assert_close(plain(x).logits, alone(x).logits)
    before = model(x).logits
    fastlora.load_adapter(model, place)
    assert_close(model(x).logits, before)
    assert "sharded over processes" in raised(ValueError, lambda: fastlora.merge(model))
    late = mixture("qwen3_moe")
    fully_shard(late)
    assert "before the model is wrapped" in raised(
        ValueError, lambda: fastlora.patch(late, target_parameters=experts_in(mixture("qwen3_moe")))
    )


@pytest.mark.slow
def test_experts_in_two_processes():
    failed = {name: why for name, why in outcome_of([replicated, sharded]).items() if why}
    assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())
