"""The experts' linear layer with the segment kernels: each low-rank pass of all experts in one launch, the frozen
product by `torch.nn.functional.grouped_mm`. Nothing waits for the device, which makes the tables of rows itself
(`segment_plan.Routed`).

The frozen product comes first and the term is added onto it: grouped_mm adds onto nothing. Rows are gathered for the
frozen product alone; the kernels read x[row] where x lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dropout import reference_keep_mask
from ...kernels.launch import DTYPES, INTERPRETED, MAX_RANK, device_of, new_workspace
from ...kernels.segment_factors import Factors, expert_factors
from ...kernels.segment_grads import (
    segment_ds_db,
    segment_ds_db_workspace,
    segment_weight_grad,
    segment_weight_grad_workspace,
)
from ...kernels.segment_plan import Routed, is_capturing, places_of
from ...kernels.segments import segment_expand, segment_shrink, segment_shrink_workspace
from ..call import low_rank_dtype
from . import aten
from .aten import Needs, Options, Tensors
from .routing import inverse


def unsupported(x: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], options: Options) -> str | None:
    """None, or why the kernels cannot take a call."""
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return f"needs tensors on a CUDA device, got {x.device}"
    dtypes = {x.dtype, *(factor.dtype for factor in (*lora_As, *lora_Bs))}
    if not dtypes <= set(DTYPES):
        return f"needs bfloat16, float16 or float32, got {', '.join(sorted(map(str, dtypes)))}"
    if any(a.shape[1] > MAX_RANK for a in lora_As):
        return f"needs ranks up to {MAX_RANK}, got {max(a.shape[1] for a in lora_As)}"
    if options.materialise or 0 in x.shape:
        return "W + ΔW and empty inputs are left to ATen"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    combine: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor]]:
    """(y (P, N), or with `combine` (T, N), each adapter's S (P, r)), as `aten.forward`."""
    with device_of(x):
        y = _frozen(aten.rows_of(x, order, options), weight, order, offsets, options, options.is_transposed)
        plans = _plans(order, offsets, options)
        plan, s = plans["tokens" if options.gathered else "sorted"], []
        for i, (a, b) in enumerate(zip(lora_As, lora_Bs, strict=True)):
            factors, own_seed, _kept = _factors(a, b, seed, i, options)
            s.append(x.new_empty(order.shape[0], a.shape[1], dtype=low_rank_dtype(x, a, b, options.narrow)))
            workspace = new_workspace(x, segment_shrink_workspace(x, plan, factors))
            segment_shrink(x, plan, factors, s[i], workspace, seed=own_seed)
            last = combine is not None and i == len(lora_As) - 1
            out = torch.empty_like(y) if last else y
            to: dict[str, Any] = {"base": y, "weights": aten.weights_of(combine, order)} if last else {}
            segment_expand(
                s[i], plans["order" if last else "sorted"], factors, out, bias=bias if i == 0 else None, **to
            )
            y = out
        if not s:
            y = _finished(y, bias, offsets)
            return (y if combine is None else aten.combined(y, combine, order)), s
        return (y if combine is None else aten.summed(y, options.top_k, combine.dtype)), s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    s: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    combine: Tensor | None,
    options: Options,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensors, Tensors]:
    """(dX, dW, db, dcombine, dAs, dBs), as `aten.backward`, which makes the dense dW and db."""
    dw = db = dots = None
    if needs.weight or needs.bias:
        dense = options.without_adapters(), Needs(False, needs.weight, needs.bias, (), ())
        _, dw, db, *_ = aten.backward(dy, x, weight, bias, [], [], [], order, offsets, None, combine, *dense)
    grad_as: Tensors = [None] * len(lora_As)
    grad_bs: Tensors = [None] * len(lora_Bs)
    with device_of(dy):
        plans, weights = _plans(order, offsets, options), aten.weights_of(combine, order)
        plan_of_x = plans["tokens" if options.gathered else "sorted"]
        plan_of_dy = plans["sorted" if combine is None else "tokens"]
        dx = rows = None
        if needs.rows:
            unsorted = options._replace(gathered=combine is not None)
            dx = _frozen(aten.rows_of(dy, order, unsorted), weight, order, offsets, options, not options.is_transposed)
        if needs.combine:
            assert x is not None
            rows = aten.rows_of(x, order, options).contiguous()
        for i, (a, b) in enumerate(zip(lora_As, lora_Bs, strict=True)):
            if not (needs.rows or needs.lora_As[i] or needs.lora_Bs[i]):
                continue
            factors, own_seed, _kept = _factors(a, b, seed, i, options)
            ds = dy.new_empty(order.shape[0], a.shape[1], dtype=low_rank_dtype(dy, a, b, options.narrow))
            if needs.lora_Bs[i]:
                grad = factors.like.new_empty(b.shape)
                workspace = dy.new_empty(segment_ds_db_workspace(dy, plan_of_dy, factors), dtype=torch.float32)
                segment_ds_db(dy, plan_of_dy, factors, _weighted(s[i], weights), ds, grad.view(-1), workspace)
                grad_bs[i] = grad.to(b.dtype)
            else:
                workspace = new_workspace(dy, segment_shrink_workspace(dy, plan_of_dy, factors))
                segment_shrink(dy, plan_of_dy, factors, ds, workspace, by_b=True)
            if dx is not None:
                last = i == len(lora_As) - 1
                base, to = None, plans["sorted"]
                if last and options.gathered:  # into the order of the tokens, whose rows are summed below
                    base, dx, to = dx, torch.empty_like(dx), plans["order"]
                of: dict[str, Any] = {"base": base, "weights": weights, "x": rows} if last else {}
                dots = segment_expand(ds, to, factors, dx, by_a=True, seed=own_seed, **of)
            if needs.lora_As[i]:
                assert x is not None
                grad = factors.like.new_empty(a.shape)
                workspace = x.new_empty(segment_weight_grad_workspace(x, plan_of_x, factors), dtype=torch.float32)
                segment_weight_grad(
                    x, plan_of_x, factors, _weighted(ds, weights), grad.view(-1), workspace, seed=own_seed
                )
                grad_as[i] = grad.to(a.dtype)
        if dx is not None and not lora_As:
            _finished(dx, None, offsets)
            dots = None if rows is None else torch.sum(dx * rows, 1, dtype=torch.float32)
            dx = _weighted(dx, weights)
            dx = dx[inverse(order)] if options.gathered else dx
        if dots is not None and bias is not None:
            expert, none = _experts_of(order, offsets)
            every = torch.mm(dy, bias.to(dy.dtype).t())[order // options.top_k, expert]
            dots += every.masked_fill_(none, 0.0)
        if dx is not None and options.gathered:
            dx = aten.summed(dx, options.top_k)
    return dx if needs.x else None, dw, db, aten.grad_of(combine, dots, order), grad_as, grad_bs


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else (rows * weights).to(rows.dtype)


def keep_mask(seed: Tensor | None, adapter: int, num_rows: int, columns: int, p: float) -> Tensor | None:
    """What the kernels keep of the sorted rows for one of the adapters (P, K), as `aten.keep_mask`."""
    return None if p == 0.0 or seed is None else reference_keep_mask(seed + adapter, num_rows, columns, p)


def _frozen(
    rows: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, options: Options, is_transposed: bool
) -> Tensor:
    """rows (P, K) times each expert's weight; rows that no expert takes hold anything. By ATen an expert at a time what
    grouped_mm refuses: rows of no multiple of 16 bytes."""
    rows = rows.contiguous()
    w = weight.to(rows.dtype)
    w = w if is_transposed else w.transpose(1, 2)
    if all(_fits(t) for t in (rows, w)) and w.shape[2] * w.element_size() % 16 == 0:
        return F.grouped_mm(rows, w, offs=offsets)
    plain = options.without_adapters()._replace(is_transposed=is_transposed, gathered=False)
    return aten.forward(rows, weight, None, [], [], order, offsets, None, None, plain)[0]


def _fits(t: Tensor) -> bool:
    """One of the last two strides is 1 and the others are multiples of 16 bytes."""
    strides = sorted(t.stride()[-2:])
    others = (*strides[1:], *t.stride()[:-2])
    return strides[0] == 1 and t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in others)


