"""The `triton` backend with S made inside the forward GEMM, which then reads x once and not twice.

A candidate of its own, because its forward kernel is another one: it is checked and measured apart. It takes
what the kernel is compiled and tested for: no dropout (every column of tiles would make the mask again), ranks up to
`configs.MAX_RANK_INSIDE`, adapters of x's half-precision dtype. Its backward pass is `triton`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import configs
from ...kernels.gemm import forward_gemm_with_s
from ...kernels.launch import new, planned
from . import cublas
from .triton import backward

__all__ = ["backward", "forward", "unsupported"]


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> str | None:
    """None, or why S cannot be made inside the GEMM."""
    reason = cublas.unsupported(x, weight, bias, lora_A, lora_B, dropout_p)
    if reason is not None:
        return reason
    if dropout_p > 0.0:
        return "S inside the GEMM takes no dropout"
    if x.dtype == torch.float32 or lora_A.dtype != x.dtype or lora_B.dtype != x.dtype:
        return f"S inside the GEMM needs one half-precision dtype, got {x.dtype} and {lora_A.dtype}, {lora_B.dtype}"
    if lora_A.shape[0] > configs.MAX_RANK_INSIDE:
        return f"S inside the GEMM needs a rank of at most {configs.MAX_RANK_INSIDE}, got {lora_A.shape[0]}"
    return None


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
) -> tuple[Tensor, Tensor, None]:
    """(y, S, None): y = x W0ᵀ + b + s·S Bᵀ with S = x Aᵀ. Shapes: docs/architecture.md, "The backend interface"."""
    assert dropout_p == 0.0, dropout_p
    y, s = _forward(x, weight, bias, lora_A, lora_B, scaling)
    return y, s, None


@planned
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    s, y = new(x, x.shape[0], lora_A.shape[0]), new(x, x.shape[0], weight.shape[0])
    forward_gemm_with_s(x, weight, bias, lora_A, lora_B, y, s, scaling)
    return y, s
