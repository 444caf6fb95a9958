"""float32 adapters on a half-precision base, outside autocast: as exact as eager PyTorch in the same dtypes. (Each op
by itself, whatever the magnitudes: contracts.py.)

The other side is eager PyTorch as PEFT runs it: x cast to the adapters' dtype, one rounding of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import contracts
import peft
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64
from problems import NAMES, PATHS, Problem, make_problem, path
from torch import Tensor

import fastlora
from fastlora.functional import (
    Adapter,
    lora_linear,
    multi_lora_linear,
)

HALVES = (torch.bfloat16, torch.float16)
ADAPTERS = ("x", "lora_A", "lora_B")


def tensors_of(problem: Problem) -> dict[str, Tensor]:
    return {name: getattr(problem, name) for name in (*NAMES, "dy")}


def as_peft(x, weight, lora_A, lora_B, scaling, bias, dropout_p=0.0, keep=None) -> Tensor:
    y = F.linear(x, weight, bias)
    wide = x.to(lora_A.dtype)
    if keep is not None:
        wide = wide * keep / (1 - dropout_p)
    return (y + F.linear(F.linear(wide, lora_A), lora_B) * scaling).to(y.dtype)


def step(function: Callable[..., Tensor], tensors: dict[str, Tensor], change=lambda t: t, **how: Any) -> dict:
    """{"y": output, name: gradient}."""
    leaves = {name: change(tensors[name]).detach().requires_grad_(name in ADAPTERS) for name in NAMES}
    y = function(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], 1.7, leaves["bias"], **how)
    gradients = torch.autograd.grad(y, [leaves[name] for name in ADAPTERS], change(tensors["dy"]))
    return {"y": y.detach(), **dict(zip(ADAPTERS, gradients, strict=True))}


def assert_as_exact(got: dict, exact: dict, eager: dict) -> None:
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], eager[name], name)
        # Sums that cancel may round to nothing in half precision; what is beyond eager's error may not.
        least = (eager[name].double() - exact[name]).abs().max()
        zeros = (value == 0) & (eager[name] != 0) & (exact[name].abs() > least)
        assert not zeros.any(), f"{name}: {zeros.sum().item()} zeros where eager PyTorch has none"


def test_tall_inputs_in_pieces(monkeypatch):
    """Sums of many positive numbers leave fp16's range, and rows are cast a few at a time."""
    from fastlora.ops.lora import aten

    monkeypatch.setattr(aten, "CHUNK", 1000)
    problem = make_problem(8192, 24, n=40, r=3, dtype=torch.float16, adapter_dtype=torch.float32)
    tensors = tensors_of(problem)
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
    tensors = tensors_of(problem)
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
            step(lora_linear, tensors_of(problem))
        return {t.dtype for t in kept if t.shape == (70, 5)}

    assert saved() == {torch.float32}
    assert not any(t.dtype == torch.float32 and t.shape == (70, 65) for t in kept), "a float32 copy of x"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved() == {torch.bfloat16}


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("magnitudes", contracts.MAGNITUDES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_several_adapters_that_drop(dtype, magnitudes, which):
    of_x, of_a, of_b, of_dy = contracts.MAGNITUDES[magnitudes]
    torch.manual_seed(1)
    x, dy, weight = (torch.randn(rows, 40).mul(of).to(dtype) for rows, of in ((70, of_x), (70, of_dy), (40, 40**-0.5)))
    factors = [torch.randn(shape) * of for shape, of in 3 * (((4, 40), of_a * 40**-0.5), ((40, 4), of_b))]

    def gradients(function, change=lambda t: t.clone()) -> dict[str, Tensor]:
        torch.manual_seed(0)
        given, *leaves = (change(t).requires_grad_() for t in (x, *factors))
        y = function(given, change(weight), list(zip(leaves[::2], leaves[1::2], strict=True)))
        found = torch.autograd.grad(y, [given, *leaves], change(dy))
        return {"y": y.detach(), "x": found[0], **{f"factor {i}": t for i, t in enumerate(found[1:])}}

    def fused(x, weight, pairs) -> Tensor:
        return multi_lora_linear(x, weight, [Adapter(a, b, 0.7 + i, 0.25) for i, (a, b) in enumerate(pairs)])

    def eager(x, weight, pairs) -> Tensor:
        y = total = F.linear(x, weight)
        for i, (a, b) in enumerate(pairs):
            kept = F.dropout(torch.ones_like(x, dtype=torch.bfloat16), 0.25) != 0
            total = total + F.linear(F.linear(x.to(a.dtype) * kept / 0.75, a), b) * (0.7 + i)
        return total.to(y.dtype)

    with path(which):
        got = gradients(fused)
    assert_as_exact(got, gradients(eager, Tensor.double), gradients(eager))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_peft_layer_patched_in_place(dtype, dropout, autocast):
    """PEFT keeps its adapters in float32 on a half-precision model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 48)).to(dtype)
    config = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    layer = cast(Any, model.base_model.model)[0]
    with torch.no_grad():
        layer.lora_B.default.weight.mul_(1e-5)
    x, dy = torch.randn(70, 40).to(dtype), (torch.randn(70, 48) * 1e-5).to(dtype)

    def gradients(exact: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        factors = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
        if exact:
            kept = torch.ones_like(x) if dropout == 0.0 else F.dropout(torch.ones_like(x), dropout)
            base, given = layer.base_layer, given.detach().double().requires_grad_()
            factors = {name: t.detach().double().requires_grad_() for name, t in factors.items()}
            y = F.linear(given, base.weight.double(), base.bias.double())
            low_rank = F.linear(F.linear(given * (kept != 0) / (1 - dropout), factors["A"]), factors["B"])
            y = y + low_rank * layer.scaling["default"]
        else:
            with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                y = model(given)
        found = torch.autograd.grad(y, [given, *factors.values()], dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(("x", *factors), found, strict=True))}

    eager, exact = gradients(), gradients(exact=True)
    fastlora.patch(model)
    for which in PATHS:
        with path(which):
            assert_as_exact(gradients(), exact, eager)
    assert layer.calls.fused == 2 and not layer.calls.fallback
