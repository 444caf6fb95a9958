"""One sketch of several: of all processes' data, and of several tasks, Σ wₖ Gₖ/size(Gₖ), for one adapter that serves
them all.

A sketch is G ≈ QZᵀ, so the sum's is [Q₁ Q₂ …][w₁Z₁ w₂Z₂ …]ᵀ, brought back to c columns by QR and one small SVD: all
tasks at once, so that what each holds is cut once. Between processes c columns of Q and Z travel for each layer, never
a matrix of n×m. Refining sums are linear in G and simply add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..runtime import processes
from ..runtime.checks import check_choice, is_positive
from .sketch import GradientSketch, check_alike
from .streaming import StreamingSketch


def merge_across_ranks(sketch: GradientSketch) -> None:
    """Gives every rank the sketch of all ranks' data. All ranks must call it; layers some of them never saw count as 0.

    A first pass merges the ranks' (Q, Z) in the order of ranks, by QR and a small SVD; a refining pass is linear in the
    gradient, so that it is a sum.
    """
    _merge_rounds(sketch)
    for name, (n, m) in sketch.sizes.items():
        mine = sketch.layer(name, n, m)
        if mine.refining:
            processes.add(mine.refined_y, mine.refined_z)
            (mine.refined_updates,) = processes.added(mine.refined_updates)
            continue
        merged, *others = (_unpack(packed, mine) for packed in processes.gathered(_pack(mine)))
        for other in others:
            merged.merge(other)
        for key in mine.STATE:
            setattr(mine, key, getattr(merged, key))
        mine.tokens, mine.updates, mine.skipped = processes.added(mine.tokens, mine.updates, mine.skipped)


def _merge_rounds(sketch: GradientSketch) -> None:
    now = sketch._present_round
    steps = [int(other) for other in processes.gathered(torch.tensor([now.steps]))]
    if len(set(steps)) > 1:
        raise ValueError(f"GradientSketch: step: the processes made {steps} steps, want the same in all of them")
    (now.weight,) = processes.added(float(now.weight))


def _pack(layer: StreamingSketch) -> torch.Tensor:
    return torch.cat([part.flatten() for part in layer.state().values()])


def _unpack(packed: torch.Tensor, like: StreamingSketch) -> StreamingSketch:
    part = type(like)(like.n, like.m, like.width, like.seed, like.device)
    own = [getattr(part, key) for key in part.STATE]
    for key, old, new in zip(part.STATE, own, packed.split([tensor.numel() for tensor in own])):
        setattr(part, key, new.view_as(old).to(old))
    return part


NORMALIZATIONS = ("mean", "norm", "sum")


_WHERE = "GradientSketch.combine"


def combine(sketches: Sequence[GradientSketch], weights: Sequence[float] | None, normalize: str) -> GradientSketch:
    """See `GradientSketch.combine`."""
    sketches = list(sketches)
    if not sketches or not all(isinstance(sketch, GradientSketch) for sketch in sketches):
        kinds = ", ".join(type(sketch).__name__ for sketch in sketches)
        raise ValueError(f"{_WHERE}: sketches: got [{kinds}], want one GradientSketch or more")
    check_alike(f"{_WHERE}: sketches", sketches)
    weights = [1.0] * len(sketches) if weights is None else list(weights)
    if len(weights) != len(sketches) or not all(map(is_positive, weights)):
        raise ValueError(f"{_WHERE}: weights: got {weights}, want {len(sketches)} positive numbers")
    check_choice(_WHERE, "normalize", normalize, NORMALIZATIONS)
    if sketches[0].accumulate == "components":
        raise ValueError(f'{_WHERE}: sketches: got some with accumulate="components", want "sum" or "signed"')
    scales = [weight / _size(sketch, normalize) for sketch, weight in zip(sketches, weights)]
    first = sketches[0]
    joint = GradientSketch.like(first, width=max(sketch.width for sketch in sketches))
    for name, (n, m) in first.sizes.items():
        parts = [sketch.layer(name, n, m) for sketch in sketches]
        joint.layers[name] = _joined(parts, scales, joint.layer(name, n, m))
    joint.joint = True
    joint._round.weight = sum(scale * sketch.total_weight for scale, sketch in zip(scales, sketches))
    return joint


def _size(sketch: GradientSketch, normalize: str) -> float:
    """What a task's gradient is divided by."""
    if normalize == "sum":
        return 1.0
    if normalize == "norm":
        size = math.sqrt(sum(layer.squared_norm() for layer in sketch.layers.values() if layer.has_gradient))
    else:
        size = sketch.total_weight
    if size <= 0:
        raise ValueError(f"{_WHERE}: sketches: got one without a gradient; run backward passes inside it first")
    return size


def _joined(parts: list[StreamingSketch], scales: list[float], into: StreamingSketch) -> StreamingSketch:
    device = into.device
    for key in into.STATE[2:]:
        setattr(into, key, _total([getattr(part, key) for part in parts], scales, device))
    into.tokens, into.updates, into.skipped = (
        sum(getattr(part, count) for part in parts) for count in ("tokens", "updates", "skipped")
    )
    first = parts[0]
    if all(_has_bases_of(first, part) for part in parts):
        into.q, into.row_basis = first.q.to(device, copy=True), first.row_basis.to(device, copy=True)  # type: ignore[union-attr]
        for summed in ("z", "refined_y", "refined_z"):
            setattr(into, summed, _total([getattr(part, summed) for part in parts], scales, device))
        into.refined_updates = sum(part.refined_updates for part in parts)
        return into
    factors = [part.factors() for part in parts]
    into.set_product(
        torch.cat([q.to(device) for q, _ in factors], dim=1),
        torch.cat([scale * z.to(device) for scale, (_, z) in zip(scales, factors)], dim=1),
    )
    return into


def _has_bases_of(first: StreamingSketch, part: StreamingSketch) -> bool:
    """Whether both were refined with the same Q and P, so that their sums add."""
    if not (first.refined_updates and part.refined_updates) or first.q.shape != part.q.shape:
        return False
    mine, theirs = first.row_basis, part.row_basis
    assert mine is not None and theirs is not None
    return torch.equal(first.q, part.q.to(first.device)) and torch.equal(mine, theirs.to(first.device))


def _total(tensors: list[torch.Tensor], scales: list[float], device: torch.device) -> torch.Tensor:
    return torch.stack([scale * tensor.to(device) for scale, tensor in zip(scales, tensors)]).sum(0)
