"""`lora_linear` and `multi_lora_linear` on the CPU, through both paths: values, gradients, dropout, bad input."""

from collections.abc import Callable
from typing import Any

import contracts
import pytest
import torch
import torch.nn.functional as F
from problems import NAMES, PATHS, assert_right, eager, fused, make_problem, path, run
from torch import Tensor

import fastlora
from fastlora.functional import Adapter, lora_linear, multi_lora_linear
from fastlora.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=PATHS, autouse=True)
def either_path(request):
    with path(request.param):
        yield request.param


@pytest.mark.parametrize("side", ["K", "N"])
def test_layers_without_elements(side):
    """As in F.linear: no inputs leave the bias, no outputs leave nothing, and gradients are zeros."""
    problem = make_problem(2, 3, 0, n=4) if side == "K" else make_problem(2, 3, 5, n=0)
    got, want = fused(problem), eager(problem)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, 1:4],
        lambda x: x[:, ::2],
        lambda x: x[..., 3:],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ],
)
def test_views_of_three_dimensions(view):
    x = view(torch.randn(4, 6, 19))
    problem = make_problem(*x.shape, n=13)
    problem.__dict__["x"] = x
    assert_right(problem, trained=NAMES)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_against_finite_differences(dropout_p):
    problem = make_problem(3, 2, 5, n=4, r=2, dtype=torch.float64)
    leaves = [getattr(problem, name).requires_grad_() for name in ("x", "weight", "lora_A", "lora_B", "bias")]

    def function(x, weight, lora_A, lora_B, bias):
        torch.manual_seed(5)
        return lora_linear(x, weight, lora_A, lora_B, 1.5, bias, dropout_p)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["auto", "torch", "cublas", "triton"])
def test_every_backend_s_name_is_understood_on_a_cpu(backend):
    """What a hand-written backend cannot take falls down to ATen."""
    problem = make_problem(8, 16, n=16, r=4)
    got, want = fused(problem, backend=backend), fused(problem)
    torch.testing.assert_close(got, want)


def test_the_output_may_be_written_into():
    """`ReLU(inplace=True)` after a layer, or `h += ...` on what was computed without gradients."""
    for shape in ((6, 9), (2, 3, 9), (9,)):
        problem = make_problem(*shape, n=7)
        want = run(problem, lambda *a: F.relu(lora_linear(*a)))
        got = run(problem, lambda *a: F.relu_(lora_linear(*a)))
        assert all(torch.equal(got[name], want[name]) for name in want)
        with torch.no_grad():
            y = fused(problem, trained=())["y"]
        y += torch.ones(7, requires_grad=True)
        assert y.requires_grad


def test_the_meta_device_gives_shapes_and_dtypes():
    problem = make_problem(2, 3, 9, n=7, dropout_p=0.1, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    got, want = fused(problem.mapped(lambda t: t.to("meta"))), fused(problem)
    assert all(value.is_meta for value in got.values())
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}


# Dropout.
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (7, 11), (2, 16, 40)], ids=str)
def test_drops_what_torch_drops_and_leaves_the_generator_where_torch_does(shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    k = shape[-1]
    torch.manual_seed(11)
    want = F.dropout(x, 0.4)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    eye = torch.eye(k, dtype=dtype)
    y = lora_linear(x, torch.zeros(k, k, dtype=dtype), eye, eye, 1.0, dropout_p=0.4)
    torch.testing.assert_close(y, want)
    assert torch.equal(y == 0, want == 0)
    assert torch.equal(torch.get_rng_state(), after)


def test_nothing_dropped_in_eval_mode():
    problem = make_problem(8, 16, dropout_p=0.5)
    before = torch.get_rng_state()
    got = run(problem, lora_linear, training=False)
    assert torch.equal(torch.get_rng_state(), before)
    problem.__dict__["dropout_p"] = 0.0
    want = fused(problem)
    assert all(torch.equal(got[name], want[name]) for name in want)


# Autocast.
@pytest.mark.parametrize("backward_within", [False, True])
@pytest.mark.parametrize("base, adapters", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_autocast(base, adapters, backward_within):
    """F.linear's casts: the error is at most twice eager's in the same context; gradients in their tensors' dtypes."""
    dtype, adapter_dtype = getattr(torch, base), getattr(torch, adapters)
    problem = make_problem(2, 20, 65, dtype=dtype, adapter_dtype=adapter_dtype)
    problem.__dict__["x"] = problem.x.float()
    problem.__dict__["dy"] = problem.dy.bfloat16()

    def under_autocast(function):
        def call(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x, weight, lora_A, lora_B, scaling, bias)

        with torch.autocast("cpu", torch.bfloat16, enabled=backward_within):
            return run(problem, call, NAMES)

    got = under_autocast(lora_linear)
    in_same_dtype = under_autocast(lambda x, w, a, b, s, bias: F.linear(x, w, bias) + s * F.linear(F.linear(x, a), b))
    exact = eager(problem.mapped(Tensor.double), NAMES)
    for name, value in got.items():
        assert value.dtype == in_same_dtype[name].dtype
        error, allowed = (value.double() - exact[name]).norm(), (in_same_dtype[name].double() - exact[name]).norm()
        assert error <= 2 * allowed, name


def test_backward_within_autocast_of_a_forward_outside():
    problem = make_problem(2, 20, 65, dropout_p=0.25)
    want = fused(problem, NAMES)
    leaves = {name: getattr(problem, name).requires_grad_() for name in NAMES}
    torch.manual_seed(0)
    y = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], 1.5, leaves["bias"], 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    for name, value in zip(leaves, got, strict=True):
        assert value.dtype == torch.float32
        assert (value - want[name]).norm() < 0.02 * want[name].norm(), name


# Several adapters.
def _adapters(k, n):
    generator = torch.Generator().manual_seed(1)

    def adapter(r, scaling, dropout_p, dtype=torch.float64):
        a, b = torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)
        return Adapter(a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), scaling, dropout_p)

    return {
        "plain": adapter(3, 2.0, 0.0),
        "plain too": adapter(1, 2.0, 0.0),
        "another scale": adapter(8, -0.5, 0.0),
        "float32": adapter(2, 1.5, 0.0, torch.float32),
        "dropped": adapter(4, 1.0, 0.3),
        "dropped more": adapter(5, 0.7, 0.6),
    }


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("plain",),
        ("dropped",),
        ("plain", "plain too"),
        ("plain", "plain too", "another scale"),
        ("plain", "float32"),
        ("dropped", "dropped more"),
        ("dropped more", "plain", "dropped", "another scale"),
    ],
    ids=" + ".join,
)
@pytest.mark.parametrize("training", [True, False])
def test_several_adapters(names, training):
    """The sum of their terms, each with a mask of its own, drawn in the order given."""
    x = torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    adapters = [_adapters(9, 7)[name] for name in names]
    torch.manual_seed(2)
    got = multi_lora_linear(x, weight, adapters, bias, training=training)
    torch.manual_seed(2)
    want = F.linear(x, weight, bias)
    for a, b, scaling, dropout_p, *_ in adapters:
        dropped = F.dropout(x, dropout_p, training) if dropout_p else x
        want = want + scaling * F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    rounding = 1e-6 if "float32" in names else 1e-7  # s·B is float32's there
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)
    leaves = [x, *(t for adapter in adapters for t in adapter[:2])]
    dy = torch.randn_like(want)
    for value, wanted in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)  # dtypes too


