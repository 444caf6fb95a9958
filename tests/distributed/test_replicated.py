"""DistributedDataParallel, in two gloo processes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from two_processes import (
    KINDS,
    TARGETS,
    Net,
    R,
    adapters,
    assert_close,
    build,
    loss_of,
    mean_of,
    net,
    optimizer_of,
    outcome_of,
    own_batch,
    raised,
    spied,
    train,
    whole_batch,
)

import fastlora
from fastlora import GradientSketch


def replicate(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **settings)


# The checks. Each is given a folder of its own.


def training_is_that_of_one_process(folder: str) -> None:
    """Frozen parameters need no find_unused_parameters, and neither do LoRA-GA's frozen halves."""
    for kind in KINDS:
        for settings in ({"broadcast_buffers": False}, {"gradient_as_bucket_view": True, "static_graph": True}):
            alone, model = build(kind), replicate(build(kind), **settings)
            want = train(alone, whole_batch)
            with spied() as seen:
                assert_close(train(model, own_batch), want)
            assert seen == {"fused": {torch.float32}}, (kind, seen)
            assert_close(adapters(model), adapters(alone))


def fsdp1_is_refused_where_nothing_can_be_read(folder: str) -> None:
    for use_orig_params in (True, False):
        model = build("plain").requires_grad_(True)
        sharded = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        sharded(own_batch()).sum().backward()
        path = Path(folder) / f"{use_orig_params}{dist.get_rank()}"
        message = raised(ValueError, lambda path=path, model=sharded: fastlora.save_adapter(model, path))
        assert "summon_full_params(model)" in message and not path.exists(), message
        with FullyShardedDataParallel.summon_full_params(sharded), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its base trains too
            fastlora.save_adapter(sharded, path)
        fastlora.load_adapter(build("plain"), path)


def accumulating_without_sync(folder: str) -> None:
    for kind in ("plain", "peft-ga"):
        alone, model = build(kind), replicate(build(kind))
        for step in range(2):
            loss_of(alone, whole_batch(step)).backward()
        with model.no_sync():
            loss_of(model, own_batch(0)).backward()
        loss_of(model, own_batch(1)).backward()
        optimizer_of(alone).step()
        optimizer_of(model).step()
        assert_close(adapters(model), adapters(alone))


def mixed_precision(folder: str) -> None:
    """Autocast, and a bfloat16 base with float32 adapters: the processes' losses are those of their halves."""
    for kind in ("plain", "peft"):
        alone, model = build(kind), replicate(build(kind))
        with spied() as seen, torch.autocast("cpu", torch.bfloat16):
            got, want = loss_of(model, own_batch()), loss_of(alone, whole_batch())
        assert seen == {"fused": {torch.bfloat16}}
        torch.testing.assert_close(mean_of(got), float(want), rtol=1e-3, atol=0.0)
        got.backward()
        want.backward()
        for ours, theirs in zip(model.parameters(), alone.parameters()):
            if ours.grad is not None and theirs.grad is not None:
                assert ours.grad.dtype == theirs.grad.dtype == torch.float32
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.02, atol=0.01 * float(theirs.grad.norm()))
    model = Net().bfloat16()
    fastlora.patch(model, r=R, target_modules=TARGETS, init_lora_weights=False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.detach(), src=0)
            assert parameter.dtype == torch.float32, name
    alone = copy.deepcopy(model)
    got = train(replicate(model), lambda step: own_batch(step).bfloat16())
    torch.testing.assert_close(got, train(alone, lambda step: whole_batch(step).bfloat16()), rtol=0.02, atol=0.0)


