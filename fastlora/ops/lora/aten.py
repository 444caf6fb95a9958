"""The LoRA linear layer in plain ATen: the CPU's path, and every other backend's fallback.

What it saves over eager autograd: the rank-r product accumulates into the frozen layer's (`addmm_`, beta = 1), so that
no M×N or M×K temporary is made, scaled and added; fp32 adapters are cast down (r·(K + N) numbers) instead of x up (M·K
numbers); with dropout only the mask is kept, and drop(x) is formed again in the backward pass. With B = 0 the output is
the frozen layer's to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> str | None:
    """None: ATen takes every dtype, stride, device and rank."""
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, S, keep mask): y = x W0ᵀ + b + s·S Bᵀ with S = drop(x) Aᵀ. Shapes: docs/architecture.md, "The backend
    interface"."""
    a = lora_A.to(x.dtype)
    if dropout_p > 0.0:
        if dropout_state is None:
            dropout_state = draw_keep_mask(x, dropout_p)
        keep = keep_mask(dropout_state, x.shape, dropout_p)
        s = F.linear(x * keep, a).mul_(dropout_scale(dropout_p))
    else:
        s = F.linear(x, a)
    y = F.linear(x, weight, bias).addmm_(s, lora_B.to(x.dtype).t(), alpha=scaling)
    return y, s, dropout_state


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB), None where `needs` (x, lora_A, lora_B) is False: dS = s·dY B, dB = s·dYᵀ S, dX = dY W0 + drop′(dS
    A), dA = dSᵀ drop(x)."""
    needs_x, needs_a, needs_b = needs
    dx = grad_a = grad_b = None
    if needs_b:
        assert s is not None and lora_B is not None
        # As (r, N) and transposed: ATen's GEMM is faster with the long side last (285 against 484 µs at M = 512, N =
        # 1024, r = 16, fp32).
        grad_b = s.t().mm(dy).mul_(scaling).t().to(lora_B.dtype)
    if needs_x or needs_a:
        assert lora_A is not None and lora_B is not None
        if dropout_p > 0.0:
            assert dropout_state is not None
            keep = keep_mask(dropout_state, (dy.shape[0], lora_A.shape[1]), dropout_p)
        # S and dS are the only places where the mask's scale enters.
        ds = dy.mm(lora_B.to(dy.dtype)).mul_(scaling * dropout_scale(dropout_p))
    if needs_x:
        assert weight is not None and lora_A is not None
        dx = dy.mm(weight)
        if dropout_p > 0.0:
            dx.addcmul_(ds.mm(lora_A.to(dy.dtype)), keep)
        else:
            dx.addmm_(ds, lora_A.to(dy.dtype))
    if needs_a:
        assert x is not None and lora_A is not None
        dropped = x * keep if dropout_p > 0.0 else x
        grad_a = ds.t().mm(dropped).to(lora_A.dtype)
    return dx, grad_a, grad_b


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """The same y, differentiated by ATen's own autograd: no Python in the backward pass, but drop(x) is saved.

    The faster one for small problems on a CPU, where an `autograd.Function` costs more (about 12 µs) than a pass over
    memory.
    """
    s = F.linear(F.dropout(x, dropout_p) if dropout_p > 0.0 else x, lora_A.to(x.dtype))
    return F.linear(x, weight, bias).addmm_(s, lora_B.to(x.dtype).t(), alpha=scaling)


def draw_keep_mask(x: Tensor, dropout_p: float) -> Tensor:
    """What dropout keeps of x (M, K), drawn from torch's generator: the same elements that F.dropout would keep for the
    same seed.

    On a CPU in x's dtype, because ATen multiplies by a bool at a fifth of the speed (550 against 80 µs for 512×1024
    bf16); elsewhere a bool.
    """
    dtype = x.dtype if x.device.type == "cpu" else torch.bool
    return torch.empty_like(x, dtype=dtype).bernoulli_(1.0 - dropout_p)


def keep_mask(dropout_state: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """The mask itself, or the one that a seed stands for: a compiled graph made for the kernels that fell down to this
    backend."""
    if dropout_state.dtype != torch.int64:
        return dropout_state
    generator = torch.Generator(dropout_state.device).manual_seed(int(dropout_state.item()))
    keep = torch.empty(shape, dtype=torch.bool, device=dropout_state.device)
    return keep.bernoulli_(1.0 - dropout_p, generator=generator)


def dropout_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
