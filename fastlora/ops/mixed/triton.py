"""Several adapters in one batch with the segment kernels: each low-rank pass in one launch whatever the number of
adapters, the frozen products by cuBLAS.

Where every row has an adapter, the low-rank term is written first and cuBLAS adds the frozen layer onto it (beta = 1),
as in lora/cublas.py. Otherwise the frozen layer comes first, and rows without an adapter keep its very bits.

What is kept for dropout is one seed: rows differ, so no two adapters see the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dropout import new_seed
from ...kernels.launch import device_of, new_workspace
from ...kernels.segment_factors import Factors, factors_of
from ...kernels.segment_grads import (
    segment_ds_db,
    segment_ds_db_workspace,
    segment_weight_grad,
    segment_weight_grad_workspace,
)
from ...kernels.segment_plan import Segments
from ...kernels.segments import segment_expand, segment_shrink, segment_shrink_workspace
from ..call import Adapter, low_rank_dtype

Tensors = list[Tensor | None]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    segments: Segments,
    narrow: bool = False,
) -> tuple[Tensor, list[Tensor], Tensors]:
    """(y, [S], [seed or None]): y = x W0ᵀ + b, and s·S Bᵀ in the segments' rows. S is (positions, largest rank)."""
    with device_of(x):
        lora_As, lora_Bs, factors = _factors(adapters)
        seed = new_seed(x.device) if factors.any_dropout else None
        dtype = low_rank_dtype(x, lora_As[0], lora_Bs[0], narrow)
        s = x.new_empty(segments.num_positions, factors.max_rank, dtype=dtype)
        workspace = new_workspace(x, segment_shrink_workspace(x, segments, factors))
        segment_shrink(x, segments, factors, s, workspace, seed=seed)
        if segments.covers_all_rows:
            y = x.new_empty(x.shape[0], weight.shape[0])
            segment_expand(s, segments, factors, y, bias=bias, accumulate=False)
            y.addmm_(x, weight.t())
        else:
            y = F.linear(x, weight, bias)
            segment_expand(s, segments, factors, y)
        return y, [s], [seed]


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
    """(dX, dAs, dBs), None where `needs` (x, each lora_A, each lora_B) is False.

    An adapter whose gradient is not needed costs its part of the pass all the same.
    """
    needs_x, needs_as, needs_bs = needs
    (s0,), (seed,) = s, states
    grad_as: Tensors = [None] * len(adapters)
    grad_bs: Tensors = [None] * len(adapters)
    with device_of(dy):
        lora_As, lora_Bs, factors = _factors(adapters)
        ds = torch.empty_like(s0)
        if any(needs_bs):
            flat = lora_Bs[0].new_empty(sum(b.numel() for b in lora_Bs))
            workspace = dy.new_empty(segment_ds_db_workspace(dy, segments, factors), dtype=torch.float32)
            segment_ds_db(dy, segments, factors, s0, ds, flat, workspace)
            grad_bs = _views(flat, lora_Bs, needs_bs)
        elif needs_x or any(needs_as):
            workspace = new_workspace(dy, segment_shrink_workspace(dy, segments, factors))
            segment_shrink(dy, segments, factors, ds, workspace, by_b=True)
        dx = None
        if needs_x:
            assert weight is not None
            dx = _input_gradient(dy, weight, ds, segments, factors, seed)
        if any(needs_as):
            assert x is not None
            flat = lora_As[0].new_empty(sum(a.numel() for a in lora_As))
            workspace = x.new_empty(segment_weight_grad_workspace(x, segments, factors), dtype=torch.float32)
            segment_weight_grad(x, segments, factors, ds, flat, workspace, seed=seed)
            grad_as = _views(flat, lora_As, needs_as)
    return dx, grad_as, grad_bs


def _input_gradient(dy, weight, ds, segments, factors, seed) -> Tensor:
    if not segments.covers_all_rows:
        dx = dy.mm(weight)
        segment_expand(ds, segments, factors, dx, by_a=True, seed=seed)
        return dx
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    segment_expand(ds, segments, factors, dx, by_a=True, accumulate=False, seed=seed)
    return dx.addmm_(dy, weight)


def _factors(adapters: Sequence[Adapter]) -> tuple[list[Tensor], list[Tensor], Factors]:
    """Every lora_A and lora_B, contiguous, and what the kernels read of them."""
    lora_As = [adapter.lora_A.contiguous() for adapter in adapters]
    lora_Bs = [adapter.lora_B.contiguous() for adapter in adapters]
    return (
        lora_As,
        lora_Bs,
        factors_of(lora_As, lora_Bs, [a.scaling for a in adapters], [a.dropout_p for a in adapters]),
    )


def _views(flat: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]) -> Tensors:
    parts = flat.split([factor.numel() for factor in factors])
    return [part.view(factor.shape) if need else None for part, factor, need in zip(parts, factors, needs, strict=True)]
