"""Layers that are fed the same x in autograd: they share S, dA and the accumulation of dX.

    S₁ … Sₙ = drop₁(x) A₁ᵀ … dropₙ(x) Aₙᵀ     one pass over x
    yᵢ      = x Wᵢᵀ + bᵢ + sᵢ·Sᵢ Bᵢᵀ

Members that are called together (`lora_group`) are one step of autograd, `GroupFunction`: one launch plan a pass. Where
they are called one after another, as a model calls them, it runs the first and makes every S; each other is a step of
its own (`GroupMember`). x travels through them: each hands it on, as an alias, to the one that is called next. So dX
comes back through them in turn, and each adds its dYᵢ Wᵢ in place onto what the later ones have left (cuBLAS with beta
= 1); the last stop is `GroupFunction`, which adds Σ dropᵢ′(dSᵢ Aᵢ) in one pass and makes every dAᵢ from one reading of
x. A member that is never called, or whose output is not used, gets None and costs nothing.

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

from ...runtime import env
from ...runtime.trust import Trusted, first_difference, seeded
from .. import call
from ..call import GroupLayer, are_plain, as_2d, takes_fused_path
from ..lora import choice as lora_choice
from . import aten

KERNEL_BACKENDS = {"cublas", "triton"}


_trusted = Trusted("the backend for groups of layers", "layers run one by one")


class Member(NamedTuple):
    """One layer of a group: weight (N, K), lora_A (r, K), lora_B (N, r), scale, dropout probability in force."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    backend: str = "auto"


class Choice(NamedTuple):
    """The group's implementation, and the backend by which each member multiplies by its weight."""

    module: ModuleType
    names: tuple[str, ...]
    choices: Sequence[lora_choice.Choice] = ()


def select(x: Tensor, members: Sequence[Member], narrow: bool = False) -> Choice | str:
    """What runs the group on x (M, K), or why the layers run one by one. Weights and biases are cast to x's dtype by
    the caller, who multiplies by them."""
    choices = [_choice(x, member, narrow) for member in members]
    names = tuple([lora_choice.FAMILY.get(choice.name, choice.name) for choice in choices])
    if set(names) == {"torch"}:
        return Choice(aten, names)
    if not set(names) <= KERNEL_BACKENDS:
        return f"the members run on different backends: {', '.join(names)}"
    module = importlib.import_module("fastlora.ops.group.triton")
    if x.device.type == "cuda":
        for dtype in {member.lora_A.dtype for member in members}:
            key = (x.device, x.dtype, dtype, any(m.dropout_p > 0.0 for m in members), narrow)
            failure = _trusted.why_not(key, functools.partial(self_check, module, *key))
            if failure is not None:
                return failure
    return Choice(module, names, choices)


def _choice(x: Tensor, member: Member, narrow: bool) -> lora_choice.Choice:
    weight, bias = member.weight, member.bias
    if weight.dtype != x.dtype:  # under autocast: what matters to the choice is the dtype that it will have
        weight = weight.new_empty(weight.shape, dtype=x.dtype) if x.is_cuda else weight
        bias = bias.to(x.dtype) if bias is not None else None
    call_, asked = (x, weight, bias, member.lora_A, member.lora_B, member.dropout_p), member.backend
    return lora_choice.select(*call_, asked, narrow)


