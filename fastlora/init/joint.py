"""One sketch of several tasks: Σ wₖ Gₖ/norm(Gₖ) from the sketches of the Gₖ, which is what to hand to LoRA-GA where one
adapter is to serve them all.

A sketch is G ≈ QZᵀ, so the sum's is [Q₁ Q₂ …][w₁Z₁ w₂Z₂ …]ᵀ, brought back to c columns by QR and one small SVD: all
tasks at once, so that what each holds is cut once. Refining sums are linear in G and simply add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .sketch import GradientSketch, check_alike
from .streaming import StreamingSketch

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
    if len(weights) != len(sketches) or not all(_is_positive(weight) for weight in weights):
        raise ValueError(f"{_WHERE}: weights: got {weights}, want {len(sketches)} positive numbers")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"{_WHERE}: normalize: got {normalize!r}, want one of {', '.join(NORMALIZATIONS)}")
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
    into.probed = _total([part.probed for part in parts], scales, device)
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


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