def state_dicts_and_files_go_both_ways(folder: str) -> None:
    for kind in KINDS:
        model, directory = replicate(build(kind)), Path(folder, kind)
        train(model, own_batch, steps=1)
        y = model(own_batch()).detach()
        if dist.get_rank() == 0:  # one process is enough
            fastlora.save_adapter(model, directory)
        dist.barrier()
        alone = Net()
        fastlora.load_adapter(alone, directory)
        assert_close(alone(own_batch()), y)
        again = replicate(build(kind))
        if kind != "plain-ga":  # whose file is an ordinary adapter of rank 2r
            fastlora.load_adapter(again, directory)
            assert_close(again(own_batch()), y)
        message = raised(ValueError, lambda: fastlora.load_adapter(again, directory, "second"))  # noqa: B023
        assert "DistributedDataParallel" in message and "before the model is wrapped" in message
        plain = build(kind)
        plain.load_state_dict({key.removeprefix("module."): value for key, value in model.state_dict().items()})
        assert torch.equal(plain(own_batch()), y)
        if kind != "peft-ga":  # whose parameters have other names than its state: torch's helper asks for both
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            set_model_state_dict(again, state, options=StateDictOptions(full_state_dict=True))
            assert torch.equal(again(own_batch()), y)
        loss_of(again, own_batch()).backward()


def what_would_not_be_synchronised_is_refused(folder: str) -> None:
    bare = replicate(Net())
    assert "DistributedDataParallel" in raised(ValueError, lambda: fastlora.patch(bare, r=R))
    assert not fastlora.is_patched(bare) and all(p.requires_grad for p in bare.parameters())
    assert "model.module" in raised(ValueError, lambda: GradientSketch(bare, r=R))
    with GradientSketch(bare.module, r=1) as sketch:
        loss_of(bare.module, own_batch()).backward()
    assert "DistributedDataParallel" in raised(ValueError, lambda: fastlora.init_lora_ga(bare, sketch))
    assert len(train(bare, own_batch)) == 3


def peft_models_are_patched_inside_the_wrapper(folder: str) -> None:
    """Nothing but classes changes, so that the wrapper has every parameter; unpatched it is PEFT's again."""
    alone = build("peft")
    inner = build("peft")
    fastlora.unpatch(inner)
    model = replicate(inner)
    fastlora.patch(model)
    with spied() as seen:
        assert_close(train(model, own_batch), train(alone, whole_batch))
    assert seen == {"fused": {torch.float32}}
    fastlora.unpatch(model)
    assert_close(train(model, own_batch), train(alone, whole_batch))
    assert_close(adapters(model), adapters(alone))


def adapters_are_switched_and_merged(folder: str) -> None:
    inner = build()
    model, alone = replicate(inner), copy.deepcopy(inner)
    for both in (model, alone):
        y = both(own_batch()).detach()
        fastlora.merge(both)
        assert_close(both(own_batch()), y)
        fastlora.unmerge(both)
        with fastlora.disable_adapter(both):
            assert_close(both(own_batch()), Net()(own_batch()))
    assert_close(train(model, own_batch), train(alone, whole_batch))
    fastlora.unpatch(net(inner))
    assert_close(inner(own_batch()), Net()(own_batch()))


def adalora_keeps_the_same_ranks_everywhere(folder: str) -> None:
    """Every process has the same gradients, to the bit, and so the same scores and masks, without a message."""
    for way in ("step", "follow"):
        patterns = []
        for model, batch in ((build(use_adalora=True), whole_batch), (replicate(build(use_adalora=True)), own_batch)):
            allocator = fastlora.variants.RankAllocator(model, target_r=1, total_steps=8, t_final=2)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
            if way == "follow":
                allocator.follow(optimizer)
            for step in range(8):
                (loss_of(model, batch(step)) + fastlora.variants.orthogonality_penalty(model)).backward()
                optimizer.step()
                if way == "step":
                    allocator.step()
                optimizer.zero_grad()
            patterns.append(allocator.rank_pattern)
            mine = torch.cat([p.detach().flatten() for p in adapters(model).values()])
            both = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(both, mine)
            assert torch.equal(*both)
        assert patterns[0] == patterns[1]  # names too: the wrapper's prefix is left out


CHECKS = [
    training_is_that_of_one_process,
    fsdp1_is_refused_where_nothing_can_be_read,
    accumulating_without_sync,
    mixed_precision,
    state_dicts_and_files_go_both_ways,
    what_would_not_be_synchronised_is_refused,
    peft_models_are_patched_inside_the_wrapper,
    adapters_are_switched_and_merged,
    adalora_keeps_the_same_ranks_everywhere,
]


def test_replicated():
    """All of them in one start of the processes, which takes longer than most of the checks."""
    failed = {name: why for name, why in outcome_of(CHECKS).items() if why}
    assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())
