"""Who is measured: the frozen layer, eager PyTorch, PEFT's layer, a hand-written autograd, and fastlora's backends.

A contender is built from the same `Tensors` as the others (same weights, same adapters, same inputs) and gives a
function of x and the tensors it differentiates, so that forward and backward are timed the same way for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .counting import Problem


@dataclass
class Tensors:
    """One layer's tensors, random, on one device. `scaling` is lora_alpha / r with lora_alpha = 2r."""

    problem: Problem
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 2.0

    @classmethod
    def random(cls, problem: Problem, device: torch.device, seed: int = 0) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        dtype, adapter_dtype = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)

        def normal(rows: int, cols: int, std: float, to: torch.dtype) -> Tensor:
            return torch.randn(rows, cols, device=device, generator=generator).mul_(std).to(to)

        n, k, r = problem.n, problem.k, problem.r
        return cls(
            problem,
            weight=normal(n, k, k**-0.5, dtype),
            bias=normal(1, n, 1.0, dtype)[0] if problem.bias else None,
            lora_a=normal(r, k, k**-0.5, adapter_dtype).requires_grad_(),
            lora_b=normal(n, r, r**-0.5, adapter_dtype).requires_grad_(),
        )

    def inputs(self, count: int, device: torch.device, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
        """`count` different pairs of x (needing a gradient) and dY."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, self.problem.dtype)
        pairs = []
        for _ in range(count):
            x = torch.randn(self.problem.m, self.problem.k, device=device, generator=generator).to(dtype)
            dy = torch.randn(self.problem.m, self.problem.n, device=device, generator=generator).to(dtype)
            pairs.append((x.requires_grad_(), dy))
        return pairs


@dataclass
class Contender:
    """`forward(x)` gives y with a graph; `leaves` are the parameters whose gradients are wanted next to x's,
    `parameters` the frozen ones."""

    name: str
    forward: Callable[[Tensor], Any]  # one tensor, or a tuple of them
    leaves: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()

    def backward(self, y: Any, x: Tensor, dy: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, *self.leaves), dy)


class Unavailable(Exception):
    """Why a contender cannot run here."""


def frozen(t: Tensors) -> Contender:
    """The base layer alone: the floor."""
    return Contender("frozen", lambda x: F.linear(x, t.weight, t.bias), ())


def eager(t: Tensors) -> Contender:
    """What one writes by hand in PyTorch, and PEFT does: x goes to the adapters' dtype, the sum back to x's."""
    p = t.problem.dropout

    def forward(x: Tensor) -> Tensor:
        dropped = F.dropout(x, p) if p else x
        low_rank = F.linear(F.linear(dropped.to(t.lora_a.dtype), t.lora_a), t.lora_b)
        return (F.linear(x, t.weight, t.bias) + t.scaling * low_rank).to(x.dtype)

    return Contender("eager", forward, (t.lora_a, t.lora_b))


def compiled(t: Tensors) -> Contender:
    """torch.compile of the eager layer."""
    contender = eager(t)
    return Contender("compile", torch.compile(contender.forward, dynamic=False), contender.leaves)


def peft(t: Tensors, magnitude: Tensor | None = None) -> Contender:
    """PEFT's own layer, in training mode; with a magnitude it is DoRA's."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not installed: {error}") from None
    p = t.problem
    base = nn.Linear(p.k, p.n, bias=p.bias, device="meta")
    base.weight = nn.Parameter(t.weight, requires_grad=False)
    if t.bias is not None:
        base.bias = nn.Parameter(t.bias, requires_grad=False)
    settings: dict[str, Any] = {"r": p.r, "lora_alpha": int(t.scaling * p.r), "lora_dropout": p.dropout}
    config = LoraConfig(**settings, target_modules=["0"], use_dora=magnitude is not None)
    layer: Any = inject_adapter_in_model(config, nn.Sequential(base))[0]  # type: ignore[index]
    layer.lora_A["default"].weight = nn.Parameter(t.lora_a.detach())
    layer.lora_B["default"].weight = nn.Parameter(t.lora_b.detach())
    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if magnitude is not None:
        layer.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude.detach())
        leaves.append(layer.lora_magnitude_vector["default"].weight)
    layer.train()
    assert layer.scaling["default"] == t.scaling
    return Contender("peft", layer, tuple(leaves), parameters=(t.weight,))


