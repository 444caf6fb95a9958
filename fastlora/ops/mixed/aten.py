"""Several adapters in one batch, in plain ATen: the CPU's path and everyone's fallback.

The frozen layer runs once for the whole batch; each adapter's term is added to its own rows. Long runs of neighbouring
rows are views, which nothing is copied for; short ones (a token each, say) are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.segment_plan import Segments
from ..call import Adapter, low_rank_dtype
from ..lora.aten import add_product, draw_keep_mask, dropout_scale, ds_and_db, shrink, weight_grad

Rows = slice | Tensor
Tensors = list[Tensor | None]

MIN_RUN = 64  # rows; products of fewer cost more by themselves than gathering the rows does


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    segments: Segments,
    narrow: bool = False,
) -> tuple[Tensor, list[Tensor], Tensors]:
    """(y, each segment's S, each segment's keep mask or None): y = x W0ᵀ + b, and s·S Bᵀ in the segments' rows.

    x (M, K), weight (N, K), one adapter per segment, all of one dtype. S (of `call.low_rank_dtype`, without the
    dropout's scale: a rounding less) and the masks have the segment's rows in the segment's order.
    """
    y = F.linear(x, weight, bias)
    s: list[Tensor] = []
    states: Tensors = []
    for i, (a, b, scaling, p, *_) in enumerate(adapters):
        start, end = segments.starts[i : i + 2]
        keep = draw_keep_mask(x.new_empty(end - start, x.shape[1]), p) if p > 0.0 else None
        dtype = low_rank_dtype(x, a, b, narrow)
        down, up = a.to(dtype), b.to(dtype).t()
        parts = []
        for rows, span in _pieces(segments, i, x.device):
            part = shrink(_take(x, rows), down, None if keep is None else keep[span])
            _add_product(y, rows, part, up, scaling * _scale_of(keep, p))
            parts.append(part)
        s.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        states.append(keep)
    return y, s, states


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    s: Sequence[Tensor],
    states: Sequence[Tensor | None],
    segments: Segments,
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
    narrow: bool = False,
) -> tuple[Tensor | None, Tensors, Tensors]:
    """(dX, dAs, dBs), None where `needs` (x, each lora_A, each lora_B) is False."""
    needs_x, needs_as, needs_bs = needs
    dx = dy.mm(weight) if needs_x and weight is not None else None
    grad_as: Tensors = [None] * len(adapters)
    grad_bs: Tensors = [None] * len(adapters)
    for i, ((a, b, scaling, p, *_), keep) in enumerate(zip(adapters, states, strict=True)):
        dtype = s[i].dtype
        down = a.to(dtype)
        scale = scaling * _scale_of(keep, p)
        pieces = _pieces(segments, i, dy.device)
        for rows, span in pieces:
            needs_ds, mask = needs_x or needs_as[i], None if keep is None else keep[span]
            # dB in the wider dtype, as the sum of the pieces is.
            wide = b.to(torch.promote_types(dtype, b.dtype))
            ds, grad_b = ds_and_db(_take(dy, rows), wide, s[i][span], dtype, scale, scale, (needs_ds, needs_bs[i]))
            if grad_b is not None:
                grad_bs[i] = _plus(grad_bs[i], grad_b, len(pieces))
            if dx is not None and ds is not None:
                _add_product(dx, rows, ds, down, 1.0, mask)
            if needs_as[i]:
                assert x is not None and ds is not None
                grad_as[i] = _plus(grad_as[i], weight_grad(ds, _take(x, rows), mask), len(pieces))
        grad_a, grad_b = grad_as[i], grad_bs[i]
        if grad_a is not None:
            grad_as[i] = grad_a.to(a.dtype)
        if grad_b is not None:
            grad_bs[i] = grad_b.to(b.dtype)
    return dx, grad_as, grad_bs


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    segments: Segments,
    narrow: bool = False,
) -> Tensor:
    """The same y, differentiated by ATen's own autograd: the faster one for small problems on a CPU."""
    y = F.linear(x, weight, bias)
    for i, (a, b, scaling, p, *_) in enumerate(adapters):
        index = segments.index(i, x.device)
        dtype = low_rank_dtype(x, a, b, narrow)
        rows = x.index_select(0, index).to(dtype)
        s = F.linear(F.dropout(rows, p) if p > 0.0 else rows, a.to(dtype))
        sum_ = torch.addmm(y.index_select(0, index).to(dtype), s, b.to(dtype).t(), alpha=scaling)
        y = y.index_copy_(0, index, sum_.to(y.dtype))
    return y


def _pieces(segments: Segments, segment: int, device: torch.device) -> list[tuple[Rows, slice]]:
    """(rows, which of the segment's positions they are): runs as slices, or one tensor of row numbers."""
    runs = segments.runs(segment)
    start, end = segments.starts[segment : segment + 2]
    if len(runs) > 1 and end - start < MIN_RUN * len(runs):
        return [(segments.index(segment, device), slice(0, end - start))]
    pieces: list[tuple[Rows, slice]] = []
    at = 0
    for run in runs:
        pieces.append((run, slice(at, at + run.stop - run.start)))
        at += run.stop - run.start
    return pieces


def _take(matrix: Tensor, rows: Rows) -> Tensor:
    return matrix[rows] if isinstance(rows, slice) else matrix.index_select(0, rows)


def _scale_of(keep: Tensor | None, dropout_p: float) -> float:
    return 1.0 if keep is None else dropout_scale(dropout_p)


def _add_product(
    out: Tensor, rows: Rows, left: Tensor, right: Tensor, alpha: float, keep: Tensor | None = None
) -> None:
    """out[rows] += keep ∘ (alpha · left right)."""
    there = add_product(_take(out, rows), left, right, alpha, keep)
    if not isinstance(rows, slice):
        out.index_copy_(0, rows, there)


def _plus(total: Tensor | None, part: Tensor, pieces: int) -> Tensor:
    """The sum so far, in fp32 at least where there is more than one part: a rounding for each would add up."""
    if total is not None:
        return total.add_(part)
    return part.to(torch.promote_types(part.dtype, torch.float32)) if pieces > 1 else part
