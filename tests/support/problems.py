"""LoRA linear problems on the CPU and what eager PyTorch computes for them: the other side of the core's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64
from torch import Tensor

from fastlora.functional import lora_linear
from fastlora.ops import call, reference
from fastlora.ops.mlp import mlp as mlp_op

PATHS = ("composed", "function")
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


@contextmanager
def path(name: str) -> Iterator[None]:
    """Sends CPU calls of every size through ATen's own autograd ("composed"), or `LoraLinearFunction` ("function")."""
    former = call.SMALL
    call.SMALL = {"composed": 1 << 62, "function": 0}[name]
    try:
        yield
    finally:
        call.SMALL = former


def through_the_function() -> Iterator[None]:
    """Every call takes the way of a real model's: tiny ones would be left to ATen's own autograd. For a fixture."""
    with path("function"):
        yield


def spied_mlps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations of the MLPs that run fused from now on, in order."""
    calls: list[str] = []
    original = mlp_op.fused

    def counting(*args):
        calls.append(args[-2])
        return original(*args)

    monkeypatch.setattr(mlp_op, "fused", counting)
    return calls


@dataclass(frozen=True)
class Problem:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float = 1.5
    dropout_p: float = 0.0

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with every tensor changed."""
        tensors = {name: getattr(self, name) for name in (*NAMES, "dy")}
        return replace(self, **{name: None if t is None else change(t) for name, t in tensors.items()})

    def keep_mask(self, seed: int) -> Tensor | None:
        """What dropout keeps of x when the generator starts from `seed`: eager PyTorch's own mask."""
        if self.dropout_p == 0.0:
            return None
        torch.manual_seed(seed)
        rows = self.x.reshape(-1, self.x.shape[-1])
        return (F.dropout(torch.ones_like(rows), self.dropout_p) != 0).reshape(self.x.shape)


def make_problem(
    *x_shape: int,
    n: int = 47,
    r: int = 5,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    scaling: float = 1.5,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Random numbers of about unit variance throughout; x is `x_shape`, N is `n`."""
    generator = torch.Generator().manual_seed(seed)
    k = x_shape[-1]
    fan_in = max(k, 1)

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    return Problem(
        x=randn(*x_shape),
        weight=randn(n, k, scale=fan_in**-0.5),
        bias=randn(n) if bias else None,
        lora_A=randn(r, k, scale=fan_in**-0.5, dtype=adapter_dtype),
        lora_B=randn(n, r, scale=r**-0.5, dtype=adapter_dtype),
        dy=randn(*x_shape[:-1], n),
        scaling=scaling,
        dropout_p=dropout_p,
    )


def run(
    problem: Problem,
    function: Callable[..., Tensor],
    trained: Sequence[str] = ("x", "lora_A", "lora_B"),
    **options: object,
) -> dict[str, Tensor]:
    """{"y": output, name: gradient} for `function`, called as `lora_linear` is."""
    leaves: dict[str, Any] = {name: getattr(problem, name) for name in NAMES}
    leaves = {name: None if t is None else t.detach().requires_grad_(name in trained) for name, t in leaves.items()}
    y = function(
        leaves["x"],
        leaves["weight"],
        leaves["lora_A"],
        leaves["lora_B"],
        problem.scaling,
        leaves["bias"],
        problem.dropout_p,
        **options,
    )
    if not trained:
        return {"y": y}
    gradients = torch.autograd.grad(y, [leaves[name] for name in trained], problem.dy)
    return {"y": y.detach(), **dict(zip(trained, gradients, strict=True))}


def fused(
    problem: Problem, trained: Sequence[str] = ("x", "lora_A", "lora_B"), seed: int = 0, **options: object
) -> dict[str, Tensor]:
    """`lora_linear`'s output and gradients, its dropout drawn from `seed`."""
    torch.manual_seed(seed)
    return run(problem, lora_linear, trained, **options)


def eager(
    problem: Problem, trained: Sequence[str] = ("x", "lora_A", "lora_B"), keep_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The reference's output and gradients, in the problem's own dtypes."""
    return run(problem, reference.lora_linear, trained, keep_mask=keep_mask)


def assert_right(problem: Problem, trained: Sequence[str] = ("x", "lora_A", "lora_B"), seed: int = 0) -> None:
    """Output and gradients obey the fp64 rule of numerics.py, in the dtypes of the tensors that they belong to."""
    keep_mask = problem.keep_mask(seed)
    got = fused(problem, trained, seed)
    in_same_dtype = eager(problem, trained, keep_mask)
    exact = eager(problem.mapped(Tensor.double), trained, keep_mask)
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], in_same_dtype[name], what=name)
