"""FSDP2 (`fully_shard`) and DTensor weights, in two gloo processes."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
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
    trained,
    whole_batch,
)

import fastlora
from fastlora import FusedLoraLinear, GradientSketch
from fastlora.functional import lora_linear


def shard(model: nn.Module, every_layer: bool = False, **settings: Any) -> Any:
    blocks: Any = net(model).blocks
    for block in blocks:
        for layer in (block.up, block.down) if every_layer else ():
            fully_shard(layer, **settings)
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def all_sharded(model: nn.Module) -> bool:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


# The checks. Each is given a folder of its own.
def training_is_that_of_one_process(folder: str) -> None:
    for kind in KINDS:
        alone, model = build(kind), shard(build(kind))
        want = train(alone, whole_batch)
        with spied() as seen:
            assert_close(train(model, own_batch), want)
        assert seen == {"fused": {torch.float32}}, (kind, seen)
        assert_close(adapters(model), adapters(alone))
        assert all_sharded(model) and not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)


def other_ways_to_shard(folder: str) -> None:
    """Every layer by itself, whole after forward, grouped layers, recomputed activations."""
    alone = build()
    want, final = train(alone, whole_batch), adapters(alone)
    checkpointed = build()
    for block in net(checkpointed).blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
    for model in (
        shard(build(), every_layer=True),
        shard(build(), reshard_after_forward=False),
        shard(build(group="auto")),
        shard(checkpointed),
    ):
        with spied() as seen:
            assert_close(train(model, own_batch), want)
        assert "eager" not in seen
        assert_close(adapters(model), final)


def accumulating_without_sync(folder: str) -> None:
    for kind in ("plain", "peft-ga"):
        alone, model = build(kind), shard(build(kind))
        for step in range(2):
            model.set_requires_gradient_sync(step == 1)
            loss_of(alone, whole_batch(step)).backward()
            loss_of(model, own_batch(step)).backward()
            if step == 0:
                assert all(parameter.grad is None for parameter in model.parameters())  # kept unsharded till the sync
        optimizer_of(alone).step()
        optimizer_of(model).step()
        assert_close(adapters(model), adapters(alone))


def mixed_precision(folder: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in KINDS:
        model, alone = shard(build(kind), mp_policy=policy), build(kind)
        if kind.endswith("-ga"):  # the start cancels to the bit in bfloat16 too
            plain = Net().bfloat16()
            with torch.no_grad():
                assert_close(model(own_batch()), plain(own_batch().bfloat16()), atol=0.05)
                layer: Any = net(model).blocks[0].up  # type: ignore[union-attr]
                net(model).blocks[0].unshard()  # type: ignore[operator]
                weight, x = layer.weight, own_batch().bfloat16()
                bias = layer.base_layer.bias if kind == "peft-ga" else layer.bias
                assert torch.equal(layer(x), nn.functional.linear(x, weight, bias)), kind
        with spied() as seen:
            got = train(model, own_batch)
        assert seen == {"fused": {torch.bfloat16}}, (kind, seen)
        torch.testing.assert_close(got, train(alone, whole_batch), rtol=0.05, atol=0.0)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def half_precision_base_with_float32_adapters(folder: str) -> None:
    model = Net().bfloat16()
    torch.manual_seed(1)
    fastlora.patch(model, r=R, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    alone = copy.deepcopy(model)
    shard(model)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    want = train(alone, lambda step: whole_batch(step).bfloat16())
    with spied() as seen:
        got = train(model, lambda step: own_batch(step).bfloat16())
    assert seen == {"fused": {torch.bfloat16}}
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.0)


def state_dicts_go_both_ways(folder: str) -> None:
    """Sharded and full, of the model and of the optimiser, into a model that was trained differently."""
    for kind in KINDS:
        source = shard(build(kind))
        optimizer = optimizer_of(source)
        train(source, own_batch, steps=1)
        with torch.no_grad():
            y = source(own_batch())
        for full in (False, True):
            options = StateDictOptions(full_state_dict=full)
            state = get_model_state_dict(source, options=options)
            assert all(isinstance(value, DTensor) != full for value in state.values()), kind
            target = shard(build(kind))
            train(target, whole_batch, steps=2)
            set_model_state_dict(target, dict(state), options=options)
            assert torch.equal(target(own_batch()), y), (kind, full)
            moments = get_optimizer_state_dict(source, optimizer, options=options)
            fresh = optimizer_of(target)
            set_optimizer_state_dict(target, fresh, moments, options=options)
            one, other = copy.deepcopy(moments), get_optimizer_state_dict(target, fresh, options=options)
            assert_close(other["state"], one["state"], atol=0.0)
            if not full:  # and through files, each process its own
                dcp.save({"model": state}, checkpoint_id=f"{folder}/{kind}")
                read = {"model": get_model_state_dict(shard(build(kind)))}
                dcp.load(read, checkpoint_id=f"{folder}/{kind}")
                for key, value in cast(dict[str, Any], state).items():
                    got: Any = read["model"][key]
                    assert torch.equal(got.full_tensor(), value.full_tensor()), key
            alone = build(kind)
            if full:
                alone.load_state_dict(state)
                assert_close(alone(own_batch()), y)
                shard(alone)
                assert torch.equal(alone(own_batch()), y)


def adapters_are_saved_whole_and_loaded_back(folder: str) -> None:
    for kind in KINDS:
        model, directory = shard(build(kind)), Path(folder, kind)
        optimizer = optimizer_of(model)
        loss_of(model, own_batch()).backward()
        with torch.no_grad():
            model(own_batch())  # leaves whole copies in the root, which the step makes stale
        optimizer.step()
        fastlora.save_adapter(model, directory)
        assert (directory / "adapter_model.safetensors").is_file() and (directory / "adapter_config.json").is_file()
        y = model(own_batch()).detach()
        alone = Net()
        fastlora.load_adapter(alone, directory)  # an ordinary adapter, LoRA-GA's of twice the rank
        assert_close(alone(own_batch()), y)
        if kind.endswith("-ga") and kind.startswith("plain"):
            fresh = shard(build(kind))
            assert "lora_A" in raised(ValueError, lambda: fastlora.load_adapter(fresh, directory))  # noqa: B023
            continue
        again = shard(build(kind))
        with torch.no_grad():
            again(own_batch())
            for parameter in trained(again):
                parameter.mul_(0.5)
        fastlora.load_adapter(again, directory)
        assert_close(again(own_batch()), y)
        again(own_batch()).sum().backward()
        assert all_sharded(again)


def saving_fails_in_all_or_none(folder: str) -> None:
    blocked = Path(folder, "blocked")
    if dist.get_rank() == 0:
        blocked.write_text("")
    dist.barrier()
    model = shard(build())
    message = raised(OSError, lambda: fastlora.save_adapter(model, blocked / "inside"))
    assert "nothing in it was changed" in message
    assert blocked.read_text() == ""


def what_would_be_lost_is_refused(folder: str) -> None:
    bare = shard(Net())
    bare(own_batch())  # the root's parameters are plain tensors now
    before = adapters(bare)
    assert "before the model is wrapped" in raised(ValueError, lambda: fastlora.patch(bare, r=R))
    with GradientSketch(bare, r=1) as sketch:
        loss_of(bare, own_batch()).backward()
    assert "sketch.save" in raised(ValueError, lambda: fastlora.init_lora_ga(bare, sketch))
    for kind in KINDS:
        model = shard(build(kind))
        y = model(own_batch()).detach()
        with GradientSketch(model, r=R, target_modules=TARGETS) as own:
            loss_of(model, own_batch()).backward()
        names = [name for name, _ in model.named_parameters()]
        for base in ("exact", "offset"):
            message = raised(ValueError, lambda: fastlora.init_lora_ga(model, own, base=base))  # noqa: B023
            assert "before the model is wrapped" in message
        assert "sharded" in raised(ValueError, lambda: fastlora.merge(model))  # noqa: B023
        assert "sharded" in raised(ValueError, lambda: fastlora.init.undo_lora_ga(model))  # noqa: B023
        directory = Path(folder, kind)
        fastlora.save_adapter(model, directory)
        message = raised(ValueError, lambda: fastlora.load_adapter(model, directory, "second"))  # noqa: B023
        assert "before the model is wrapped" in message
        if kind == "plain-ga":
            state = {key: value for key, value in build(kind).state_dict().items() if "A0" in key}
            empty = shard(build("plain"))
            assert "before the model is wrapped" in raised(
                ValueError,
                lambda: empty.load_state_dict(state, strict=False),  # noqa: B023
            )
        assert [name for name, _ in model.named_parameters()] == names
        assert torch.equal(model(own_batch()), y)
    assert_close(adapters(bare), before, atol=0.0)


def sketches_become_one(folder: str) -> None:
    """X and dY are the processes' own; the sketch is wide enough to hold the whole gradient, of the data of both."""
    for kind in ("bare", "plain", "peft"):
        fresh = Net if kind == "bare" else lambda kind=kind: build(kind)
        model, alone = shard(fresh()), fresh()
        flags = [p.requires_grad for p in model.parameters()]
        sketch = GradientSketch(model, target_modules=TARGETS, r=R, width=16)
        with sketch:
            loss_of(model, own_batch()).backward()
        with sketch.refine():
            loss_of(model, own_batch()).backward()
        assert flags == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
        for name in sketch.names:
            layer: Any = alone.get_submodule(name)
            layer = getattr(layer, "base_layer", layer).requires_grad_(True)
        loss_of(alone, whole_batch()).backward()
        for name in sketch.names:
            layer = alone.get_submodule(name)
            want = getattr(layer, "base_layer", layer).weight.grad
            q, z = sketch.layers[name].factors()
            got = q @ z.t() / sketch.total_weight
            assert_close(got, want, atol=1e-5 * float(want.norm()))
        sketch.save(f"{folder}/{kind}-{dist.get_rank()}")
        if kind == "bare":
            assert len(train(model, own_batch)) == 3  # the weights are trained: freezing them was for the sketch only
            started = Net()
            fastlora.init_lora_ga(started, GradientSketch.load(f"{folder}/{kind}-{dist.get_rank()}", started))
            twin = copy.deepcopy(started)
            assert_close(train(shard(started), own_batch), train(twin, whole_batch))


