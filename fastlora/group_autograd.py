"""A group of LoRA layers in autograd: layers that are fed the same x share S, dA and the accumulation of dX.

    S₁ … Sₙ = drop₁(x) A₁ᵀ … dropₙ(x) Aₙᵀ     one pass over x (`SharedShrink`)
    yᵢ      = x Wᵢᵀ + bᵢ + sᵢ·Sᵢ Bᵢᵀ          each member when it is called (`GroupMember`)

x travels through the members: each hands it on, as an alias, to the one that is called next. So dX comes back through
them in turn, and each adds its dYᵢ Wᵢ in place onto what the later ones have left (cuBLAS with beta = 1); the last stop
is `SharedShrink`, which adds Σ dropᵢ′(dSᵢ Aᵢ) in one pass and makes every dAᵢ from one reading of x. Autograd sees
ordinary functions with ordinary inputs: a member that is never called, or whose output is not used, gets None and costs
nothing, and members can be differentiated apart.

Saved: x once, each S, the dropout states, and references to the weights.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import group_dispatch
from .autograd import autocast_enabled

SMALL = 4  # times autograd.SMALL elements of x; below, on a CPU, a group's additional step costs what it saves


class SharedShrink(torch.autograd.Function):
    """(x, S₁, …, Sₙ) of x (M, K) and A₁ … Aₙ; x comes out as an alias, or None where it needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        module: ModuleType,
        dropout_ps: tuple[float, ...],
        shared_mask: bool,
        owner: Any,
        *lora_As: Tensor,
    ):
        ctx.set_materialize_grads(False)
        outputs, states = module.shrink(x, lora_As, dropout_ps, shared_mask)
        need_x, need_as = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        ctx.save_for_backward(x if any(need_as) else None, *states)
        # Apart from the rest, so that only those that the backward pass uses have to be as they were: a member whose A
        # was changed before its call has run without this S.
        ctx.lora_As, ctx.versions = lora_As, [_version(a) for a in lora_As]
        ctx.arguments = (module, dropout_ps, shared_mask, owner)
        return (x if need_x else None, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, *dss: Tensor | None):  # type: ignore[override]
        module, dropout_ps, shared_mask, owner = ctx.arguments
        need_x, need_as = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        forget = owner() if owner is not None else None
        if forget is not None:
            forget.clear()
        if all(ds is None for ds in dss):  # nothing of what was saved is needed, and it may be gone
            return (dx, *[None] * (4 + len(dss)))
        x, *states = ctx.saved_tensors
        for a, version, ds in zip(ctx.lora_As, ctx.versions, dss, strict=True):
            if ds is not None and _version(a) != version:
                raise RuntimeError(
                    "fastlora: a lora_A needed for gradient computation has been modified by an inplace operation: "
                    f"{tuple(a.shape)} is at version {_version(a)}; expected version {version} instead"
                )
        with _without_autocast(next(ds for ds in dss if ds is not None)):
            dx, grads = module.shared_gradients(
                _writable(dx), x, dss, ctx.lora_As, states, dropout_ps, shared_mask, need_x, need_as
            )
        return (dx, None, None, None, None, *grads)


class GroupMember(torch.autograd.Function):
    """(y, x) of x (M, K) and S (M, r); x comes out as an alias, or None where it needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_B: Tensor,
        scaling: float,
        module: ModuleType,
        name: str,
        shape: torch.Size,
    ):
        ctx.set_materialize_grads(False)
        y = module.forward(x, weight, bias, s, lora_B, scaling, name)
        need_x, need_s, need_w, _, need_b = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_w else None,
            weight if need_x else None,
            s if need_b else None,
            lora_B if need_s or need_b else None,
        )
        ctx.arguments = (module, scaling)
        return _shaped(y, shape), (x if need_x else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None):  # type: ignore[override]
        if dy is None:
            return dx, *[None] * 8
        x, weight, s, lora_B = ctx.saved_tensors
        module, scaling = ctx.arguments
        need_x, need_s, need_w, need_bias, need_b = ctx.needs_input_grad[:5]
        dy2 = dy.reshape(-1, dy.shape[-1])
        with _without_autocast(dy):
            dx, ds, grad_b = module.backward(dy2, weight, s, lora_B, scaling, _writable(dx), (need_x, need_s, need_b))
            grad_w = dy2.t().mm(x) if need_w else None
            grad_bias = dy2.sum(0) if need_bias else None
        return dx, ds, grad_w, grad_bias, grad_b, None, None, None, None


class Term(NamedTuple):
    """What a member adds to the shared part: lora_A (r, K) and the dropout probability in force."""

    lora_A: Tensor
    dropout_p: float


class SharedInput:
    """x on its way through a group: `call` runs a member; each may be called once, in any order, or never."""

    def __init__(
        self, x: Tensor, terms: Sequence[Term], choice: group_dispatch.Choice, shared_mask: bool = False
    ) -> None:
        """x (..., K) of the weights' dtype. S of every member is computed here."""
        self.shape = x.shape
        self.module, self.names = choice
        x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        dropout_ps = tuple(term.dropout_p for term in terms)
        lora_As = [term.lora_A for term in terms]
        self.grad = torch.is_grad_enabled()
        s: Sequence[Tensor]
        if self.grad:
            weak = weakref.ref(self)
            passed, *s = SharedShrink.apply(x2, self.module, dropout_ps, shared_mask, weak, *lora_As)  # type: ignore[misc]
            x2 = x2 if passed is None else passed
        else:
            s, _ = self.module.shrink(x2, lora_As, dropout_ps, shared_mask)
        self.x: Tensor | None = x2
        self.s: list[Tensor | None] = list(s)

    def call(self, index: int, weight: Tensor, bias: Tensor | None, lora_B: Tensor, scaling: float) -> Tensor:
        """The member's y (..., N)."""
        x, s = self.x, self.s[index]
        assert x is not None and s is not None, "each member once"
        name = self.names[index]
        self.s[index] = None
        if weight.dtype != x.dtype:  # under autocast
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if not self.grad:
            return _shaped(self.module.forward(x, weight, bias, s, lora_B, scaling, name), self.shape)
        y, passed = GroupMember.apply(x, s, weight, bias, lora_B, scaling, self.module, name, self.shape)  # type: ignore[misc]
        if passed is not None:
            self.x = passed
        return y

    def clear(self) -> None:
        """Lets go of every tensor: nothing can be called any more."""
        self.x = None
        self.s = [None] * len(self.s)


def _shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """y (M, N) as (..., N), not as a view: autograd would let nobody write into one that a Function made."""
    return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _writable(dx: Tensor | None) -> Tensor | None:
    """The gradient that later members have left: made by one of them and seen by nobody else, unless it is to be
    differentiated again (which then raises)."""
    return dx.clone() if dx is not None and dx.requires_grad else dx


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Within autocast, ATen would cast some operands of a backward pass and not others."""
    if autocast_enabled(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()