class _AddmmLora(torch.autograd.Function):
    """Manual autograd over `addmm_`, with nothing saved but x: S and dY·B are computed twice (Unsloth's order)."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling):
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        y = F.linear(x, weight, bias)
        return y.addmm_(x @ lora_a.to(x.dtype).t(), lora_b.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, lora_a, lora_b = ctx.saved_tensors
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        grad_b = (dy.t() @ (x @ a.t())).mul_(ctx.scaling)
        grad_a = ((dy @ b).t() @ x).mul_(ctx.scaling)
        dx = dy @ weight
        dx.addmm_(dy @ b, a, alpha=ctx.scaling)
        return dx, None, None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None


def addmm(t: Tensors) -> Contender:
    """The hand-written baseline. It has no dropout, like the code it stands for."""
    if t.problem.dropout:
        raise Unavailable("the addmm baseline has no dropout")

    def forward(x: Tensor) -> Tensor:
        return _AddmmLora.apply(x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling)  # type: ignore[return-value]

    return Contender("addmm", forward, (t.lora_a, t.lora_b))


def fastlora_backend(name: str) -> Callable[[Tensors], Contender]:
    def build(t: Tensors) -> Contender:
        from fastlora.ops.lora import choice as lora_choice
        from fastlora.ops.lora.linear import lora_linear

        x = t.lora_a.new_empty(t.problem.m, t.problem.k, dtype=t.weight.dtype)
        choice = lora_choice.select(x, t.weight, t.bias, t.lora_a, t.lora_b, t.problem.dropout, name)
        if name != "auto" and choice.name != name:
            raise Unavailable(choice.reason)

        def forward(x: Tensor) -> Tensor:
            return lora_linear(
                x, t.weight, t.lora_a, t.lora_b, t.scaling, bias=t.bias, dropout_p=t.problem.dropout, backend=name
            )

        return Contender(name, forward, (t.lora_a, t.lora_b))

    return build


def triton_with(s_inside: bool) -> Callable[[Tensors], Contender]:
    """The triton backend with S made inside the forward GEMM, or in a pass of its own, whatever its rule would
    choose."""
    name = "triton_s_inside" if s_inside else "triton"

    def build(t: Tensors) -> Contender:
        contender = fastlora_backend("triton")(t)
        from fastlora.ops.lora import choice as lora_choice
        from fastlora.ops.lora.autograd import LoraLinearFunction

        p, module = t.problem, lora_choice.load(name)
        x = t.lora_a.new_empty(p.m, p.k, dtype=t.weight.dtype)
        reason = module.unsupported(x, t.weight, t.bias, t.lora_a, t.lora_b, p.dropout)
        if reason is not None:
            raise Unavailable(reason)

        def forward(x: Tensor) -> Tensor:
            return LoraLinearFunction.apply(
                x, t.weight, t.bias, t.lora_a, t.lora_b, t.scaling, p.dropout, module, False
            )  # type: ignore[return-value]

        return Contender(name, forward, contender.leaves)

    return build


CONTENDERS: dict[str, Callable[[Tensors], Contender]] = {
    "frozen": frozen,
    "eager": eager,
    "peft": peft,
    "addmm": addmm,
    "compile": compiled,
    "auto": fastlora_backend("auto"),
    "torch": fastlora_backend("torch"),
    "cublas": fastlora_backend("cublas"),
    "triton": triton_with(s_inside=False),
    "triton_s_inside": triton_with(s_inside=True),
}


def build(name: str, tensors: Tensors) -> Contender:
    """The contender `name`. Raises Unavailable with the reason where it cannot run."""
    contender = CONTENDERS[name](tensors)
    contender.parameters = (tensors.weight,) if tensors.bias is None else (tensors.weight, tensors.bias)
    return contender