def adapters_are_switched_and_taken_out(folder: str) -> None:
    model = build()
    fastlora.patch(model, r=2, adapter_name="second", target_modules=TARGETS, init_lora_weights=False)
    alone = copy.deepcopy(model)
    shard(model)
    for both in (model, alone):
        both(own_batch())
        fastlora.set_adapter(both, "second")
    assert_close(train(model, own_batch), train(alone, whole_batch))
    assert_close(adapters(model), adapters(alone))
    with fastlora.disable_adapter(model):
        assert_close(model(own_batch()), Net()(own_batch()))
    fastlora.unpatch(model)
    assert_close(model(own_batch()), Net()(own_batch()))
    assert set(get_model_state_dict(model)) == set(Net().state_dict())
    later = build("peft")
    fastlora.unpatch(later)
    alone = copy.deepcopy(later)
    shard(later)
    with pytest.warns(UserWarning, match="DTensor"):  # left to PEFT
        fastlora.patch(later)
    assert_close(train(later, own_batch), train(alone, whole_batch))


def tensor_parallel_weights_go_the_eager_way(folder: str) -> None:
    """Column-wise: weight, bias and B by rows of the output; x and A whole. Row-wise: weight and A by columns."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, weight, a = torch.randn(4, 8), torch.randn(6, 8), torch.randn(R, 8)
    bias, b = torch.randn(6), torch.randn(6, R)
    whole = [t.requires_grad_() for t in (x, weight, bias, a, b)]
    want = lora_linear(x, weight, a, b, 2.0, bias)
    want.square().sum().backward()
    columns = (Replicate(), Shard(0), Shard(0), Replicate(), Shard(0))
    rows = (Shard(1), Shard(1), Replicate(), Shard(1), Replicate())
    for placements in (columns, rows):
        parts: list[Any] = [
            distribute_tensor(t.detach().clone(), mesh, [place]).requires_grad_() for t, place in zip(whole, placements)
        ]
        with spied() as seen:
            y: Any = lora_linear(parts[0], parts[1], parts[3], parts[4], 2.0, parts[2])
        assert set(seen) == {"eager"} and isinstance(y, DTensor)
        assert_close(y.full_tensor(), want.detach())
        y.square().sum().backward()
        for part, tensor in zip(parts, whole):
            assert_close(part.grad.full_tensor(), tensor.grad, atol=1e-4)
    layer = FusedLoraLinear(8, 6, r=R, init_lora_weights=False)
    alone = copy.deepcopy(layer)
    owners: list[tuple[Any, str, int | None]] = [(layer, "weight", 0), (layer, "bias", 0)]
    owners += [(layer.lora_A, "default", None), (layer.lora_B, "default", 0)]
    for owner, name, dim in owners:
        place = Replicate() if dim is None else Shard(dim)
        parameter = owner._parameters[name]
        owner._parameters[name] = nn.Parameter(
            distribute_tensor(parameter.detach(), mesh, [place]), requires_grad=parameter.requires_grad
        )
    spread: Any = distribute_tensor(x.detach(), mesh, [Replicate()])
    with spied() as seen:
        y = layer(spread)
    assert set(seen) == {"eager"}
    assert_close(y.full_tensor(), alone(x).detach())
    with contextlib.suppress(RuntimeError):  # torch refuses to mix them; whatever it does, it is not the fused path
        with spied() as seen:
            layer(x.detach())
        assert set(seen) == {"eager"}
    gathered: Tensor = mean_of(y.full_tensor().mean()) * torch.ones(())
    assert gathered.isfinite()


CHECKS = [
    training_is_that_of_one_process,
    other_ways_to_shard,
    accumulating_without_sync,
    mixed_precision,
    half_precision_base_with_float32_adapters,
    state_dicts_go_both_ways,
    adapters_are_saved_whole_and_loaded_back,
    saving_fails_in_all_or_none,
    what_would_be_lost_is_refused,
    sketches_become_one,
    adapters_are_switched_and_taken_out,
    tensor_parallel_weights_go_the_eager_way,
]


def test_fully_sharded():
    """All of them in one start of the processes, which takes longer than most of the checks."""
    failed = {name: why for name, why in outcome_of(CHECKS).items() if why}
    assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())
