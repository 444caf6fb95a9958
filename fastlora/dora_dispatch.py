"""What computes DoRA's norms and scaling: Triton kernels on a GPU, ATen elsewhere.

The kernels are compared with fp64 on a small problem before they are first trusted on a device, as the backends are
(dispatch.py).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import env
from .backends import dora_torch
from .self_check import NOT_YET, first_difference, first_use, seeded

_failures: dict[tuple[str, torch.dtype, torch.dtype], str | None] = {}  # None: agrees with fp64


def select(tensor: Tensor, lora_A: Tensor, backend: str = "auto") -> ModuleType:
    """What takes a weight (N, K), or z (M, N), with factors like lora_A."""
    asked = env.backend_text() if backend == "auto" else backend
    if not asked and not tensor.is_cuda:
        return dora_torch
    requested = env.backend() if backend == "auto" else backend
    if requested == "torch" or (requested == "auto" and not tensor.is_cuda) or why_not(tensor, lora_A) is not None:
        return dora_torch
    return importlib.import_module("fastlora.backends.dora_kernels")


def why_not(tensor: Tensor, lora_A: Tensor) -> str | None:
    """None where the kernels take such tensors, or why ATen does."""
    try:
        module = importlib.import_module("fastlora.backends.dora_kernels")
    except Exception as error:  # Triton missing, or broken in a way of its own
        return f"cannot be imported: {type(error).__name__}: {error}"
    reason = module.unsupported(tensor, lora_A)
    if reason is not None or not tensor.is_cuda:
        return reason
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    key = (str(tensor.device), tensor.dtype, lora_A.dtype)
    if key not in _failures and torch.compiler.is_compiling():
        return NOT_YET
    return first_use(
        _failures,
        key,
        lambda: self_check(module, tensor.device, tensor.dtype, lora_A.dtype),
        "DoRA's kernels",
        f"{tensor.device} for {tensor.dtype}",
        "ATen runs instead",
    )


def self_check(module: Any, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
    """Compares norms, scaling and its gradients with fp64 on a small problem that divides nothing; None where they
    agree, else what differs. One row of the weight is nearly cancelled by its adapter."""
    with seeded(device), torch.no_grad():
        m, n, k, r, scaling = 203, 152, 136, 10, 0.75
        a, b = torch.randn(r, k, device=device).to(adapter_dtype), torch.randn(n, r, device=device).to(adapter_dtype)
        weight = torch.randn(n, k, device=device).to(dtype)
        weight[3] = (-scaling * (b[3].float() @ a.float())).to(dtype) * 0.99
        z, dy = (torch.randn(m, n, device=device).to(dtype) for _ in range(2))
        magnitude, bias = torch.rand(n, device=device) + 0.5, torch.randn(n, device=device).to(dtype)
        norm = module.weight_norm(weight, a, b, scaling)
        norm64 = (weight.double() + scaling * (b.double() @ a.double())).norm(dim=1)
        factor = magnitude.double() / norm64
        dz, dm, db = module.scale_backward(dy, z, magnitude, norm, (True, True, True))
        results = [
            ("the norm of a row that nearly cancels", norm[3], norm64[3]),
            ("the norm", norm, norm64),
            ("y", module.scale(z, magnitude, norm, bias), factor * z.double() + bias.double()),
            ("dz", dz, factor * dy.double()),
            ("dm", dm, (dy.double() * z.double()).sum(0) / norm64),
            ("db", db, dy.double().sum(0)),
        ]
        return first_difference(results[:2], torch.float32) or first_difference(results[2:], dtype)