def _plans(order: Tensor, offsets: Tensor, options: Options) -> dict[str, Any]:
    """For what is sorted, for what lies in the order of the tokens (T rows), and in that of the routed ones (T·k)."""
    kept: dict[str, Any] = {}
    capturing = is_capturing(places_of(order.device))  # what a capture makes is there in replays only
    if options.routing is not None and not capturing:
        kept = options.routing.kept
    if not kept:
        kept["sorted"] = Routed(offsets, order.shape[0])
        kept["tokens"] = kept["sorted"].gathering((order // options.top_k).int())
        kept["order"] = kept["sorted"].gathering(order.int())
    return kept


def _finished(y: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """What `segment_expand` does next to adding the term: the bias, and zeros in rows that no expert takes."""
    expert, none = _experts_of(y, offsets)
    if bias is not None:
        y.add_(bias[expert])
    return y.masked_fill_(none[:, None], 0.0)


def _experts_of(rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(the expert of each of the sorted rows, 0 for none; which have none)."""
    expert = torch.searchsorted(offsets, torch.arange(rows.shape[0], device=rows.device), right=True)
    none = expert == offsets.shape[0]
    return expert.masked_fill(none, 0), none


def _factors(a: Tensor, b: Tensor, seed: Tensor | None, i: int, options: Options) -> tuple[Factors, Tensor | None, Any]:
    """(the adapter's factors in one dtype, what its mask is made from, what must live until the kernels are launched:
    the factors hold addresses, and PEFT's lora_B, expert fastest, is copied)."""
    wide, p = torch.promote_types(a.dtype, b.dtype), options.dropout_ps[i]
    a, b = a.to(wide).contiguous(), b.to(wide).contiguous()
    return expert_factors(a, b, options.scalings[i], p), None if seed is None or not p else seed + i, (a, b)
