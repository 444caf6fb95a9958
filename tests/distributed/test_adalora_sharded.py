"""AdaLoRA under FSDP2, in three gloo processes: one process's masks, and what travels for them.

The 4 triplets of a layer are 2 + 2 + 0: the third process has none, and parts of every P.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adalora_problem import R, batch, optimizer_of, patched, plain, trained
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import Traffic, adapters, assert_close, outcome_of

import fastlora
from fastlora.introspect import sharding
from fastlora.variants import RankAllocator, orthogonality_penalty

SCHEDULE: dict[str, Any] = {"target_r": 2, "total_steps": 10, "t_init": 1, "t_final": 3, "delta_t": 2}


def shard(model: Any, layers: int = 3) -> Any:
    """Layers by themselves, and the root with what is left, which stays whole from its forward to its backward."""
    net = model.base_model.model if hasattr(model, "peft_config") else model
    for layer in net.layers[:layers]:
        fully_shard(layer)
    return fully_shard(model)


def peft_model() -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.AdaLoraConfig(init_r=R, target_r=2, total_step=10, lora_alpha=8, target_modules=["0", "1", "2"])
    model = peft.get_peft_model(plain(), config)  # type: ignore[arg-type]
    fastlora.patch(model)
    return model


def step(model: Any, optimizer: Any, allocator: RankAllocator, number: int, gamma: float = 0.1) -> None:
    """With a third of the batch where the model is sharded."""
    x, y = (t[:15] for t in batch(number))
    if sharding.has_shards(model):
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
    ((model(x) - y).square().mean() + (orthogonality_penalty(model, gamma) if gamma else 0.0)).backward()
    optimizer.step()
    if not allocator._hooks:
        with torch.no_grad():
            model(x)  # the root is whole again, and its gradients are with the shards
        allocator.step()
    optimizer.zero_grad()


def assert_same(model: Any, allocator: RankAllocator, alone: Any, other: RankAllocator) -> None:
    assert allocator.rank_pattern == other.rank_pattern
    assert_close(allocator.scores, other.scores, atol=1e-9)
    assert_close(adapters(model), adapters(alone))


# The checks. Each is given a folder of its own.
def masks_are_those_of_one_process(folder: str) -> None:
    for kind, layers, following in ((patched, 3, False), (patched, 0, True), (peft_model, 2, False)):
        alone, model = kind(), shard(kind(), layers)
        optimizers = [optimizer_of(each) for each in (alone, model)]
        other, allocator = (RankAllocator(each, **SCHEDULE) for each in (alone, model))
        if following:
            for one, optimizer in zip((other, allocator), optimizers):
                one.follow(optimizer)
        for number in range(8):
            step(alone, optimizers[0], other, number)
            step(model, optimizers[1], allocator, number)
            assert_same(model, allocator, alone, other)
        assert allocator.is_final and sum(allocator.ranks.values()) == 6
        for as_lora in (False,) if kind is peft_model else (False, True):
            mine, theirs = (Path(folder, f"{kind.__name__}{layers}{as_lora}{name}") for name in ("sharded", "alone"))
            fastlora.save_adapter(model, mine, as_lora=as_lora)
            if dist.get_rank() == 0:
                fastlora.save_adapter(alone, theirs, as_lora=as_lora)
                got, want = (load_file(path / "adapter_model.safetensors") for path in (mine, theirs))
                assert_close(got, want)
                configs = [json.loads((path / "adapter_config.json").read_text()) for path in (mine, theirs)]
                if kind is peft_model:  # PEFT writes the name of the class that FSDP2 made
                    configs = [config | {"auto_mapping": None} for config in configs]
                assert configs[0] == configs[1]


def ties_are_cut_alike(folder: str) -> None:
    """λ are zero, and so every score of the first step: the first triplets of the first layers stay."""
    alone, model = patched(), shard(patched())
    other, allocator = (RankAllocator(each, 2, 4) for each in (alone, model))
    for each, one in ((alone, other), (model, allocator)):
        optimizer = optimizer_of(each)
        step(each, optimizer, one.follow(optimizer), 0, gamma=0.0)
    assert not any(score.any() for score in allocator.scores.values())
    assert 6 < sum(allocator.ranks.values()) < 12 and allocator.rank_pattern == other.rank_pattern


def the_penalty_is_that_of_one_process(folder: str) -> None:
    alone, model = patched(), shard(patched())
    want, got = orthogonality_penalty(alone), orthogonality_penalty(model)
    assert_close(got, want)
    want.backward()
    got.backward()
    for mine, theirs in zip(trained(model), trained(alone)):
        assert (mine.grad is None) == (theirs.grad is None)
        if isinstance(mine.grad, DTensor):
            assert_close(mine.grad.full_tensor(), theirs.grad)


def a_number_a_triplet_travels(folder: str) -> None:
    model = shard(patched())
    allocator = RankAllocator(model, **SCHEDULE)
    (model(batch(0)[0]).square().mean() + orthogonality_penalty(model)).backward()
    sizes = []
    for _ in range(2):
        with Traffic() as seen:
            allocator.step()
        sizes.append(seen.numbers)
    assert sizes == [12, 12]


def states_go_on_in_other_numbers_of_processes(folder: str) -> None:
    """A sharded state is whole: one process goes on with it, and three with one process's."""
    alone, model = patched(), shard(patched())
    optimizers = [optimizer_of(each) for each in (alone, model)]
    other, allocator = (RankAllocator(each, **SCHEDULE) for each in (alone, model))
    for number in range(4):
        step(alone, optimizers[0], other, number)
        step(model, optimizers[1], allocator, number)
    mine, theirs = allocator.state_dict(), other.state_dict()
    assert_close(mine, theirs, atol=1e-9)
    kept: Tensor = mine["importance"]["layers.0"]["lora_A"]
    assert kept.shape == (2, R, 6) and not isinstance(kept, DTensor)
    again, back = RankAllocator(model, **SCHEDULE), RankAllocator(alone, **SCHEDULE)
    again.load_state_dict(theirs)
    back.load_state_dict(mine)
    for number in range(4, 7):
        step(alone, optimizers[0], back, number)
        step(model, optimizers[1], again, number)
        assert_same(model, again, alone, back)
    assert again.is_final


CHECKS = [
    masks_are_those_of_one_process,
    ties_are_cut_alike,
    the_penalty_is_that_of_one_process,
    a_number_a_triplet_travels,
    states_go_on_in_other_numbers_of_processes,
]


def test_adalora_under_fsdp2():
    failed = {name: why for name, why in outcome_of(CHECKS, 3).items() if why}
    assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())