def self_check(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    narrow: bool = False,
) -> str | None:
    """Compares a group of two, whose first member runs with the shared part, with fp64 on a small problem that divides
    nothing; None where they agree, else what differs.

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
        dss = [torch.randn(m, ranks[1], device=device).to(dtype)]
        dx = torch.randn(m, k, device=device).to(dtype)
        expected_dx = dx.double()
        weight, lora_B = torch.randn(56, k, device=device) * k**-0.5, torch.randn(56, ranks[0], device=device)
        weight, lora_B = weight.to(dtype), (lora_B * ranks[0] ** -0.5).to(adapter_dtype)
        dy = torch.randn(m, 56, device=device).to(dtype)
        settings = Settings(module, ("cublas",), (1.5,), (p, p), False, narrow)
        ys, s, states = module.forward(x, lora_As, (weight,), (None,), (lora_B,), settings)
        dx, grads, (grad_b,) = module.backward(
            dx, x, (dy,), dss, lora_As, (weight,), (lora_B,), s, states, settings, (True, (True, True), (True,))
        )
        wide_b, wide_dy, wide_s = lora_B.double(), dy.double(), s[0].double()
        dss = [1.5 * wide_dy @ wide_b, dss[0].double()]
        expected_dx += wide_dy @ weight.double()
        results = [
            ("output of member 0", ys[0], x.double() @ weight.double().t() + 1.5 * wide_s @ wide_b.t()),
            ("dB of member 0", grad_b, 1.5 * wide_dy.t() @ wide_s),
        ]
        for i in range(2):
            keep = (s[i] != 0).double() / (1 - p) if dropout else torch.ones_like(x, dtype=torch.float64)
            if dropout and not 0.6 < (s[i] != 0).double().mean().item() < 0.9:
                return f"the kept fraction is {(s[i] != 0).double().mean().item():.2f}, expected about {1 - p}"
            a, dropped = lora_As[i].double(), x.double() * keep
            expected_dx += (dss[i] @ a) * keep
            results += [
                (f"S of member {i}", s[i], dropped @ a.t()),
                (f"dA of member {i}", grads[i], dss[i].t() @ dropped),
            ]
        results.append(("dX", dx, expected_dx))
    return first_difference(results, dtype)


SMALL = 4  # times autograd.SMALL elements of x; below, on a CPU, a group's additional step costs what it saves


class Settings(NamedTuple):
    """What a call's shared part is run with: `names` and `scalings` of the first members, which run in it;
    `dropout_ps` of all."""

    module: ModuleType
    names: tuple[str, ...]
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    shared_mask: bool = False
    narrow: bool = False


class GroupFunction(torch.autograd.Function):
    """(x, y₁, …, yₖ, Sₖ₊₁, …, Sₙ) of x (..., K), A₁ … Aₙ and the first k members' weights, biases and B; x comes out as
    an alias where there are others, or None where it needs no gradient. The yᵢ are of `shape` but for the last size;
    `made`: what a known call's plan has made."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: torch.Size,
        settings: Settings,
        owner: Any,
        made: list[Tensor] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        n, k = len(settings.dropout_ps), len(settings.names)
        lora_As, weights, biases = tensors[:n], tensors[n : n + k], tensors[n + k : n + 2 * k]
        lora_Bs, x2 = tensors[n + 2 * k :], as_2d(x)
        if made is None:
            ys, ss, states = settings.module.forward(x2, lora_As, weights, biases, lora_Bs, settings)
        else:
            ys, ss, states = made[:k], made[k:], [None] * n
            for y, weight in zip(ys, weights):
                y.addmm_(x2, weight.t())
        needs = ctx.needs_input_grad
        need_x = needs[0]
        ctx.save_for_backward(
            x if True in needs[5 : 5 + n + k] else None,
            *(weights if need_x else [None] * k),
            *lora_Bs,
            *[s if need else None for s, need in zip(ss, needs[5 + n + 2 * k :])],
            *states,
        )
        # Apart from the rest, so that only those that the backward pass uses have to be as they were: a member whose A
        # was changed before its call has run without this S.
        ctx.lora_As, ctx.versions = lora_As, _versions(lora_As)
        ctx.arguments = (settings, owner, x.shape, len(shape) != 2)
        if len(shape) != 2:
            ys = [_shaped(y, shape) for y in ys]
        return (x if need_x and k < n else None, *ys, *ss[k:])

    @staticmethod
    @call.backward_pass
    def backward(ctx: Any, dx: Tensor | None, *grads: Tensor | None):  # type: ignore[override]
        settings, owner, shape, not_matrices = ctx.arguments
        n, k = len(settings.dropout_ps), len(settings.names)
        needs = ctx.needs_input_grad
        if owner is not None and (opened := owner()) is not None:
            opened.clear()
        if not [grad for grad in grads if grad is not None]:  # nothing of what was saved is needed, and it may be gone
            return dx, *[None] * (len(needs) - 1)
        x, *saved = ctx.saved_tensors
        weights, lora_Bs, ss, states = saved[:k], saved[k : 2 * k], saved[2 * k : 3 * k], saved[3 * k :]
        for a, now, then, grad in zip(ctx.lora_As, _versions(ctx.lora_As), ctx.versions, grads, strict=True):
            if now != then and grad is not None:
                raise RuntimeError(
                    "fastlora: a lora_A needed for gradient computation has been modified by an inplace operation: "
                    f"{tuple(a.shape)} is at version {now}; expected version {then} instead"
                )
        dys, dx = grads[:k], _writable(dx)
        if not_matrices:
            x = None if x is None else as_2d(x)
            dys = tuple([None if dy is None else as_2d(dy) for dy in dys])
        dx, grad_as, grad_bs = settings.module.backward(
            dx, x, dys, grads[k:], ctx.lora_As, weights, lora_Bs, ss, states, settings,
            (needs[0], needs[5 : 5 + n], needs[5 + n + 2 * k :]),
        )  # fmt: skip
        others: list[Tensor | None] = [None] * (2 * k)
        if True in needs[5 + n : 5 + n + 2 * k]:
            for i, dy in enumerate(dys):
                if dy is not None:
                    others[i] = dy.t().mm(x) if needs[5 + n + i] and x is not None else None
                    others[k + i] = dy.sum(0) if needs[5 + n + k + i] else None
        return dx if dx is None or len(shape) == 2 else dx.view(shape), *[None] * 4, *grad_as, *others, *grad_bs


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
        y = module.member_forward(x, weight, bias, s, lora_B, scaling, name)
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
        dx, ds, grad_b = module.member_backward(dy2, weight, s, lora_B, scaling, _writable(dx), needs, narrow)
        grad_w = dy2.t().mm(x) if need_w else None
        grad_bias = dy2.sum(0) if need_bias else None
        return dx, ds, grad_w, grad_bias, grad_b, *[None] * 5


