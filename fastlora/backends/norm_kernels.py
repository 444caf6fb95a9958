"""RMSNorm by the Triton kernels of kernels/rmsnorm.py, with the S of the layers that it feeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import rmsnorm
from .cublas import DTYPES, device_of

MAX_RANK = rmsnorm.MAX_RANK


def unsupported(x: Tensor, weight: Tensor, lora_As: Sequence[Tensor]) -> str | None:
    """None, or why the kernels cannot take the call."""
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        return f"needs bfloat16, float16 or float32, got {x.dtype} and {weight.dtype}"
    rank = sum(a.shape[0] for a in lora_As)
    return None if rank <= MAX_RANK else f"needs ranks of at most {MAX_RANK} together, got {rank}"


def forward(x: Tensor, weight: Tensor, eps: float, lora_As: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(y, rstd, S): y (M, K) = x · rstd · w, rstd (M,) fp32, Sᵢ (M, rᵢ) = y Aᵢᵀ. A copy of the A's, r·K numbers, is
    made to stack them."""
    with device_of(x):
        ranks = [a.shape[0] for a in lora_As]
        stacked = torch.cat([a.to(x.dtype) for a in lora_As])
        y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
        s = x.new_empty(x.shape[0], sum(ranks))
        rmsnorm.norm_shrink(x, weight, eps, y, rstd, stacked, s)
        return y, rstd, list(s.split(ranks, dim=1))


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dX (M, K) = rstd · (w ∘ dY) − x · rstd³ · mean(w ∘ dY ∘ x)."""
    with device_of(x):
        dx = x.new_empty(x.shape)
        rmsnorm.norm_backward(dy, x, weight, rstd, dx)
        return dx
