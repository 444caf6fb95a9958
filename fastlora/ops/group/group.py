"""Layers that are fed the same x in autograd: they share S, dA and the accumulation of dX.

    S₁ … Sₙ = drop₁(x) A₁ᵀ … dropₙ(x) Aₙᵀ     one pass over x (`SharedShrink`)
    yᵢ      = x Wᵢᵀ + bᵢ + sᵢ·Sᵢ Bᵢᵀ          each member when it is called (`GroupMember`)

x travels through the members: each hands it on, as an alias, to the one that is called next. So dX comes back through
them in turn, and each adds its dYᵢ Wᵢ in place onto what the later ones have left (cuBLAS with beta = 1); the last stop
is `SharedShrink`, which adds Σ dropᵢ′(dSᵢ Aᵢ) in one pass and makes every dAᵢ from one reading of x. Autograd sees
ordinary functions with ordinary inputs: a member that is never called, or whose output is not used, gets None and costs
nothing, and members can be differentiated apart.

Saved: x once, each S, the dropout states, and references to the weights.

A group runs on the implementation that belongs to its members' backends. Where those differ, or where the group's
kernels fail their first-use check, the layers run one by one.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.trust import Trusted, first_difference, seeded
from .. import call
from ..call import as_2d, takes_fused_path
from ..lora import choice as lora_choice
from . import aten

KERNEL_BACKENDS = ("cublas", "triton")


_trusted = Trusted("the backend for groups of layers", "layers run one by one")


class Member(NamedTuple):
    """One layer of a group: weight (N, K), lora_A (r, K), lora_B (N, r), the dropout probability in force."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dropout_p: float
    backend: str = "auto"


class Choice(NamedTuple):
    """The group's implementation, and the backend by which each member multiplies by its weight."""

    module: ModuleType
    names: tuple[str, ...]


def select(x: Tensor, members: Sequence[Member], narrow: bool = False) -> Choice | str:
    """What runs the group on x (M, K), or why the layers run one by one. Weights and biases are cast to x's dtype by
    the caller, who multiplies by them."""
    names = tuple(_backend(x, member, narrow) for member in members)
    if all(name == "torch" for name in names):
        return Choice(aten, names)
    if not all(name in KERNEL_BACKENDS for name in names):
        return f"the members run on different backends: {', '.join(names)}"
    module = importlib.import_module("fastlora.ops.group.triton")
    if x.device.type == "cuda":
        for dtype in {member.lora_A.dtype for member in members}:
            key = (x.device, x.dtype, dtype, any(m.dropout_p > 0.0 for m in members), narrow)
            failure = _trusted.why_not(key, functools.partial(self_check, module, *key))
            if failure is not None:
                return failure
    return Choice(module, names)


def _backend(x: Tensor, member: Member, narrow: bool) -> str:
    weight, bias = member.weight, member.bias
    if weight.dtype != x.dtype:  # under autocast: what matters to the choice is the dtype that it will have
        weight = weight.new_empty(weight.shape, dtype=x.dtype) if x.is_cuda else weight
        bias = bias.to(x.dtype) if bias is not None else None
    call_, asked = (x, weight, bias, member.lora_A, member.lora_B, member.dropout_p), member.backend
    name = lora_choice.select(*call_, asked, narrow).name
    return lora_choice.FAMILY.get(name, name)


