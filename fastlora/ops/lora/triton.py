"""Triton throughout: the low-rank term is one more step of the frozen layer's own matrix product, in both directions.

    forward     S = drop(x) Aᵀ · y = x W0ᵀ + b + s·S Bᵀ in one kernel (triton_s_inside.py: which makes S too)
    backward    dS = s·dY B and dB = s·dYᵀ S in one pass over dY · dA = dSᵀ drop(x)
                dX = dY W0 + drop′(dS A) in one kernel

Unlike the `cublas` backend it neither writes the low-rank term nor reads it back (2MN forward, 2MK backward), and
the term is never rounded before it is added. That pays only where this GEMM comes within a few percent of cuBLAS.
What is kept for dropout is a seed: the kernels make the mask again wherever it is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.dropout import new_seed
from ...kernels.gemm import forward_gemm, input_grad_gemm
from ...kernels.launch import new, new_workspace, planned
from ...kernels.shrink import shrink, shrink_workspace
from ..call import low_rank_dtype
from .cublas import low_rank_gradients, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    dropout_state: Tensor | None = None,
    narrow: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, S, seed): y = x W0ᵀ + b + s·S Bᵀ with S = drop(x) Aᵀ; a `dropout_state` given replays that seed's mask.

    Shapes: docs/architecture.md, "The backend interface".
    """
    if dropout_p > 0.0 and dropout_state is None:
        dropout_state = new_seed(x.device)
    seed = dropout_state if dropout_p > 0.0 else None
    dtype = low_rank_dtype(x, lora_A, lora_B, narrow)
    y, s = _forward(x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, dtype)
    return y, s, dropout_state


@planned
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    s = new(x, x.shape[0], lora_A.shape[0], dtype=dtype)
    y = new(x, x.shape[0], lora_B.shape[0])
    shrink(x, lora_A, s, new_workspace(x, shrink_workspace(x, lora_A)), seed=seed, dropout_p=dropout_p)
    forward_gemm(x, weight, bias, s, lora_B, y, scaling)
    return y, s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    dropout_state: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
    narrow: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB), None where `needs` (x, lora_A, lora_B) is False."""
    seed = dropout_state if dropout_p > 0.0 else None
    return _backward(dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, needs, narrow)


@planned
def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
    narrow: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    ds, grad_a, grad_b = low_rank_gradients(dy, x, lora_A, lora_B, s, seed, scaling, dropout_p, needs, narrow)
    if not needs[0]:
        return None, grad_a, grad_b
    assert ds is not None
    assert lora_A is not None
    assert weight is not None
    dx = new(dy, dy.shape[0], weight.shape[1])
    input_grad_gemm(dy, weight, ds, lora_A, dx, seed=seed, dropout_p=dropout_p)
    return dx, grad_a, grad_b
