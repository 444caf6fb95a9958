"""GaLore under FSDP2, in three gloo processes and then two: one process's numbers, and what travels for them.

The 9 rows of a weight are 3 + 3 + 3, the 2 rows of another 1 + 1 + 0, and the 20 rows of the others 7 + 7 + 6.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from galore_problem import Net, batch, loss_of, net, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from two_processes import Traffic, outcome_of, raised

from fastlora.introspect import sharding
from fastlora.optim import GaLoreAdamW, galore_param_groups

TARGETS = ["up", "square", "two", "down"]


class Two(Net):
    """With a layer of two rows, fewer than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Linear(20, 2, bias=False)
        self.back = nn.Linear(2, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens)))
        return self.down(hidden + self.back(self.two(hidden)) + torch.tanh(self.square(self.norm(hidden))))


def make(dtype: torch.dtype = torch.float32) -> Any:
    return net(dtype, Two)


def shard(model: Any) -> Any:
    for layer in (model.up, model.square):
        fully_shard(layer)
    return fully_shard(model)


def galore(model: nn.Module, /, proj_type: str = "std", **settings: Any) -> GaLoreAdamW:
    """All projected weights at rank 4, that of two rows at rank 1."""
    groups = galore_param_groups(model, 4, target_modules=TARGETS[:2] + TARGETS[3:], update_proj_gap=3, scale=1.0)
    two: Any = model.two
    for group in groups:
        group["proj_type"] = proj_type
        group["params"] = [p for p in group["params"] if p is not two.weight]
    groups.append({"params": [two.weight], "rank": 1, "update_proj_gap": 2, "scale": 1.0, "proj_type": proj_type})
    return GaLoreAdamW(groups, lr=1e-2, **settings)


