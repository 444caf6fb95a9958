"""A group of LoRA layers on one x, in plain ATen: the CPU's path and everyone's fallback.

What it saves over the layers one by one: x is read once for the S of all members that drop nothing, and once for their
dA; dX is accumulated in place (`addmm_`, beta = 1) instead of being made once a layer and added by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import low_rank_dtype
from ..lora import aten as lora_aten
from ..lora.aten import draw_keep_mask, dropout_scale, keep_mask

Tensors = list[Tensor | None]


def shrink(
    x: Tensor, lora_As: Sequence[Tensor], dropout_ps: Sequence[float], shared_mask: bool, narrow: bool = False
) -> tuple[list[Tensor], Tensors]:
    """(S, dropout states): Sᵢ = dropᵢ(x) Aᵢᵀ (M, rᵢ), of `call.low_rank_dtype`; a state is the keep mask (M, K), None
    where all is kept."""
    states: Tensors = []
    for p in dropout_ps:
        again = states[0] if shared_mask and states else None
        states.append(again if again is not None else draw_keep_mask(x, p) if p > 0.0 else None)
    out: list[Tensor] = [x] * len(lora_As)
    dtypes = [low_rank_dtype(x, a, None, narrow) for a in lora_As]
    for members in _of_one_input(states, dtypes):
        first = members[0]
        keep, p = states[first], dropout_ps[first]
        mask = None if keep is None else keep_mask(keep, x.shape, p)
        s = lora_aten.shrink(x, _stacked([lora_As[i] for i in members], dtypes[first]), mask)
        if keep is not None:
            s.mul_(dropout_scale(p))
        for i, part in zip(members, s.split([lora_As[i].shape[0] for i in members], dim=1), strict=True):
            out[i] = part
    return out, states


def forward(x, lora_As, weights, biases, lora_Bs, settings) -> tuple[list[Tensor], list[Tensor], Tensors]:
    """(y of the members that `settings` (group.Settings) names, S of all, dropout states); the arguments: group.py,
    `GroupFunction`."""
    ss, states = shrink(x, lora_As, settings.dropout_ps, settings.shared_mask, settings.narrow)
    first = zip(weights, biases, ss, lora_Bs, settings.scalings, settings.names)
    return [member_forward(x, *one) for one in first], ss, states


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
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
) -> tuple[Tensor | None, Tensors, Tensors]:
    """(dX, dAs, dBs) of what `forward` has run: dys are of the first members, dss of the others, and dX, in place where
    dx is given, is theirs and dx. `needs`: x, every A, every B."""
    needs_x, needs_as, needs_bs = needs
    every: Tensors = []
    grad_bs: Tensors = []
    for i, dy in enumerate(dys):
        ds = grad_b = None
        if dy is not None:
            wanted = (needs_x, needs_x or needs_as[i], needs_bs[i])
            member = (weights[i], ss[i], lora_Bs[i], settings.scalings[i])
            dx, ds, grad_b = member_backward(dy, *member, dx, wanted, settings.narrow)
        every.append(ds)
        grad_bs.append(grad_b)
    every += dss
    shared = (dx, x, every, lora_As, states, settings.dropout_ps, settings.shared_mask, needs_x, needs_as)
    return *shared_gradients(*shared), grad_bs


def member_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float, name: str
) -> Tensor:
    """One member's y (M, N) = x W0ᵀ + b + s·S Bᵀ."""
    return lora_aten.add_product(F.linear(x, weight, bias), s, lora_B.to(s.dtype).t(), scaling)


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
    given, dS = s·dY B, dB = s·dYᵀ S."""
    needs_x, needs_s, needs_b = needs
    dtype = low_rank_dtype(dy, None, lora_B, narrow) if s is None else s.dtype
    ds, grad_b = lora_aten.ds_and_db(dy, lora_B, s, dtype, scaling, scaling, (needs_s, needs_b))
    if needs_x:
        assert weight is not None
        dx = dy.mm(weight) if dx is None else dx.addmm_(dy, weight)
    return dx if needs_x else None, ds, grad_b


def shared_gradients(
    dx: Tensor | None,
    x: Tensor | None,
    dss: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    dropout_ps: Sequence[float],
    shared_mask: bool,
    needs_x: bool,
    needs_as: Sequence[bool],
) -> tuple[Tensor | None, Tensors]:
    """(dX, dAs): dX = dx + Σ dropᵢ′(dSᵢ Aᵢ), in place where dx is given, and dAᵢ = dSᵢᵀ dropᵢ(x).

    A member whose dS is None (its output was not used) costs nothing and gets None.
    """
    grads: Tensors = [None] * len(dss)
    for every in _of_one_input(states, [None if ds is None else ds.dtype for ds in dss]):
        members = [i for i in every if dss[i] is not None]
        if not members:
            continue
        keep, p = states[members[0]], dropout_ps[members[0]]
        scale = 1.0 if keep is None else dropout_scale(p)
        ds = _stacked([dss[i] for i in members], None, dim=1)  # type: ignore[misc]
        mask = None if keep is None else keep_mask(keep, (ds.shape[0], lora_As[members[0]].shape[1]), p)  # type: ignore[union-attr]
        if needs_x:
            a = _stacked([lora_As[i] for i in members], ds.dtype)  # type: ignore[misc]
            dx = ds.new_zeros(ds.shape[0], a.shape[1]) if dx is None else dx
            lora_aten.add_product(dx, ds, a, scale, mask)
        if any(needs_as[i] for i in members):
            assert x is not None
            grad = lora_aten.weight_grad(ds, x, mask)
            if mask is not None:
                grad.mul_(scale)
            ranks = [dss[i].shape[1] for i in members]  # type: ignore[union-attr]
            for i, part in zip(members, grad.split(ranks), strict=True):
                if needs_as[i]:
                    # A copy where it is a part: a parameter's .grad should not keep its neighbours' alive.
                    grads[i] = part.to(lora_As[i].dtype, copy=len(members) > 1)  # type: ignore[union-attr]
    return dx if needs_x else None, grads


def _of_one_input(states: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[list[int]]:
    """Members that read the same drop(x) in one dtype, together: those that drop nothing, and those of one mask."""
    found: dict[tuple, list[int]] = {}
    for i, (state, dtype) in enumerate(zip(states, dtypes, strict=True)):
        found.setdefault((id(state), dtype), []).append(i)
    return list(found.values())


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype | None, dim: int = 0) -> Tensor:
    if dtype is not None:
        matrices = [matrix.to(dtype) for matrix in matrices]
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim=dim)