def self_check(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    narrow: bool = False,
) -> str | None:
    """Compares S, dX and dA of a group of two with fp64 on a small problem that divides nothing; None where they agree,
    else what differs.

    With dropout the masks are read off the implementation itself: with A = I, S is drop(x). The generators' states are
    left as they were.
    """
    with seeded(device), torch.no_grad():
        m, k = 203, 72
        ranks = (k, k) if dropout else (10, 24)
        p = 0.25 if dropout else 0.0
        x = torch.randn(m, k, device=device).to(dtype)
        lora_As = [
            (torch.eye(k, device=device) if dropout else torch.randn(r, k, device=device) * k**-0.5).to(adapter_dtype)
            for r in ranks
        ]
        dss = [torch.randn(m, r, device=device).to(dtype) for r in ranks]
        dx = torch.randn(m, k, device=device).to(dtype)
        expected_dx = dx.double()
        s, states = module.shrink(x, lora_As, (p, p), False, narrow)
        dx, grads = module.shared_gradients(dx, x, dss, lora_As, states, (p, p), False, True, (True, True))
        results = []
        for i in range(2):
            keep = (s[i] != 0).double() / (1 - p) if dropout else torch.ones_like(x, dtype=torch.float64)
            if dropout and not 0.6 < (s[i] != 0).double().mean().item() < 0.9:
                return f"the kept fraction is {(s[i] != 0).double().mean().item():.2f}, expected about {1 - p}"
            a, ds, dropped = lora_As[i].double(), dss[i].double(), x.double() * keep
            expected_dx += (ds @ a) * keep
            results += [(f"S of member {i}", s[i], dropped @ a.t()), (f"dA of member {i}", grads[i], ds.t() @ dropped)]
        results.append(("dX", dx, expected_dx))
    return first_difference(results, dtype)


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
        narrow: bool,
        *lora_As: Tensor,
    ):
        ctx.set_materialize_grads(False)
        outputs, states = module.shrink(x, lora_As, dropout_ps, shared_mask, narrow)
        need_x, need_as = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        ctx.save_for_backward(x if any(need_as) else None, *states)
        # Apart from the rest, so that only those that the backward pass uses have to be as they were: a member whose A
        # was changed before its call has run without this S.
        ctx.lora_As, ctx.versions = lora_As, [_version(a) for a in lora_As]
        ctx.arguments = (module, dropout_ps, shared_mask, owner)
        return (x if need_x else None, *outputs)

    @staticmethod
    @call.backward_pass
    def backward(ctx: Any, dx: Tensor | None, *dss: Tensor | None):  # type: ignore[override]
        module, dropout_ps, shared_mask, owner = ctx.arguments
        need_x, need_as = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        forget = owner() if owner is not None else None
        if forget is not None:
            forget.clear()
        if all(ds is None for ds in dss):  # nothing of what was saved is needed, and it may be gone
            return (dx, *[None] * (5 + len(dss)))
        x, *states = ctx.saved_tensors
        for a, version, ds in zip(ctx.lora_As, ctx.versions, dss, strict=True):
            if ds is not None and _version(a) != version:
                raise RuntimeError(
                    "fastlora: a lora_A needed for gradient computation has been modified by an inplace operation: "
                    f"{tuple(a.shape)} is at version {_version(a)}; expected version {version} instead"
                )
        dx, grads = module.shared_gradients(
            _writable(dx), x, dss, ctx.lora_As, states, dropout_ps, shared_mask, need_x, need_as
        )
        return (dx, *[None] * 5, *grads)


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
        narrow: bool,
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
        ctx.arguments = (module, scaling, narrow)
        return _shaped(y, shape), (x if need_x else None)

    @staticmethod
    @call.backward_pass
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None):  # type: ignore[override]
        if dy is None:
            return dx, *[None] * 9
        x, weight, s, lora_B = ctx.saved_tensors
        module, scaling, narrow = ctx.arguments
        need_x, need_s, need_w, need_bias, need_b = ctx.needs_input_grad[:5]
        dy2 = as_2d(dy)
        needs = (need_x, need_s, need_b)
        dx, ds, grad_b = module.backward(dy2, weight, s, lora_B, scaling, _writable(dx), needs, narrow)
        grad_w = dy2.t().mm(x) if need_w else None
        grad_bias = dy2.sum(0) if need_bias else None
        return dx, ds, grad_w, grad_bias, grad_b, *[None] * 5


# As in lora/autograd.py: `takes_fused_path` has looked for leftovers of torch.func.
_apply_shrink: Any = super(torch.autograd.Function, SharedShrink).apply  # type: ignore[misc]
_apply_member: Any = super(torch.autograd.Function, GroupMember).apply  # type: ignore[misc]


