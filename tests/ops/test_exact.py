"""float32 adapters on a half-precision base, outside autocast: as exact as eager PyTorch in the same dtypes, whatever
the magnitudes. Nothing underflows or overflows on the low-rank path that would not in float32.

The other side is eager PyTorch as PEFT runs it: x cast to the adapters' dtype, one rounding of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64
from problems import NAMES, PATHS, Problem, make_problem, path
from torch import Tensor

from fastlora.functional import lora_linear

HALVES = (torch.bfloat16, torch.float16)
ADAPTERS = ("x", "lora_A", "lora_B")
# Factors of x, A, B and dY: what a start near zero, a loss that is a mean over many tokens, or a large one make.
MAGNITUDES = {
    "usual": (1.0, 1.0, 1.0, 1.0),
    "tiny": (1.0, 1.0, 1e-5, 1e-5),
    "tiny everywhere": (1e-3, 1e-4, 1e-4, 1e-4),
    "huge": (30.0, 1e3, 1e-3, 40.0),
    "mixed": (30.0, 1e-4, 10.0, 1e-5),
}


def scaled(problem: Problem, magnitudes: str) -> dict[str, Tensor]:
    of_x, of_a, of_b, of_dy = MAGNITUDES[magnitudes]
    # In the tensor's own dtype from here on: both sides get the same numbers.
    changed = {"x": of_x, "lora_A": of_a, "lora_B": of_b, "dy": of_dy}
    tensors = {name: getattr(problem, name) for name in (*NAMES, "dy")}
    return {name: (t.double() * changed.get(name, 1.0)).to(t.dtype) for name, t in tensors.items()}


def as_peft(x, weight, lora_A, lora_B, scaling, bias, dropout_p=0.0, keep=None) -> Tensor:
    y = F.linear(x, weight, bias)
    wide = x.to(lora_A.dtype)
    if keep is not None:
        wide = wide * keep / (1 - dropout_p)
    return (y + F.linear(F.linear(wide, lora_A), lora_B) * scaling).to(y.dtype)


def step(function: Callable[..., Tensor], tensors: dict[str, Tensor], change=lambda t: t, **how: Any) -> dict:
    """{"y": output, name: gradient}."""
    leaves = {name: change(tensors[name]).detach().requires_grad_(name in ADAPTERS) for name in NAMES}
    y = function(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], 2.0, leaves["bias"], **how)
    gradients = torch.autograd.grad(y, [leaves[name] for name in ADAPTERS], change(tensors["dy"]))
    return {"y": y.detach(), **dict(zip(ADAPTERS, gradients, strict=True))}


def assert_as_exact(got: dict, exact: dict, eager: dict) -> None:
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], eager[name], name)
        zeros = (value == 0) & (eager[name] != 0)
        assert not zeros.any(), f"{name}: {zeros.sum().item()} zeros where eager PyTorch has none"


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("magnitudes", MAGNITUDES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lora_linear(dtype, magnitudes, dropout_p, which):
    problem = make_problem(70, 65, n=47, r=5, dtype=dtype, adapter_dtype=torch.float32, dropout_p=dropout_p)
    tensors, keep = scaled(problem, magnitudes), problem.keep_mask(0)
    torch.manual_seed(0)
    with path(which):
        got = step(lora_linear, tensors, dropout_p=dropout_p)
    how = {"dropout_p": dropout_p, "keep": keep}
    assert_as_exact(got, step(as_peft, tensors, Tensor.double, **how), step(as_peft, tensors, **how))


def test_tall_inputs_in_pieces(monkeypatch):
    """Sums of many positive numbers leave fp16's range, and rows are cast a few at a time."""
    from fastlora.ops.lora import aten

    monkeypatch.setattr(aten, "CHUNK", 1000)
    problem = make_problem(8192, 24, n=40, r=3, dtype=torch.float16, adapter_dtype=torch.float32)
    tensors = scaled(problem, "usual")
    tensors |= {"x": tensors["x"].abs() + 1, "dy": tensors["dy"].abs() + 40}
    with path("function"):
        got = step(lora_linear, tensors)
    assert all(value.isfinite().all() for value in got.values())
    exact, eager = step(as_peft, tensors, Tensor.double), step(as_peft, tensors)
    assert_as_exact(got, exact, eager)


@pytest.mark.parametrize("which", PATHS)
def test_under_autocast_as_eager_is(which):
    """Everything in autocast's dtype, factors too; their gradients in their own."""
    problem = make_problem(70, 65, dtype=torch.float32, adapter_dtype=torch.float32)
    tensors = scaled(problem, "usual")
    tensors |= {"dy": tensors["dy"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16), path(which):
        got, eager = step(lora_linear, tensors), step(as_peft, tensors)
    assert_as_exact(got, step(as_peft, tensors, Tensor.double), eager)
    assert [got[name].dtype for name in ("y", *ADAPTERS)] == [torch.bfloat16, *[torch.float32] * 3]


def test_s_is_kept_in_float32_and_half_precision_under_autocast():
    problem = make_problem(70, 65, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    kept: list[Tensor] = []

    def saved(**how: Any) -> set[torch.dtype]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), path("function"):
            step(lora_linear, scaled(problem, "usual"))
        return {t.dtype for t in kept if t.shape == (70, 5)}

    assert saved() == {torch.float32}
    assert not any(t.dtype == torch.float32 and t.shape == (70, 65) for t in kept), "a float32 copy of x"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved() == {torch.bfloat16}
