"""float32 adapters on a half-precision base, outside autocast: as exact as eager PyTorch in the same dtypes, whatever
the magnitudes. Nothing underflows or overflows on the low-rank path that would not in float32.

The other side is eager PyTorch as PEFT runs it: x cast to the adapters' dtype, one rounding of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

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
    GroupLayer,
    dora_linear,
    lora_group,
    lora_linear,
    lora_mixed_batch,
    lora_mlp,
    multi_lora_linear,
)
from fastlora.ops.group import group as group_op

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


# The other ops: x and dY, then weights (half precision, in fp64 for the exact side), then factors.


def group_by_ops(x, *layers):
    return lora_group(x, [GroupLayer(w, [Adapter(a, b, 1.7)]) for w, a, b in layers])


def group_by_eager(x, *layers):
    return [as_peft(x, w, a, b, 1.7, None) for w, a, b in layers]


def mixed_by_ops(x, *layers):
    (w, *_), adapters = layers[0], [Adapter(a, b, 0.7 + i) for i, (_, a, b) in enumerate(layers)]
    return [lora_mixed_batch(x.view(10, 7, -1), w, adapters, [0, 1, -1, 2, 0, 1, 1, -1, 2, 0]).view(70, -1)]


def mixed_by_eager(x, *layers):
    w, rows = layers[0][0], x.view(10, 7, -1)
    ys = []
    for row, i in zip(rows, [0, 1, -1, 2, 0, 1, 1, -1, 2, 0], strict=True):
        ys.append(F.linear(row, w) if i < 0 else as_peft(row, w, layers[i][1], layers[i][2], 0.7 + i, None))
    return [torch.cat(ys)]


def several_by_ops(x, *layers):
    p = 0.25
    return [multi_lora_linear(x, layers[0][0], [Adapter(a, b, 0.7 + i, p) for i, (_, a, b) in enumerate(layers)])]


def several_by_eager(x, *layers):
    y = F.linear(x, layers[0][0])
    total = y
    for i, (_, a, b) in enumerate(layers):
        kept = F.dropout(torch.ones_like(x, dtype=torch.bfloat16), 0.25) != 0
        total = total + F.linear(F.linear(x.to(a.dtype) * kept / 0.75, a), b) * (0.7 + i)
    return [total.to(y.dtype)]


def mlp_by_ops(x, gate, up, down):
    first, second, third = (GroupLayer(w, [Adapter(a, b, 1.7)]) for w, a, b in (gate, up, down))
    return [lora_mlp(x, first, second, third)]


def mlp_by_eager(x, gate, up, down):
    def layer(x, factors):
        w, a, b = factors
        return as_peft(x, w, a, b, 1.7, None)

    return [layer(F.silu(layer(x, gate)) * layer(x, up), down)]


def dora_by_ops(x, layer, *_, dropout_p=0.0):
    w, a, b = layer
    magnitude = w.to(a.dtype).norm(dim=1) * 1.5
    return [dora_linear(x, w, a, b, magnitude, 1.7, None, dropout_p)]


def dora_by_eager(x, layer, *_):
    w, a, b = layer
    wide = w.to(a.dtype)
    factor = wide.norm(dim=1) * 1.5 / (wide + 1.7 * b @ a).detach().norm(dim=1)
    y = F.linear(x, w)
    return [(y + (factor - 1) * y + factor * F.linear(F.linear(x.to(a.dtype), a), b) * 1.7).to(y.dtype)]


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "group": (group_by_ops, group_by_eager),
    "mixed": (mixed_by_ops, mixed_by_eager),
    "several": (several_by_ops, several_by_eager),
    "mlp": (mlp_by_ops, mlp_by_eager),
    "dora": (dora_by_ops, dora_by_eager),
}


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("magnitudes", MAGNITUDES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_op(name, dtype, magnitudes, which, monkeypatch):
    of_x, of_a, of_b, of_dy = MAGNITUDES[magnitudes]
    if name == "mlp" and magnitudes in ("huge", "mixed"):
        of_x = 1.0  # gate and up are half precision, and their product overflows in eager PyTorch too
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(to)

    k, r = 40, 4
    x, dy = normal(70, k, scale=of_x), normal(70, k, scale=of_dy)
    layers = [
        (
            normal(k, k, scale=k**-0.5),
            normal(r, k, scale=of_a * k**-0.5, to=torch.float32),
            normal(k, r, scale=of_b, to=torch.float32),
        )
        for _ in range(3)
    ]

    def gradients(function: Callable[..., Any], change=lambda t: t) -> dict[str, Tensor]:
        torch.manual_seed(0)
        given = change(x).requires_grad_()
        leaves = [[change(w), change(a).requires_grad_(), change(b).requires_grad_()] for w, a, b in layers]
        ys = function(given, *leaves)
        names = ["x", *(f"{factor} {i}" for i in range(3) for factor in "AB")]
        factors = [given, *(t for _, *ab in leaves for t in ab)]
        found = torch.autograd.grad(ys, factors, [change(dy)] * len(ys), allow_unused=True)
        results = {f"y {i}": y.detach() for i, y in enumerate(ys)} | dict(zip(names, found, strict=True))
        return {name: value for name, value in results.items() if value is not None}

    by_ops, by_eager = OPS[name]
    monkeypatch.setattr(group_op, "SMALL", 1)
    with path(which):
        got = gradients(by_ops, lambda t: t.clone())
    exact, eager = gradients(by_eager, Tensor.double), gradients(by_eager, lambda t: t.clone())
    assert got.keys() == exact.keys()
    assert_as_exact(got, exact, eager)


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
