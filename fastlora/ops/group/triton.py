"""A group of LoRA layers on one x with the group's Triton kernels: x read once for every S and once for every dA, the
low-rank part of dX written once; each member's frozen product by cuBLAS, or in the forward pass by the Triton GEMM
where its backend is `triton`. dX is accumulated by cuBLAS (beta = 1).

What is kept for dropout is a seed for each member: the kernels make the masks again wherever they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import group
from ...kernels.dropout import new_seed
from ...kernels.expand import expand
from ...kernels.launch import new, new_workspace, planned
from ..call import low_rank_dtype
from ..lora.cublas import low_rank_gradients

Tensors = list[Tensor | None]


def shrink(
    x: Tensor, lora_As: Sequence[Tensor], dropout_ps: Sequence[float], shared_mask: bool, narrow: bool = False
) -> tuple[list[Tensor], Tensors]:
    """(S, seeds): Sᵢ = dropᵢ(x) Aᵢᵀ (M, rᵢ); a seed is (1,) int64, None where nothing is dropped."""
    seeds: Tensors = []
    for p in dropout_ps:
        again = seeds[0] if shared_mask and seeds else None
        seeds.append(again if again is not None else new_seed(x.device) if p > 0.0 else None)
    dtypes = tuple([low_rank_dtype(x, a, None, narrow) for a in lora_As])
    return list(_shrink((x, *lora_As, *seeds), tuple(dropout_ps), shared_mask, dtypes)), seeds


@planned
def _shrink(tensors, dropout_ps, shared_mask, dtypes) -> tuple[Tensor, ...]:
    """S of each layer; tensors: x, every A, every seed."""
    x, n = tensors[0], len(dtypes)
    lora_As, seeds = tensors[1 : n + 1], tensors[n + 1 :]
    outs = [new(x, x.shape[0], a.shape[0], dtype=dtype) for a, dtype in zip(lora_As, dtypes, strict=True)]
    workspace = new_workspace(x, group.shrink_workspace(x, lora_As))
    group.group_shrink(x, lora_As, outs, workspace, seeds=seeds, dropout_ps=dropout_ps, shared_mask=shared_mask)
    return tuple(outs)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float, name: str
) -> Tensor:
    """One member's y (M, N) = x W0ᵀ + b + s·S Bᵀ, as the backend `name` makes it."""
    if name == "triton":
        return _gemm(x, weight, bias, s, lora_B, scaling)
    return _expand(s, lora_B, bias, scaling, x.dtype).addmm_(x, weight.t())


@planned
def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    from ...kernels.gemm import forward_gemm

    y = new(x, x.shape[0], weight.shape[0])
    forward_gemm(x, weight, bias, s, lora_B, y, scaling)
    return y


@planned
def _expand(s: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    y = new(s, s.shape[0], lora_B.shape[0], dtype=dtype)
    expand(s, lora_B, y, alpha=scaling, bias=bias)
    return y


def backward(
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
    first = next(ds for ds in dss if ds is not None)
    tensors = (first, dx, x, *dss, *lora_As, *states)
    dx, *grads = _shared_gradients(tensors, tuple(dropout_ps), shared_mask, needs_x, tuple(needs_as))
    return dx, grads


@planned
def _shared_gradients(tensors, dropout_ps, shared_mask, needs_x, needs_as) -> tuple[Tensor | None, ...]:
    """(dX, dA of each layer); tensors: a dS that is there, dX, x, every dS, every A, every seed."""
    first, dx, x, *others = tensors
    n = len(needs_as)
    dss, lora_As, states = others[:n], others[n : 2 * n], others[2 * n :]
    grads: Tensors = [None] * len(dss)
    used = [i for i, ds in enumerate(dss) if ds is not None]
    if needs_x:
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
    return dx if needs_x else None, *grads
