"""GaLore in two gloo processes: the numbers of one process with all the data, and what travels for them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from galore_problem import PROJECTED, RANK, Net, backward, batch, difference, loss_of, net, optimizer_of, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import outcome_of, raised

from fastlora.optim import galore_param_groups

# (gradients, refresh, proj_type, micro-batches)
WAYS = [
    ("plain", "subspace", "std", 1),
    ("plain", "subspace", "full", 2),
    ("plain", "streamed", "std", 1),
    ("hook", "streamed", "std", 2),
    ("hook", "streamed", "full", 1),
    ("factored", "streamed", "reverse_std", 2),
    ("factored", "streamed", "std", 1),
]


def own(step: int) -> tuple[Tensor, Tensor]:
    return tuple(tensor.chunk(2)[dist.get_rank()] for tensor in batch(step))  # type: ignore[return-value]


def train_own(model: nn.Module, optimizer: Any, steps: int, micro_batches: int = 1, start: int = 0) -> None:
    for step in range(start, start + steps):
        for tokens, targets in zip(*(tensor.chunk(micro_batches) for tensor in own(step))):
            (loss_of(model, tokens, targets) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


def replicated(way: tuple[str, str, str, int], **settings: Any) -> tuple[Any, Any, Any]:
    gradients, refresh, proj_type, _ = way
    model = net()
    optimizer = optimizer_of(
        model, {"proj_type": proj_type}, gradients=gradients, refresh=refresh, refresh_steps=1, **settings
    )
    optimizer.reduce_across_ranks(model)
    return model, optimizer, DistributedDataParallel(model)


def everywhere(tensor: Tensor) -> bool:
    """Whether both processes have the same bits."""
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    return torch.equal(*both)


# The checks. Each is given a folder of its own.
def trajectories_are_those_of_one_process(folder: str) -> None:
    for way in WAYS:
        _, refresh, proj_type, micro_batches = way
        alone = net()
        single = optimizer_of(alone, {"proj_type": proj_type}, refresh=refresh, refresh_steps=1, max_grad_norm=0.5)
        model, optimizer, wrapped = replicated(way, max_grad_norm=0.5)
        for step in range(14):
            train(alone, single, 1, start=step)
            train_own(wrapped, optimizer, 1, micro_batches, start=step)
            assert float(optimizer.grad_norm) == pytest.approx(float(single.grad_norm or 0), rel=1e-9), (way, step)
            assert difference(model, alone) < 1e-9, (way, step)
        assert difference(model, net()) > 0.05
        for name, parameter in model.named_parameters():
            assert everywhere(parameter), name
        for name in PROJECTED:
            state = optimizer.state[model.get_parameter(name)]
            assert state["bases"] > 2 and all(everywhere(v) for v in state.values() if isinstance(v, Tensor)), name


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The numbers of elements that all_reduce and broadcast are given."""
    sizes: list[int] = []
    all_reduce, broadcast = dist.all_reduce, dist.broadcast

    def note(function: Any) -> Any:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(tensor.numel())
            return function(tensor, *args, **kwargs)

        return noted

    dist.all_reduce, dist.broadcast = note(all_reduce), note(broadcast)
    try:
        yield sizes
    finally:
        dist.all_reduce, dist.broadcast = all_reduce, broadcast


def only_thin_blocks_travel(folder: str) -> None:
    weights = [net().get_parameter(name) for name in PROJECTED]
    long, short = sum(max(w.shape) for w in weights), sum(min(w.shape) for w in weights)
    for way in (("plain", "streamed", "std", 1), ("hook", "streamed", "std", 1), ("factored", "streamed", "std", 1)):
        model, optimizer, wrapped = replicated(way, refresh_iterations=1)
        reduced_by_ddp: list[int] = []

        def hook(state, bucket):  # DDP reads annotations
            reduced_by_ddp.append(bucket.buffer().numel())  # noqa: B023
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])  # type: ignore[union-attr]

        wrapped.register_comm_hook(None, hook)
        seen = []
        for step in range(12):
            with counted() as sizes:
                train_own(wrapped, optimizer, 1, start=step)
            seen.append(sum(sizes) - sum(reduced_by_ddp))
            rest = sum(p.numel() for name, p in model.named_parameters() if name not in PROJECTED)
            assert sum(reduced_by_ddp) == rest, way
            reduced_by_ddp.clear()
        flags = len(PROJECTED)
        # R alone; with the sums of a refresh and the basis that it gives; for all layers at the start, later for some.
        assert seen[0] == long * RANK + flags
        assert seen[1] == (long + 2 * short) * RANK + flags
        assert seen[2] == long * RANK + flags and max(seen[2:]) <= (long + 2 * short) * RANK + flags
    model, optimizer, wrapped = replicated(("plain", "subspace", "std", 1))
    with counted() as sizes:  # not what DDP reduces, by itself
        train_own(wrapped, optimizer, 1)
    products = sum((3 * max(w.shape) + 2 * min(w.shape)) * min(RANK + 8, *w.shape) for w in weights)
    assert sum(sizes) == products + short * RANK + flags
    with counted() as sizes:
        train_own(wrapped, optimizer, 1, start=1)
    assert sum(sizes) == long * RANK + flags