def train_own(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        parts = (tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in batch(step))
        loss_of(model, *parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(model: nn.Module, other: nn.Module) -> float:
    mine, theirs = (
        torch.cat([sharding.whole(parameter.detach()).flatten() for parameter in each.parameters()])
        for each in (model, other)
    )
    return float((mine - theirs).norm() / theirs.norm())


# The checks. Each is given a folder of its own.
def trajectories_are_those_of_one_process(folder: str) -> None:
    double, single = (torch.float64, 1e-12), (torch.float32, 1e-5)
    ways = [
        (*double, "left", "rotate"),
        (*single, "right", "keep"),
        (*single, "full", "rotate"),
        (*single, "std", "rotate_first"),
    ]
    for dtype, bound, proj_type, moments in ways:
        alone, model = make(dtype), shard(make(dtype))
        one, optimizer = (galore(m, proj_type, max_grad_norm=0.5, moments=moments) for m in (alone, model))
        for step in range(5):
            train(alone, one, 1, start=step)
            train_own(model, optimizer, 1, start=step)
            assert difference(model, alone) < bound, (dtype, proj_type, step)
            torch.testing.assert_close(optimizer.grad_norm, one.grad_norm, rtol=1e-5, atol=0.0)
        assert difference(model, make(dtype)) > 0.02
        for mine, theirs in zip(model.parameters(), alone.parameters()):
            states = optimizer.state[mine], one.state[theirs]
            counts, wanted = ({key: v for key, v in state.items() if isinstance(v, int)} for state in states)
            assert counts == wanted and counts.get("bases", 2) > 1
            moment, split = optimizer.state[mine]["exp_avg"], "basis_right" not in optimizer.state[mine]
            assert isinstance(moment, DTensor) == split  # of R (r, r) every process has the whole
            if split:
                assert len(moment.to_local()) <= -(-len(moment) // dist.get_world_size())


def half_precision(folder: str) -> None:
    """bfloat16 weights with float32 states, in chunks of rows of which a process may have none."""
    alone, model = make(torch.bfloat16), shard(make(torch.bfloat16))
    one, optimizer = galore(alone), galore(model)
    loss_of(model, *batch(0)).backward()
    for mine, theirs in zip(model.parameters(), alone.parameters()):
        theirs.grad = mine.grad.full_tensor()
    optimizer.step()
    one.step()
    assert difference(model, alone) < 1e-3  # where two float32 sums lie on the two sides of a rounding of bfloat16
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


def only_thin_blocks_travel(folder: str) -> None:
    """Between refreshes nothing for G Q, and for PᵀG the sum of R and the step N; for a refresh its five products."""
    model = shard(make())
    optimizer, world = galore(model, staggered=False), dist.get_world_size()

    def padded(rows: int) -> int:
        return -(-rows // world) * world

    refresh = between = 0
    for (n, m), r in (((20, 12), 4), ((20, 20), 4), ((9, 20), 4), ((2, 20), 1)):
        right, c = n >= m, min(r + 8, n, m)
        of_matmul, of_rmatmul = padded(n) * c, 2 * padded(m) * c  # gathered; summed in parts, and gathered
        refresh += (3, 2)[not right] * of_matmul + (2, 3)[not right] * of_rmatmul + min(n, m) * r
        refresh += 0 if right else padded(m) * r
        between += 0 if right else 2 * padded(m) * r
    for step, wanted in enumerate((refresh, between)):
        parts = (tensor.chunk(world)[dist.get_rank()] for tensor in batch(step))
        loss_of(model, *parts).backward()
        with Traffic() as seen:
            optimizer.step()
        optimizer.zero_grad()
        assert seen.numbers == wanted, (step, seen.numbers, wanted)


def states_go_through_checkpoints(folder: str) -> None:
    """Three processes save; three, two and one go on with the same steps."""
    model = shard(make())
    optimizer = galore(model)
    train_own(model, optimizer, 5)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=os.environ["GALORE_CHECKPOINT"])
    resumed_from_a_checkpoint(folder)


def resumed_from_a_checkpoint(folder: str) -> None:
    alone = make()
    one = galore(alone)
    train(alone, one, 9)
    for build in (lambda: shard(make()), make):
        model = build()
        optimizer = galore(model)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=os.environ["GALORE_CHECKPOINT"])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        (train if build is make else train_own)(model, optimizer, 4, start=5)
        assert difference(model, alone) < 1e-5


def a_whole_state_is_spread(folder: str) -> None:
    alone = make()
    one = galore(alone)
    train(alone, one, 5)
    model = make()
    model.load_state_dict(alone.state_dict())
    optimizer = galore(shard(model))
    optimizer.load_state_dict(one.state_dict())
    train(alone, one, 2, start=5)
    train_own(model, optimizer, 2, start=5)
    assert difference(model, alone) < 1e-5


def what_cannot_be_done_is_refused(folder: str) -> None:
    model = shard(make())
    refused: list[tuple[dict[str, Any], str]] = [
        ({"gradients": "hook"}, "gradients: got 'hook' for weights that fully_shard has sharded, want 'plain'"),
        ({"gradients": "factored", "model": model}, "gradients: got 'factored' for weights that fully_shard"),
        ({"refresh": "svd"}, "refresh: got 'svd' for weights that fully_shard has sharded, want 'subspace': svd needs"),
        ({"refresh": "streamed"}, "want 'subspace': its sums over several steps are in no checkpoint"),
        ({"optim_bits": 8}, "optim_bits: got 8 for parameters sharded over processes, want 32"),
    ]
    for settings, want in refused:
        message = raised(ValueError, lambda: galore(model, **settings))  # noqa: B023
        assert message.startswith("GaLoreAdamW: ") and want in message, message
    message = raised(ValueError, galore(model).reduce_across_ranks)
    assert "reduce_across_ranks: params: got weights that fully_shard reduces" in message, message
    columns = distribute_tensor(torch.ones(8, 6), init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(1)])
    message = raised(ValueError, lambda: GaLoreAdamW([{"params": [nn.Parameter(columns)], "rank": 2}]))
    assert "want one sharded by its rows over one dimension of processes" in message, message


CHECKS = [trajectories_are_those_of_one_process, half_precision, only_thin_blocks_travel, states_go_through_checkpoints]
IN_TWO = [resumed_from_a_checkpoint, a_whole_state_is_spread, only_thin_blocks_travel, what_cannot_be_done_is_refused]


def test_galore_under_fsdp2(tmp_path, monkeypatch):
    monkeypatch.setenv("GALORE_CHECKPOINT", str(tmp_path))
    for checks, world in ((CHECKS, 3), (IN_TWO, 2)):
        failed = {name: why for name, why in outcome_of(checks, world).items() if why}
        assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())
