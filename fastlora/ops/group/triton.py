"""A group of LoRA layers on one x with the group's Triton kernels: x read once for every S and once for every dA, the
low-rank part of dX written once; each member's frozen product by cuBLAS, or in the forward pass by the Triton GEMM
where its backend is `triton`. dX is accumulated by cuBLAS (beta = 1).

What is kept for dropout is a seed for each member: the kernels make the masks again wherever they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import group
from ...kernels.dropout import new_seed
from ...kernels.expand import expand
from ...kernels.launch import new, new_workspace, planned, run_kept
from ..call import as_2d, low_rank_dtype
from ..lora.cublas import can_keep, low_rank_gradients, new_number

__all__ = ["backward", "can_keep", "forward", "keep", "kept", "member_backward", "member_forward", "new_number"]

Tensors = list[Tensor | None]


def forward(x, lora_As, weights, biases, lora_Bs, settings) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensors]:
    """(y of the members that `settings` names, S of all, seeds); the arguments: group.py, `GroupFunction`. A seed is
    (1,) int64, None where nothing is dropped."""
    seeds: Tensors = []
    for p in settings.dropout_ps:
        again = seeds[0] if settings.shared_mask and seeds else None
        seeds.append(again if again is not None else new_seed(x.device) if p > 0.0 else None)
    dtypes = tuple([low_rank_dtype(x, a, None, settings.narrow) for a in lora_As])
    names, k = settings.names, len(settings.names)
    inside = [weight if name == "triton" else None for weight, name in zip(weights, names)]
    made = _forward((x, *lora_As, *seeds, *lora_Bs, *biases, *inside), dtypes, *settings[1:5])
    for y, weight, name in zip(made, weights, names):
        if name != "triton":
            y.addmm_(x, weight.t())
    return made[:k], made[k:], seeds


def keep(x: Tensor, lora_As, weights, biases, lora_Bs, settings, number: int) -> bool:
    """Whether `kept` gives S and the low-rank terms of calls of this kind from now on: x as in `cublas.can_keep`, all
    members by cublas, no autocast, no dropout."""
    dtypes = tuple([low_rank_dtype(x, a, None, False) for a in lora_As])
    nothing = [None] * len(lora_As)
    args = ((as_2d(x), *lora_As, *nothing, *lora_Bs, *biases, *nothing), dtypes, *settings[1:5])
    return _forward.keep_as(number, (x, *lora_As, *lora_Bs, *biases, *weights), args)


def kept(x: Tensor, lora_As, weights, biases, lora_Bs, number: int) -> list[Tensor] | None:
    """[every y without the frozen layer, every S], or nothing where the call is of no kind that was kept."""
    return run_kept(number, (x, *lora_As, *lora_Bs, *biases, *weights))


@planned
def _forward(tensors, dtypes, names, scalings, dropout_ps, shared_mask) -> tuple[Tensor, ...]:
    """(y of each of the first members, S of each); tensors: x, every A, every seed, the first members' B, biases and,
    of those by triton, weights."""
    x, *others = tensors
    n, k = len(dtypes), len(names)
    lora_As, seeds, others = others[:n], others[n : 2 * n], others[2 * n :]
    ss = [new(x, x.shape[0], a.shape[0], dtype=dtype) for a, dtype in zip(lora_As, dtypes, strict=True)]
    workspace = new_workspace(x, group.shrink_workspace(x, lora_As))
    group.group_shrink(x, lora_As, ss, workspace, seeds=seeds, dropout_ps=dropout_ps, shared_mask=shared_mask)
    ys = []
    for s, lora_B, bias, weight, scaling in zip(ss, others[:k], others[k : 2 * k], others[2 * k :], scalings):
        ys.append(_term(x, weight, bias, s, lora_B, scaling, x.dtype))
    return (*ys, *ss)


def member_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float, name: str
) -> Tensor:
    """One member's y (M, N) = x W0ᵀ + b + s·S Bᵀ, as the backend `name` makes it."""
    if name == "triton":
        return _term(x, weight, bias, s, lora_B, scaling, x.dtype)
    return _term(s, None, bias, s, lora_B, scaling, x.dtype).addmm_(x, weight.t())


