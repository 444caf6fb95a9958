"""A group of LoRA layers on one x, in plain ATen: the CPU's path and everyone's fallback.

What it saves over the layers one by one: x is read once for the S of all members that drop nothing, and once for their
dA; dX is accumulated in place (`addmm_`, beta = 1) instead of being made once a layer and added by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lora.aten import draw_keep_mask, dropout_scale, keep_mask

Tensors = list[Tensor | None]


def shrink(
    x: Tensor, lora_As: Sequence[Tensor], dropout_ps: Sequence[float], shared_mask: bool
) -> tuple[list[Tensor], Tensors]:
    """(S, dropout states): Sᵢ = dropᵢ(x) Aᵢᵀ (M, rᵢ); a state is the keep mask (M, K), None where all is kept."""
    states: Tensors = []
    for p in dropout_ps:
        again = states[0] if shared_mask and states else None
        states.append(again if again is not None else draw_keep_mask(x, p) if p > 0.0 else None)
    out: list[Tensor] = [x] * len(lora_As)
    for members in _of_one_input(states):
        first = members[0]
        keep, p = states[first], dropout_ps[first]
        dropped = x if keep is None else x * keep_mask(keep, x.shape, p)
        s = F.linear(dropped, _stacked([lora_As[i] for i in members], x.dtype))
        if keep is not None:
            s.mul_(dropout_scale(p))
        for i, part in zip(members, s.split([lora_As[i].shape[0] for i in members], dim=1), strict=True):
            out[i] = part
    return out, states


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float, name: str
) -> Tensor:
    """One member's y (M, N) = x W0ᵀ + b + s·S Bᵀ."""
    return F.linear(x, weight, bias).addmm_(s, lora_B.to(x.dtype).t(), alpha=scaling)


def backward(
    dy: Tensor,
    weight: Tensor | None,
    s: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dx: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One member's (dX, dS, dB), None where `needs` (x, S, lora_B) is False: dX = dx + dY W0, in place where dx is
    given, dS = s·dY B, dB = s·dYᵀ S."""
    needs_x, needs_s, needs_b = needs
    ds = grad_b = None
    if needs_b:
        assert s is not None and lora_B is not None
        grad_b = s.t().mm(dy).mul_(scaling).t().to(lora_B.dtype)  # as in backends/torch.py: the long side last
    if needs_s:
        assert lora_B is not None
        ds = dy.mm(lora_B.to(dy.dtype)).mul_(scaling)
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
    for every in _of_one_input(states):
        members = [i for i in every if dss[i] is not None]
        if not members:
            continue
        keep, p = states[members[0]], dropout_ps[members[0]]
        scale = 1.0 if keep is None else dropout_scale(p)
        ds = _stacked([dss[i] for i in members], None, dim=1)  # type: ignore[misc]
        mask = None if keep is None else keep_mask(keep, (ds.shape[0], lora_As[members[0]].shape[1]), p)  # type: ignore[union-attr]
        if needs_x:
            a = _stacked([lora_As[i] for i in members], ds.dtype)  # type: ignore[misc]
            if mask is not None:
                term = ds.mm(a)
                dx = term.mul_(mask).mul_(scale) if dx is None else dx.addcmul_(term, mask, value=scale)
            else:
                dx = ds.mm(a) if dx is None else dx.addmm_(ds, a)
        if any(needs_as[i] for i in members):
            assert x is not None
            grad = ds.t().mm(x if mask is None else x * mask)
            if mask is not None:
                grad.mul_(scale)
            ranks = [dss[i].shape[1] for i in members]  # type: ignore[union-attr]
            for i, part in zip(members, grad.split(ranks), strict=True):
                if needs_as[i]:
                    # A copy where it is a part: a parameter's .grad should not keep its neighbours' alive.
                    grads[i] = part.to(lora_As[i].dtype, copy=len(members) > 1)  # type: ignore[union-attr]
    return dx if needs_x else None, grads


def _of_one_input(states: Sequence[Tensor | None]) -> list[list[int]]:
    """Members that read the same drop(x), together: those that drop nothing, and those of one mask."""
    found: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        found.setdefault(id(state), []).append(i)
    return list(found.values())


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype | None, dim: int = 0) -> Tensor:
    if dtype is not None:
        matrices = [matrix.to(dtype) for matrix in matrices]
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim=dim)
