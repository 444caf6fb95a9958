"""DoRA's norms and scaling in plain ATen: the CPU's path, and every other's fallback.

Everything N×K or M×N beyond the arguments is made a few rows at a time, so that it stays in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..lora.aten import CHUNK, row_chunks


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W0 + s·B A‖ of every row (N,) for weight (N, K), lora_A (r, K) and lora_B (N, r), in fp32 (fp64 for fp64)."""
    wide = _wide(weight.dtype, lora_A.dtype)
    lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    if weight.numel() <= CHUNK:
        return _row_norms(torch.addmm(weight.to(wide), lora_B, lora_A, alpha=scaling))
    norm = weight.new_empty(weight.shape[0], dtype=wide)
    for rows in row_chunks(weight):
        total = torch.addmm(weight[rows].to(wide), lora_B[rows], lora_A, alpha=scaling)
        norm[rows] = _row_norms(total)
    return norm


def _row_norms(total: Tensor) -> Tensor:
    """‖total‖ by row, overwriting it: divided by a power of two near its largest entry, which rounds nothing, so that
    no square overflows or vanishes."""
    exponent = torch.frexp(torch.linalg.vector_norm(total, math.inf, dim=1)).exponent
    bound, one = (1000 if total.dtype == torch.float64 else 120), total.new_ones(len(total))
    exponent = exponent.clamp_(-bound, bound)
    norm = torch.linalg.vector_norm(total.mul_(torch.ldexp(one, -exponent).unsqueeze(1)), dim=1)
    return norm.mul_(torch.ldexp(one, exponent))


def divisor(norm: Tensor) -> Tensor:
    """n (N,), infinite for a row of zeros, where m has no direction to scale: m/n and its gradient are 0 there."""
    return norm.masked_fill(norm == 0, math.inf)


def scale(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, *, in_place: bool = False) -> Tensor:
    """y (M, N) = (m/n) ∘ z + b by column, rounded once; `in_place` writes it over z."""
    factor = _factor(z, magnitude, norm)
    y = z if in_place else torch.empty_like(z)
    bias = None if bias is None else bias.to(factor.dtype)
    for rows in row_chunks(z):
        product = z[rows] * factor  # in factor's dtype, the wider one
        y[rows] = product if bias is None else product.add_(bias)
    return y


def composed_scale(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """The same y, differentiated by ATen's own autograd: the faster one for small problems on a CPU, where an
    `autograd.Function` costs more than a pass over memory."""
    factor = _factor(z, magnitude, norm)
    y = z * factor if bias is None else torch.addcmul(bias.to(factor.dtype), z.to(factor.dtype), factor)
    return y.to(z.dtype)


def scale_backward(
    dy: Tensor, z: Tensor | None, magnitude: Tensor, norm: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dz, dm, db), None where `needs` is False: dz = (m/n) ∘ dY, dm = Σ dY ∘ z / n and db = Σ dY over the rows.

    dz in dY's dtype; dm and db (N,) as they were summed, in fp32 (fp64 for fp64). z is read for dm alone.
    """
    needs_z, needs_m, needs_bias = needs
    factor = _factor(dy, magnitude, norm)
    dz = torch.empty_like(dy) if needs_z else None
    dm, db = (factor.new_zeros(factor.shape) if needed else None for needed in (needs_m, needs_bias))
    for rows in row_chunks(dy):
        wide = dy[rows].to(factor.dtype)
        if dz is not None:
            dz[rows] = wide * factor
        if dm is not None:
            assert z is not None
            dm += (wide * z[rows]).sum(0)
        if db is not None:
            db += wide.sum(0)
    return dz, None if dm is None else dm.div_(divisor(norm)), db


def _factor(like: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """m/n (N,), at least in fp32."""
    return (magnitude.to(norm.dtype) / divisor(norm)).to(_wide(like.dtype, norm.dtype))


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32
