"""RMSNorm and the group of LoRA layers that it feeds, in autograd: the norm's kernel writes S for all of them.

    y = x · rstd · w, S₁ … Sₙ = y A₁ᵀ … y Aₙᵀ      one pass over x (`NormShrink`)
    yᵢ = y Wᵢᵀ + bᵢ + sᵢ·Sᵢ Bᵢᵀ                    each member (group_autograd.GroupMember)

dY is accumulated by the members, `NormShrink` adds Σ dSᵢ Aᵢ, makes every dAᵢ from one reading of y, and goes through
the norm. Saved: x, y and rstd, each S, and references to the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import group_dispatch
from .backends import group_torch
from .group_autograd import GroupMember, _shaped, _without_autocast, _writable
from .self_check import first_difference, first_use, seeded

_failures: dict[tuple[str, torch.dtype, torch.dtype], str | None] = {}  # None: agrees with fp64


class NormShrink(torch.autograd.Function):
    """(y, S₁, …, Sₙ) of x (M, K), the norm's weight (K,) and A₁ … Aₙ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, norm: ModuleType, module: ModuleType, *lora_As: Tensor
    ):
        ctx.set_materialize_grads(False)
        y, rstd, s = norm.forward(x, weight, eps, lora_As)
        ctx.save_for_backward(x, weight, rstd, y if any(ctx.needs_input_grad[5:]) else None, *lora_As)
        ctx.modules = (norm, module)
        return (y, *s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dss: Tensor | None):  # type: ignore[override]
        x, weight, rstd, y, *lora_As = ctx.saved_tensors
        norm, module = ctx.modules
        need_x, need_w, need_as = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5:]
        grads: Sequence[Tensor | None] = [None] * len(dss)
        with _without_autocast(x):
            if any(ds is not None for ds in dss):
                dropout: tuple = ([None] * len(dss), (0.0,) * len(dss), False)
                dy, grads = module.shared_gradients(_writable(dy), y, dss, lora_As, *dropout, need_x or need_w, need_as)
            dx = norm.backward(dy, x, weight, rstd) if need_x and dy is not None else None
            dw = None
            if need_w and dy is not None:
                dw = (dy.float() * x.float() * rstd[:, None]).sum(0).to(weight.dtype)
        return (dx, dw, None, None, None, *grads)


def select(
    x: Tensor, weight: Tensor, members: Sequence[group_dispatch.Member]
) -> tuple[ModuleType, group_dispatch.Choice] | str:
    """What runs the norm of x (M, K) and the group, or why they run one after the other."""
    choice = group_dispatch.select(x, members)
    if isinstance(choice, str):
        return choice
    if choice.module is group_torch:
        return "in plain ATen a norm that writes S saves nothing"
    norm = importlib.import_module("fastlora.backends.norm_kernels")
    reason = norm.unsupported(x, weight, [member.lora_A for member in members])
    if reason is None and x.device.type == "cuda":
        reason = _failure(norm, x, weight)
    return reason or (norm, choice)


def run(
    x: Tensor,
    weight: Tensor,
    eps: float,
    members: Sequence[group_dispatch.Member],
    scalings: Sequence[float],
    selected: tuple[ModuleType, group_dispatch.Choice],
) -> tuple[Tensor, ...]:
    """The members' outputs (..., Nᵢ) for x (..., K)."""
    norm, (module, names) = selected
    x2 = x.reshape(-1, x.shape[-1])
    lora_As = [member.lora_A for member in members]
    if not torch.is_grad_enabled():
        y, _, s = norm.forward(x2, weight, eps, lora_As)
        return tuple(
            _shaped(module.forward(y, one.weight, one.bias, s[i], one.lora_B, scalings[i], names[i]), x.shape)
            for i, one in enumerate(members)
        )
    y, *s = NormShrink.apply(x2, weight, eps, norm, module, *lora_As)  # type: ignore[misc]
    outputs = []
    for i, one in enumerate(members):
        out, passed = GroupMember.apply(
            y, s[i], one.weight, one.bias, one.lora_B, scalings[i], module, names[i], x.shape
        )  # type: ignore[misc]
        y = y if passed is None else passed
        outputs.append(out)
    return tuple(outputs)


def _failure(norm: ModuleType, x: Tensor, weight: Tensor) -> str | None:
    key = (str(x.device), x.dtype, weight.dtype)
    return first_use(
        _failures,
        key,
        lambda: self_check(norm, x.device, x.dtype, weight.dtype),
        "the norm's kernel",
        f"{x.device} for {x.dtype}",
        "eager PyTorch runs instead",
    )


def self_check(norm: ModuleType, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    """Compares y, S and dX with fp64 on a small problem that divides nothing; None where they agree, else what
    differs."""
    with seeded(device), torch.no_grad():
        m, k = 75, 136
        x, dy = (torch.randn(m, k, device=device).to(dtype) for _ in range(2))
        weight = (1 + 0.5 * torch.randn(k, device=device)).to(weight_dtype)
        lora_As = [(torch.randn(r, k, device=device) * k**-0.5).to(dtype) for r in (5, 16)]
        y, rstd, s = norm.forward(x, weight, 1e-5, lora_As)
        dx = norm.backward(dy, x, weight, rstd)
        with torch.enable_grad():
            x64 = x.double().requires_grad_()
            y64 = F.rms_norm(x64, (k,), weight.double(), 1e-5)
        (dx64,) = torch.autograd.grad(y64, x64, dy.double())
        results = [("y", y, y64.detach()), ("dX", dx, dx64)]
        results += [(f"S of member {i}", s[i], y64.detach() @ a.double().t()) for i, a in enumerate(lora_As)]
    return first_difference(results, dtype)