class Gated(Net):
    """Leaves a layer out of the second process's passes, and of all passes where `skip` is set."""

    skip = False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens)))
        if self.skip:
            return self.down(hidden)
        return self.down(hidden + torch.tanh(self.square(self.norm(hidden))))


def layers_that_only_one_process_uses(folder: str) -> None:
    """Count as a gradient of zero in the other; those that none uses are left alone in both."""
    for gradients, refresh in (
        ("plain", "subspace"),
        ("plain", "streamed"),
        ("hook", "streamed"),
        ("factored", "streamed"),
    ):
        alone, model = net(kind=Gated), net(kind=Gated)
        settings: dict[str, Any] = {"refresh": refresh, "refresh_steps": 1}
        single, optimizer = optimizer_of(alone, **settings), optimizer_of(model, gradients=gradients, **settings)
        optimizer.reduce_across_ranks(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for step in range(9):
            halves = list(zip(*(tensor.chunk(2) for tensor in batch(step))))
            for rank, half in enumerate(halves):
                alone.skip = rank == 1 or step in (3, 4)
                (loss_of(alone, *half) / 2).backward()
            model.skip = dist.get_rank() == 1 or step in (3, 4)
            loss_of(wrapped, *halves[dist.get_rank()]).backward()
            for each in (single, optimizer):
                each.step()
                each.zero_grad()
            assert difference(model, alone) < 1e-9, (gradients, refresh, step)
        assert optimizer.state[model.square.weight]["step"] == (7 if refresh == "subspace" else 5)
        assert everywhere(model.square.weight)


def without_a_wrapper(folder: str) -> None:
    """The optimiser reduces what it projects, and nothing else."""
    alone, model = net(), net()
    for parameter in (*alone.parameters(), *model.parameters()):
        parameter.requires_grad_(parameter.dim() == 2 and min(parameter.shape) > RANK)
    alone.embedding.requires_grad_(False)
    model.embedding.requires_grad_(False)
    single, optimizer = optimizer_of(alone, refresh="streamed"), optimizer_of(model, gradients="factored")
    optimizer.reduce_across_ranks()
    train(alone, single, 7)
    train_own(model, optimizer, 7)
    assert difference(model, alone) < 1e-9


def weights_are_the_first_process_s(folder: str) -> None:
    model = net()
    if dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    optimizer = optimizer_of(model, gradients="hook")
    optimizer.reduce_across_ranks(model)
    DistributedDataParallel(model)
    assert difference(model, net()) == 0


def a_run_is_resumed(folder: str) -> None:
    way = ("factored", "streamed", "std", 1)
    model, optimizer, wrapped = replicated(way)
    train_own(wrapped, optimizer, 5)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train_own(wrapped, optimizer, 5, start=5)
    again, other, rewrapped = replicated(way)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train_own(rewrapped, other, 5, start=5)
    assert difference(again, model) == 0


def what_would_go_wrong_is_refused(folder: str) -> None:
    model = net()
    optimizer = optimizer_of(model, gradients="hook")
    message = raised(ValueError, lambda: optimizer.reduce_across_ranks(DistributedDataParallel(net())))
    assert "reduce_across_ranks: model: got one in DistributedDataParallel, want the plain model" in message
    refused: list[tuple[dict[str, Any], str]] = [
        ({"refresh": "svd"}, "refresh: got 'svd', which needs the whole gradient"),
        (
            {"refresh": "subspace", "gradients": "hook"},
            "refresh: got 'subspace' with gradients='hook', want 'streamed'",
        ),
    ]
    for settings, want in refused:
        message = raised(ValueError, optimizer_of(net(), **settings).reduce_across_ranks)
        assert want in message, message
    # DDP puts the mean of the gradients back, after they were taken: not to be counted twice.
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, *own(0)).backward()
    with pytest.warns(
        UserWarning, match="gradients='hook' in 2 processes, without reduce_across_ranks: each trains on"
    ):
        message = raised(ValueError, optimizer.step)
    assert "reduce_across_ranks before it wraps the model" in message, message
    message = raised(ValueError, lambda: galore_param_groups(wrapped, RANK))
    assert "galore_param_groups: model: got one in DistributedDataParallel, want the plain model" in message, message
    # Where DDP reduces all of it, the plain mode is as it ever was, with any refresh.
    alone, whole = net(), net()
    single, reduced = optimizer_of(alone, refresh="svd"), optimizer_of(whole, refresh="svd")
    train(alone, single, 7)
    train_own(DistributedDataParallel(whole), reduced, 7)
    assert difference(whole, alone) < 1e-8