class Term(NamedTuple):
    """What a member adds to the shared part: lora_A (r, K) and the dropout probability in force."""

    lora_A: Tensor
    dropout_p: float


class SharedInput:
    """x on its way through a group: `call` runs a member; each may be called once, in any order, or never."""

    def __init__(
        self, x: Tensor, terms: Sequence[Term], choice: Choice, shared_mask: bool = False, narrow: bool = False
    ) -> None:
        """x (..., K) of the weights' dtype. S of every member is computed here; `narrow`: `call.low_rank_dtype`."""
        self.shape, self.narrow = x.shape, narrow
        self.module, self.names = choice
        x2 = as_2d(x)
        dropout_ps = tuple(term.dropout_p for term in terms)
        lora_As = [term.lora_A for term in terms]
        self.grad = torch.is_grad_enabled()
        s: Sequence[Tensor]
        if self.grad:
            weak = weakref.ref(self)
            passed, *s = _apply_shrink(x2, self.module, dropout_ps, shared_mask, weak, narrow, *lora_As)
            x2 = x2 if passed is None else passed
        else:
            s, _ = self.module.shrink(x2, lora_As, dropout_ps, shared_mask, narrow)
        self.x: Tensor | None = x2
        self.s: list[Tensor | None] = list(s)

    def call(self, index: int, weight: Tensor, bias: Tensor | None, lora_B: Tensor, scaling: float) -> Tensor:
        """The member's y (..., N)."""
        s = self.s[index]
        assert s is not None, "each member once"
        self.s[index] = None
        return self._layer(s, weight, bias, lora_B, scaling, self.names[index])

    def sum(self, weight: Tensor, bias: Tensor | None, lora_Bs: Sequence[Tensor], scalings: Sequence[float]) -> Tensor:
        """All members as the terms of one layer: its y (..., N), rounded once."""
        lora_B = torch.cat([b * scaling for b, scaling in zip(lora_Bs, scalings, strict=True)], dim=1)
        s = torch.cat([one for one in self.s if one is not None], dim=1)
        return self._layer(s, weight, bias, lora_B, 1.0, self.names[0])

    def _layer(
        self, s: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor, scaling: float, name: str
    ) -> Tensor:
        x = self.x
        assert x is not None, "not cleared"
        if weight.dtype != x.dtype:  # under autocast
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if not self.grad:
            return _shaped(self.module.forward(x, weight, bias, s, lora_B, scaling, name), self.shape)
        y, passed = _apply_member(x, s, weight, bias, lora_B, scaling, self.module, name, self.shape, self.narrow)
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


def open_group(x: Tensor, members: Sequence[Member], shared_mask: bool = False) -> SharedInput | None:
    """The shared part of a group, ready for its members to be called; None where they should run one by one (or where
    running one of them will say what is wrong)."""
    if len(members) < 2 or torch.compiler.is_compiling() or x.is_nested or x.dim() < 1:
        return None
    if x.device.type == "cpu" and x.numel() < SMALL * call.SMALL:
        return None
    tensors = [tensor for member in members for tensor in member[:4]]
    if not takes_fused_path(x, *tensors):
        return None
    dtype, narrow, device, dtypes = x.dtype, call.autocast_enabled(x), x.device, {x.dtype}
    for weight, bias, lora_A, lora_B, *_ in members:  # a loop: generators cost every call
        if lora_A.dtype != lora_B.dtype or weight.numel() == 0 or weight.shape[1] != x.shape[-1]:
            return None
        if weight.device != device or lora_A.device != device or lora_B.device != device:
            return None
        dtypes.add(weight.dtype)
        if bias is not None:
            dtypes.add(bias.dtype)
            if bias.device != device:
                return None
    if narrow:
        if torch.float64 in dtypes:
            return None
        dtype = torch.get_autocast_dtype(device.type)
    elif len(dtypes) > 1:
        return None
    cast = x.to(dtype)
    choice = select(as_2d(cast), members, narrow)
    if isinstance(choice, str):
        return None
    terms = [Term(member.lora_A, member.dropout_p) for member in members]
    return SharedInput(cast, terms, choice, shared_mask, narrow)