def test_several_adapters_in_half_precision():
    problem = make_problem(33, 65, dtype=torch.bfloat16)
    weight, bias = problem.weight, torch.randn(47).bfloat16()
    adapters = [a._replace(lora_A=a.lora_A * 65**-0.5) for a in _adapters(65, 47).values() if a.dropout_p == 0.0]
    got = multi_lora_linear(problem.x, weight, adapters, bias)

    def summed(x, weight, bias):
        y = F.linear(x, weight, bias)
        for a, b, scaling, *_ in adapters:
            y = y + scaling * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return y

    exact = summed(problem.x.double(), weight.double(), bias.double())
    eager_error = (summed(problem.x, weight, bias).double() - exact).norm()
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() <= 2 * eager_error


def test_tensor_subclasses_see_every_operation():
    """A subclass gets to see the matmuls: it is what sharded and quantised tensors live by."""
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    problem = make_problem(5, 8, n=6)
    want = reference.lora_linear(problem.x, problem.weight, problem.lora_A, problem.lora_B, 1.5)
    weight = problem.weight.as_subclass(Watching)
    y = lora_linear(problem.x, weight, problem.lora_A, problem.lora_B, 1.5)
    assert isinstance(y, Watching) and F.linear in seen
    torch.testing.assert_close(y.as_subclass(torch.Tensor), want)


def _calls(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, p: float) -> dict[str, Callable[[], Any]]:
    """Every function with a LoRA layer in it, called with one of these."""
    f, adapter = fastlora.functional, fastlora.functional.Adapter(a, b, 2.0, p)
    layer = f.GroupLayer(w, [adapter], bias)
    return {
        "lora_linear": lambda: f.lora_linear(x, w, a, b, 2.0, bias, p),
        "multi_lora_linear": lambda: f.multi_lora_linear(x, w, [adapter], bias),
        "dora_linear": lambda: f.dora_linear(x, w, a, b, torch.ones(6), 2.0, bias, p),
        "lora_group": lambda: f.lora_group(x, [layer, layer]),
        "lora_mixed_batch": lambda: f.lora_mixed_batch(x, w, [adapter], [0] * len(x), bias),
        "lora_activated_linear": lambda: f.lora_activated_linear(x, None, layer),
        "lora_mlp": lambda: f.lora_mlp(x, layer, layer, layer),
    }


SQUARE = torch.empty(6, 6)


@pytest.mark.parametrize("name", list(_calls(SQUARE, SQUARE, SQUARE, SQUARE, None, 0.0)))
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"a": (3, 5)}, "shapes: got x"),
        ({"w": (6,)}, "dimensions: got x"),
        ({"bias": (7,)}, "bias: got shape"),
        ({"p": 1.5}, "dropout_p: got 1.5"),
        ({"dtype": torch.float64}, "x, weight and bias: got x torch.float32, weight torch.float64"),
    ],
)
def test_errors_name_the_function_that_was_called(name, wrong, message):
    shapes = {"x": (6, 6), "w": (6, 6), "a": (3, 6), "b": (6, 3), **wrong}
    x, w, a, b = (torch.ones(shapes[key]) for key in ("x", "w", "a", "b"))
    w = w.to(wrong.get("dtype", w.dtype))
    bias = torch.ones(wrong["bias"]) if "bias" in wrong else None
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        _calls(x, w, a, b, bias, wrong.get("p", 0.0))[name]()


class TestLoraLinear(contracts.LoraLinear):
    dtypes = (*contracts.LoraLinear.dtypes, (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16))