@planned
def _term(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """s·S Bᵀ + b; with a weight and x, x W0ᵀ too."""
    y = new(s, s.shape[0], lora_B.shape[0], dtype=dtype)
    if weight is None:
        expand(s, lora_B, y, alpha=scaling, bias=bias)
    else:
        from ...kernels.gemm import forward_gemm

        forward_gemm(x, weight, bias, s, lora_B, y, scaling)
    return y


def member_backward(
    dy: Tensor,
    weight: Tensor | None,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dx: Tensor | None,
    needs: tuple[bool, bool, bool],
    narrow: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One member's (dX, dS, dB), None where `needs` (x, S, lora_B) is False: dX = dx + dY W0, in place where dx is
    given; dS = s·dY B and dB = s·dYᵀ S in one pass over dY."""
    needs_x, needs_s, needs_b = needs
    ds, _, grad_b = _low_rank(dy, lora_B, s, scaling, needs_s, needs_b, narrow)
    if needs_x:
        assert weight is not None
        dx = dy.mm(weight) if dx is None else dx.addmm_(dy, weight)
    return dx if needs_x else None, ds, grad_b


def _low_rank(dy, lora_B, s, scaling, needs_s, needs_b, narrow):
    # dS is asked for as dX would ask for it; without its lora_A, dA is not made here.
    return low_rank_gradients(dy, None, None, lora_B, s, None, scaling, 0.0, (needs_s, False, needs_b), narrow)


def backward(
    dx: Tensor | None,
    x: Tensor | None,
    dys: Sequence[Tensor | None],
    dss: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor],
    ss: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    settings: Any,
    needs: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
) -> tuple[Tensor | None, Tensors, Tensors]:
    """(dX, dAs, dBs), as group/aten.py says: the low-rank part of dX first, then the frozen layers' onto it (cuBLAS,
    beta = 1)."""
    first = next(grad for grad in (*dys, *dss) if grad is not None)
    tensors = (first, dx, x, *dys, *dss, *lora_As, *lora_Bs, *ss, *states)
    dx, *grads = _backward(tensors, settings.scalings, *settings[3:], *needs)
    if dx is not None:
        for dy, weight in zip(dys, weights):
            if dy is not None and weight is not None:
                dx.addmm_(dy, weight)
    n = len(lora_As)
    return dx, grads[:n], grads[n:]


@planned
def _backward(
    tensors, scalings, dropout_ps, shared_mask, narrow, needs_x, needs_as, needs_bs
) -> tuple[Tensor | None, ...]:
    """(dX but for the frozen layers' part, every dA, every dB); tensors: a dY or dS that is there, dX, x, every dY,
    every dS of other members, every A, B, S and seed."""
    first, dx, x, *others = tensors
    n, k = len(needs_as), len(needs_bs)
    grads: Tensors = [None] * n
    grad_bs: Tensors = [None] * k
    dss = others[:n]
    lora_As, lora_Bs, ss, states = others[n : 2 * n], others[2 * n : 2 * n + k], others[2 * n + k :][:k], others[-n:]
    for i, dy in enumerate(dss[:k]):
        if dy is not None:
            needs_ds = needs_x or needs_as[i]
            dss[i], _, grad_bs[i] = _low_rank(dy, lora_Bs[i], ss[i], scalings[i], needs_ds, needs_bs[i], narrow)
    used = [i for i, ds in enumerate(dss) if ds is not None]
    if needs_x and used:
        accumulate = dx is not None
        if dx is None:
            dx = new(x if x is not None else first, first.shape[0], lora_As[used[0]].shape[1])
        group.group_expand(
            [dss[i] for i in used],
            [lora_As[i].t() for i in used],
            dx,
            accumulate=accumulate,
            seeds=[states[i] for i in used],
            dropout_ps=[dropout_ps[i] for i in used],
        )
    trained = [i for i in used if needs_as[i]]
    if trained:
        assert x is not None
        for i in trained:
            grads[i] = new(lora_As[i], *lora_As[i].shape)
        workspace = new_workspace(x, group.weight_grad_workspace(x, [dss[i].shape[1] for i in trained]))
        group.group_weight_grad(
            x,
            [dss[i] for i in trained],
            [grads[i].t() for i in trained],  # type: ignore[union-attr]
            workspace,
            seeds=[states[i] for i in trained],
            dropout_ps=[dropout_ps[i] for i in trained],
            shared_mask=shared_mask,
        )
    return dx if needs_x else None, *grads, *grad_bs