def scalers_are_refused_where_the_optimiser_reduces(folder: str) -> None:
    """One process's overflow is not the other's: it would step over the collectives that the other waits in."""
    for gradients in ("plain", "hook"):
        model, optimizer, wrapped = replicated((gradients, "streamed", "std", 1))
        for unscaled in (False, True):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(loss_of(wrapped, *own(0))).backward()
            if dist.get_rank() == 0 and gradients == "plain":
                model.up.weight.grad[0, 0] = float("inf")
            if unscaled:
                scaler.unscale_(optimizer)
            message = raised(ValueError, lambda: scaler.step(optimizer))  # noqa: B023
            assert f"with gradients='{gradients}' and reduce_across_ranks; want" in message, message
            optimizer.zero_grad()
        assert difference(model, net()) == 0
        train_own(wrapped, optimizer, 3)
    # Where DDP reduces all, both see the overflow, and both skip the step.
    alone = net()
    optimizer, wrapped = optimizer_of(alone, refresh="svd"), DistributedDataParallel(alone)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        loss = loss_of(wrapped, *own(step))
        scaler.scale(loss * float("inf") if step == 1 and dist.get_rank() == 0 else loss).backward()
        before = alone.up.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(alone.up.weight, before) == (step == 1)
        assert everywhere(alone.up.weight) and scaler.get_scale() == (1024.0 if step == 0 else 512.0)


def layers_are_frozen_in_all_processes(folder: str) -> None:
    for gradients in ("plain", "hook", "factored"):
        model, optimizer, wrapped = replicated((gradients, "streamed", "std", 1))
        train_own(wrapped, optimizer, 4)
        optimizer.freeze([model.square.weight])
        kept, other = model.square.weight.detach().clone(), model.up.weight.detach().clone()
        train_own(wrapped, optimizer, 3, start=4)
        assert torch.equal(model.square.weight, kept) and not torch.equal(model.up.weight, other)
        optimizer.unfreeze([model.square.weight])
        train_own(wrapped, optimizer, 2, start=7)
        assert not torch.equal(model.square.weight, kept) and everywhere(model.square.weight)


CHECKS = [
    trajectories_are_those_of_one_process,
    only_thin_blocks_travel,
    layers_that_only_one_process_uses,
    without_a_wrapper,
    weights_are_the_first_process_s,
    a_run_is_resumed,
    what_would_go_wrong_is_refused,
    scalers_are_refused_where_the_optimiser_reduces,
    layers_are_frozen_in_all_processes,
]


def test_galore_in_two_processes():
    """All of them in one start of the processes, which takes longer than most of the checks."""
    failed = {name: why for name, why in outcome_of(CHECKS).items() if why}
    assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())


def test_one_process_alone_has_nobody_to_reduce_with():
    model = net()
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match=r"reduce_across_ranks: process_group: torch\.distributed is not"):
        optimizer.reduce_across_ranks(model)
    backward(model, 0)
    optimizer.step()
    assert difference(model, net()) > 0