# As in lora/autograd.py: `takes_fused_path` has looked for leftovers of torch.func.
_apply: Any = super(torch.autograd.Function, GroupFunction).apply  # type: ignore[misc]
_apply_member: Any = super(torch.autograd.Function, GroupMember).apply  # type: ignore[misc]


class SharedInput:
    """x on its way through a group. The first `run` members have run: `ys` are theirs. `call` runs one of the others;
    each may be called once, in any order, or never."""

    def __init__(
        self, x: Tensor, members: Sequence[Member], choice: Choice, run: int, shared_mask: bool, narrow: bool
    ) -> None:
        """x (..., K) of the weights' dtype. S of every member is computed here; `narrow`: `call.low_rank_dtype`."""
        self.shape, self.names = x.shape, choice.names
        dropout_ps, first = tuple([member.dropout_p for member in members]), members[:run]
        scalings = tuple([member.scaling for member in first])
        self.settings = Settings(choice.module, choice.names[:run], scalings, dropout_ps, shared_mask, narrow)
        lora_As = [member.lora_A for member in members]
        weights, biases = [_cast(one.weight, x) for one in first], [_cast(one.bias, x) for one in first]
        lora_Bs = [member.lora_B for member in first]
        if run < len(members):
            x = as_2d(x)  # the others take it as it is
        self.grad = torch.is_grad_enabled()
        self.ys: Sequence[Tensor]
        s: Sequence[Tensor]
        if self.grad:
            weak = weakref.ref(self)
            passed, *made = _apply(x, self.shape, self.settings, weak, None, *lora_As, *weights, *biases, *lora_Bs)
            self.ys, s = made[:run], made[run:]
        else:
            passed = None
            ys, s, _ = choice.module.forward(as_2d(x), lora_As, weights, biases, lora_Bs, self.settings)
            self.ys, s = [_shaped(y, self.shape) for y in ys], s[run:]
        self.x: Tensor | None = x if passed is None else passed
        self.s: list[Tensor | None] = [*[None] * run, *s]

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
        weight, bias = _cast(weight, x), _cast(bias, x)
        module, narrow = self.settings.module, self.settings.narrow
        if not self.grad:
            return _shaped(module.member_forward(x, weight, bias, s, lora_B, scaling, name), self.shape)
        y, passed = _apply_member(x, s, weight, bias, lora_B, scaling, module, name, self.shape, narrow)
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


