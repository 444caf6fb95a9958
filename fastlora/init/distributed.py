"""Sketches of several processes as one: c columns of Q and Z travel for each layer, never a matrix of n×m."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .streaming import PROBES, StreamingSketch

if TYPE_CHECKING:
    from .sketch import GradientSketch


def merge_across_ranks(sketch: GradientSketch) -> None:
    """Gives every rank the sketch of all ranks' data. All ranks must call it; layers some of them never saw count as 0.

    A first pass merges the ranks' (Q, Z) in the order of ranks, by QR and a small SVD; a refining pass is linear in the
    gradient, so that it is a sum.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    _merge_rounds(sketch, device)
    for name, (n, m) in sketch.sizes.items():
        mine = sketch.layer(name, n, m)
        if mine.refining:
            _sum(mine.refined_y, device)
            _sum(mine.refined_z, device)
            updates = torch.tensor([mine.refined_updates])
            _sum(updates, device)
            mine.refined_updates = int(updates)
            continue
        merged = _merged([_unpack(packed, mine) for packed in _gather(_pack(mine), device)])
        mine.q, mine.z, mine.probed = merged.q, merged.z, merged.probed
        counts = torch.tensor([mine.tokens, mine.updates, mine.skipped])
        _sum(counts, device)
        mine.tokens, mine.updates, mine.skipped = counts.tolist()


def _merge_rounds(sketch: GradientSketch, device: torch.device) -> None:
    now = sketch._present_round
    steps = [int(other) for other in _gather(torch.tensor([now.steps]), device)]
    if len(set(steps)) > 1:
        raise ValueError(f"GradientSketch: step: the processes made {steps} steps, want the same in all of them")
    weight = torch.tensor([now.weight], dtype=torch.float64)
    _sum(weight, device)
    now.weight = float(weight)


def _merged(parts: list[StreamingSketch]) -> StreamingSketch:
    first, *rest = parts
    for part in rest:
        first.merge(part)
    return first


def _sum(tensor: torch.Tensor, device: torch.device) -> None:
    moved = tensor.to(device)
    dist.all_reduce(moved)
    tensor.copy_(moved)


def _gather(packed: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    moved = packed.to(device)
    gathered = [torch.empty_like(moved) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, moved)
    return gathered


def _pack(layer: StreamingSketch) -> torch.Tensor:
    return torch.cat((layer.q.flatten(), layer.z.flatten(), layer.probed.flatten()))


def _unpack(packed: torch.Tensor, like: StreamingSketch) -> StreamingSketch:
    part = StreamingSketch(like.n, like.m, like.width, like.seed, like.device)
    q, z, probed = packed.to(like.device).split([like.n * like.width, like.m * like.width, like.n * PROBES])
    part.q, part.z, part.probed = q.view_as(like.q), z.view_as(like.z), probed.view_as(like.probed)
    return part
