"""LoRA linear problems on the GPU, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numerics import assert_close_to_fp64
from torch import Tensor

from fastlora.functional import lora_linear
from fastlora.ops import reference
from fastlora.ops.lora import choice as lora_choice

NAMES = ("x", "lora_A", "lora_B")


@dataclass(frozen=True)
class GpuProblem:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float = 1.5
    dropout_p: float = 0.0


def make(
    m: int,
    n: int,
    k: int,
    r: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout_p: float = 0.0,
) -> GpuProblem:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, device="cuda", generator=generator) * scale).to(to)

    adapter_dtype = adapter_dtype or dtype
    return GpuProblem(
        x=normal(m, k),
        weight=normal(n, k, scale=k**-0.5),
        bias=normal(n) if bias else None,
        lora_A=normal(r, k, scale=k**-0.5, to=adapter_dtype),
        lora_B=normal(n, r, scale=r**-0.5, to=adapter_dtype),
        dy=normal(m, n),
        dropout_p=dropout_p,
    )


def leaves(problem: GpuProblem, double: bool = False) -> dict[str, Tensor]:
    tensors = {name: getattr(problem, name).detach() for name in NAMES}
    return {name: (t.double() if double else t).requires_grad_() for name, t in tensors.items()}


def call(problem: GpuProblem, given: dict[str, Tensor], backend: str) -> Tensor:
    """`lora_linear` of these leaves."""
    return lora_linear(
        given["x"],
        problem.weight,
        given["lora_A"],
        given["lora_B"],
        problem.scaling,
        bias=problem.bias,
        dropout_p=problem.dropout_p,
        backend=backend,
    )


def run(problem: GpuProblem, backend: str, seed: int = 0) -> dict[str, Tensor]:
    """{"y": output, name: gradient} of `lora_linear`; the backend is the one asked for, or the test fails."""
    choice = lora_choice.select(
        problem.x, problem.weight, problem.bias, problem.lora_A, problem.lora_B, problem.dropout_p, backend
    )
    assert choice.name == backend, choice.reason
    torch.manual_seed(seed)
    given = leaves(problem)
    y = call(problem, given, backend)
    gradients = torch.autograd.grad(y, list(given.values()), problem.dy)
    return {"y": y.detach(), **dict(zip(given, gradients, strict=True))}


def run_reference(problem: GpuProblem, keep_mask: Tensor | None, double: bool) -> dict[str, Tensor]:
    """The same from the specification, in fp64 or in the problem's own dtypes."""
    given = leaves(problem, double)
    weight, bias, dy = (
        None if t is None else t.double() if double else t for t in (problem.weight, problem.bias, problem.dy)
    )
    assert weight is not None
    y = reference.lora_linear(
        given["x"], weight, given["lora_A"], given["lora_B"], problem.scaling, bias, problem.dropout_p, keep_mask
    )
    gradients = torch.autograd.grad(y, list(given.values()), dy)
    return {"y": y.detach(), **dict(zip(given, gradients, strict=True))}


def assert_right(problem: GpuProblem, backend: str, keep_mask: Tensor | None = None) -> None:
    got = run(problem, backend)
    exact = run_reference(problem, keep_mask, double=True)
    eager = run_reference(problem, keep_mask, double=False)
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], eager[name], what=f"{backend} {name}")
