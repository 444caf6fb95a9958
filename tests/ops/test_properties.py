"""Properties of `lora_linear` over random shapes, strides, dtypes, ranks and settings on the CPU (hypothesis).

Small problems can be right by luck in eager PyTorch, so the bound here is not eager's error but rounding's own: a few
units in the last place of the same sums over absolute values, which is what floating point promises for any order of
summation.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import with_layout
from problems import NAMES, PATHS, Problem, eager, fused, make_problem, path
from torch import Tensor

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
frugal = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SIZES = st.integers(1, 40)
RANKS = st.one_of(st.integers(1, 64), st.just(512))
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Problems with 1-D to 4-D x; where x is 2-D, any of the tensors may be a strided view."""
    k = draw(SIZES)
    rows = draw(
        st.lists(st.integers(0, 6), min_size=0, max_size=3) | st.lists(st.integers(0, 50), min_size=1, max_size=1)
    )
    dtype = draw(DTYPES)
    problem = make_problem(
        *rows,
        k,
        n=draw(SIZES),
        r=draw(RANKS),
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from([dtype, torch.float32])),
        bias=draw(st.booleans()),
        scaling=draw(st.sampled_from([1.0, 0.0, -2.0, 0.125, 16.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        seed=draw(st.integers(0, 1000)),
    )
    for name in ("x", "weight", "lora_A", "lora_B", "dy"):
        tensor = getattr(problem, name)
        if tensor.dim() == 2 and tensor.shape[0] > 0:
            problem.__dict__[name] = with_layout(tensor, draw(LAYOUTS))
    return problem


def majorant(problem: Problem, trained: list[str], keep_mask: Tensor | None) -> dict[str, Tensor]:
    """The output and the gradients with every term counted positive."""
    positive = problem.mapped(lambda t: t.double().abs())
    positive.__dict__["scaling"] = abs(problem.scaling)
    return eager(positive, trained, keep_mask)


def unit(problem: Problem, name: str) -> float:
    """How far each sum may be off, relative to the sum of absolute values: roundings in the dtypes met on the way, and
    fp32 accumulation."""
    dtypes = [problem.x.dtype] + ([getattr(problem, name).dtype] if name != "y" else [])
    terms = problem.x.shape[-1] + problem.weight.shape[0] + problem.lora_A.shape[0] + problem.x.numel()
    accumulator = torch.finfo(torch.float64 if problem.x.dtype == torch.float64 else torch.float32).eps
    return 4 * max(torch.finfo(dtype).eps for dtype in dtypes) + terms * accumulator


@pytest.mark.parametrize("which", PATHS)
@frugal
@given(problem=problems(), trained=st.sets(st.sampled_from(NAMES)))
def test_output_and_gradients(which, problem, trained):
    trained = sorted(trained - (set() if problem.bias is not None else {"bias"}))
    keep_mask = problem.keep_mask(seed=7)
    exact = eager(problem.mapped(Tensor.double), trained, keep_mask)
    bound = majorant(problem, trained, keep_mask)
    with path(which):
        got = fused(problem, trained, seed=7)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == (problem.x if name == "y" else getattr(problem, name)).dtype
        assert value.shape == exact[name].shape
        # Casting the adapters to x's dtype is one more rounding in each of them: the reference does not see it.
        allowed = unit(problem, name) * bound[name] + torch.finfo(value.dtype).tiny
        if problem.x.dtype == torch.float16:  # subnormal numbers, which are rounded absolutely
            allowed = allowed + 2.0**-24 * (1 + problem.weight.shape[0]) * 16
        assert ((value.double() - exact[name]).abs() <= allowed).all(), name


@pytest.mark.parametrize("which", PATHS)
@frugal
@given(problem=problems())
def test_linear_in_x_without_a_bias(which, problem):
    """f(2x) = 2 f(x), to the bit: powers of two do not round."""
    problem = problem.mapped(lambda t: t.float())
    problem.__dict__.update(bias=None, x=problem.x.clone(memory_format=torch.contiguous_format))
    with path(which):
        once = fused(problem, ())["y"]
        problem.x.mul_(2)  # in place: the alignment of x decides in which order ATen sums
        twice = fused(problem, ())["y"]
    torch.testing.assert_close(twice, once * 2, rtol=0, atol=1e-30)


@pytest.mark.parametrize("which", PATHS)
@frugal
@given(problem=problems(), scaling=st.sampled_from([0.0, 1.0]))
def test_a_zero_adapter_is_the_frozen_layer(which, problem, scaling):
    """With B = 0 (a fresh adapter) or s = 0, y is the base layer's output, up to its accumulator's rounding."""
    problem.__dict__["scaling"] = scaling
    if scaling:
        problem.__dict__["lora_B"] = torch.zeros_like(problem.lora_B)
    with path(which):
        y = fused(problem, ())["y"]
    base = torch.nn.functional.linear(problem.x.double(), problem.weight.double(), None)
    base = base if problem.bias is None else base + problem.bias.double()
    allowed = unit(problem, "y") * majorant(problem, [], None)["y"] + 2.0**-20
    assert ((y.double() - base).abs() <= allowed).all()
