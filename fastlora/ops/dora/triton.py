"""DoRA's norms and scaling by the Triton kernels of kernels/dora.py and kernels/dora.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import dora
from ...kernels.launch import DTYPES, INTERPRETED, MAX_RANK, device_of, new_workspace


def unsupported(tensor: Tensor, lora_A: Tensor) -> str | None:
    """None, or why the kernels cannot take a weight, or z, and factors like these."""
    if tensor.device.type != "cuda" and not (INTERPRETED and tensor.device.type == "cpu"):
        return f"needs tensors on a CUDA device, got {tensor.device}"
    if tensor.dtype not in DTYPES or lora_A.dtype not in DTYPES:
        return f"needs bfloat16, float16 or float32, got {tensor.dtype} and {lora_A.dtype}"
    if not 1 <= lora_A.shape[0] <= MAX_RANK:
        return f"needs a rank from 1 to {MAX_RANK}, got {lora_A.shape[0]}"
    return None


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖W0 + s·B A‖ of every row (N,) for weight (N, K), lora_A (r, K) and lora_B (N, r), in fp32."""
    with device_of(weight):
        if lora_A.dtype != lora_B.dtype:
            wide = torch.promote_types(lora_A.dtype, lora_B.dtype)
            lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
        norm = weight.new_empty(weight.shape[0], dtype=torch.float32)
        workspace = new_workspace(weight, dora.norm_workspace(weight, lora_A))
        dora.dora_norm(weight, lora_A, lora_B, scaling, norm, workspace)
        return norm


def scale(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, *, in_place: bool = False) -> Tensor:
    """y (M, N) = (m/n) ∘ z + b by column, rounded once; `in_place` writes it over z."""
    with device_of(z):
        y = z if in_place else z.new_empty(z.shape)
        dora.scale(z, magnitude, norm, bias, y)
        return y


def scale_backward(
    dy: Tensor, z: Tensor | None, magnitude: Tensor, norm: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dz, dm, db), None where `needs` is False: dz in dY's dtype, dm = Σ dY ∘ z / n and db = Σ dY (N,) in fp32."""
    needs_z, needs_m, needs_bias = needs
    with device_of(dy):
        dz = dy.new_empty(dy.shape) if needs_z else None
        if not (needs_m or needs_bias):
            if dz is not None:
                dora.scale(dy, magnitude, norm, None, dz)
            return dz, None, None
        sums = dy.new_empty(2, dy.shape[1], dtype=torch.float32)
        workspace = new_workspace(dy, dora.scale_backward_workspace(dy))
        dora.scale_backward(dy, z if needs_m else None, magnitude, norm, dz, sums, workspace, needs_bias=needs_bias)
        return dz, sums[0] if needs_m else None, sums[1] if needs_bias else None