def _cast(tensor: Any, x: Tensor) -> Any:
    """A weight or bias in x's dtype: another one under autocast only."""
    return tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(x.dtype)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _writable(dx: Tensor | None) -> Tensor | None:
    """The gradient that later members have left: made by one of them and seen by nobody else, unless it is to be
    differentiated again (which then raises)."""
    return dx.clone() if dx is not None and dx.requires_grad else dx


def open_group(x: Tensor, members: Sequence[Member], run: int, shared_mask: bool = False) -> SharedInput | None:
    """The shared part of a group, of which the first `run` members have run and the others can be called; None where
    they should run one by one (or where running one of them will say what is wrong)."""
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
    if run == len(members) and not narrow:
        _keep(x, members, choice)
    return SharedInput(cast, members, choice, run, shared_mask, narrow)


def _keep(x: Tensor, members: Sequence[Member], choice: Choice) -> None:
    """Makes later calls of this kind known ones, as lora/autograd.py does of a layer's: after the first."""
    weights, biases, lora_As, lora_Bs, scalings, dropout_ps, (backend, *_) = zip(*members)
    if choice.module is aten or any(dropout_ps) or set(choice.names) != {"cublas"} or not choice.module.can_keep(x):
        return
    if all(map(lora_choice.is_final, choice.choices)):
        settings = Settings(choice.module, choice.names, scalings, dropout_ps)
        asked = (env.backend_text() if backend == "auto" else backend, scalings)
        number = lora_choice.known[asked][1] if asked in lora_choice.known else choice.module.new_number()
        if choice.module.keep(x, lora_As, weights, biases, lora_Bs, settings, number):
            lora_choice.known[asked] = settings, number


def known_group(x: Tensor, layers: Sequence[GroupLayer], training: bool, backend: str) -> tuple[Tensor, ...] | None:
    """Every y, without dropout, of a call of a kind that has been checked and chosen for, and whose plan one op runs;
    None of others (lora/autograd.py: `known_call`)."""
    if torch.compiler.is_compiling() or not lora_choice.known or torch._C._is_any_autocast_enabled():
        return None
    lora_As, lora_Bs, weights, biases, scalings = [], [], [], [], []
    for weight, adapters, bias in layers:
        if len(adapters) != 1:
            return None
        a, b, scaling, dropout_p, magnitude, _ = adapters[0]
        if magnitude is not None or (dropout_p and training):
            return None
        lora_As.append(a)
        lora_Bs.append(b)
        weights.append(weight)
        biases.append(bias)
        scalings.append(scaling)
    found = lora_choice.known.get((env.backend_text() if backend == "auto" else backend, tuple(scalings)))
    if found is None or not are_plain(x, *lora_As, *lora_Bs, *weights, *biases) or x.is_nested:
        return None
    settings, number = found
    made = settings.module.kept(x, lora_As, weights, biases, lora_Bs, number)
    if not made:
        return None
    if torch.is_grad_enabled():
        return _apply(x, x.shape, settings, None, made, *lora_As, *weights, *biases, *lora_Bs)[1:]
    x2 = as_2d(x)
    return tuple([_shaped(y.addmm_(x2, weight.t()), x.shape) for y, weight in zip(made, weights)])
