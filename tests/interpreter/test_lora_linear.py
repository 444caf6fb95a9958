# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false
# Gradients are None where they are not asked for; a test knows which it asked for.

"""`lora_linear` on the Triton kernels, interpreted, and what a backend is asked for beyond the call itself."""

import contracts
import pytest
import torch
from numerics import assert_close_to_fp64, with_layout

from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.ops import reference
from fastlora.ops.lora import cublas, triton_s_inside
from fastlora.ops.lora import triton as lora_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = (True, True, True)


class TestLoraLinear(contracts.Interpreted, contracts.LoraLinear):
    places = contracts.INTERPRETED
    dtypes = ((BF16, BF16), (FP16, FP16), *contracts.Interpreted.dtypes)


def problem(m, n, k, r, dtype, adapter_dtype, bias, layout):
    torch.manual_seed(m + n + k + r)
    x = with_layout(torch.randn(m, k).to(dtype), layout)
    weight = with_layout((torch.randn(n, k) * k**-0.5).to(dtype), "contiguous" if layout == "expanded" else layout)
    a = (torch.randn(r, k) * k**-0.5).to(adapter_dtype)
    b = (torch.randn(n, r) * r**-0.5).to(adapter_dtype)
    dy = with_layout(torch.randn(m, n).to(dtype), layout)
    return x, weight, (torch.randn(n).to(dtype) if bias else None), a, b, dy


def dropped_linear(x, weight, a, b, scaling, bias, keep, scale):
    """The reference, with the scale of the quantised dropout probability and the dtype of its arguments."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y + scaling * torch.nn.functional.linear(torch.nn.functional.linear(x * keep * scale, a), b)


def gradients(y, leaves, dy, needs):
    wanted = [leaf for leaf, needed in zip(leaves, needs) if needed]
    grads = iter(torch.autograd.grad(y, wanted, dy))
    return [next(grads) if needed else None for needed in needs]


def check(
    m,
    n,
    k,
    r,
    dtype=BF16,
    adapter_dtype=None,
    *,
    p=0.0,
    bias=True,
    scaling=1.5,
    needs=ALL,
    layout="contiguous",
    backend=cublas,
    narrow=False,
):
    adapter_dtype = adapter_dtype or dtype
    x, weight, bias_, a, b, dy = problem(m, n, k, r, dtype, adapter_dtype, bias, layout)
    assert backend.unsupported(x, weight, bias_, a, b, p) is None
    y, s, state = backend.forward(x, weight, bias_, a, b, scaling, p, None, narrow)
    saved_x, saved_s = (x if needs[1] else None), (s if needs[2] else None)
    grads = backend.backward(dy, saved_x, weight, a, b, saved_s, state, scaling, p, needs, narrow)

    keep = reference_keep_mask(state, m, k, p) if p else torch.ones(m, k, dtype=torch.bool)
    scale = threshold_and_scale(p)[1]
    path = dtype if narrow else torch.promote_types(dtype, adapter_dtype)  # what the low-rank path computes in
    assert s.dtype == path
    leaves64 = [t.to(path if t is not x else dtype).double().requires_grad_() for t in (x, a, b)]
    bias64 = None if bias_ is None else bias_.double()
    y64 = dropped_linear(leaves64[0], weight.double(), leaves64[1], leaves64[2], scaling, bias64, keep, scale)
    if p == 0.0:
        expected = reference.lora_linear(leaves64[0], weight.double(), leaves64[1], leaves64[2], scaling, bias64)
        torch.testing.assert_close(y64, expected)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    low_rank = dropped_linear(
        leaves[0].to(path), weight.to(path) * 0, *(t.to(path) for t in leaves[1:]), scaling, None, keep, scale
    )
    eager = (torch.nn.functional.linear(leaves[0], weight, bias_) + low_rank).to(dtype)

    assert_close_to_fp64(y, y64.detach(), eager.detach(), "y")
    grads64, eager_grads = gradients(y64, leaves64, dy.double(), needs), gradients(eager, leaves, dy, needs)
    for what, got, want, eager_grad in zip(("dX", "dA", "dB"), grads, grads64, eager_grads):
        if want is None:
            assert got is None, what
        elif path != dtype and what != "dX":
            assert (got.double() - want).norm() <= 1e-5 * want.norm(), what
        else:
            assert_close_to_fp64(got, want, eager_grad, what)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("needs", [ALL, (True, True, False)])  # without S, dS has to find its dtype again
def test_fp32_adapters_are_cast_where_they_are_to_be(dtype, needs):
    check(37, 53, 45, 5, dtype, FP32, narrow=True, needs=needs)


def test_a_seed_given_again_gives_the_same_output_and_a_fresh_one_follows_the_generator():
    x, weight, bias, a, b, _ = problem(20, 30, 40, 4, BF16, BF16, True, "contiguous")
    torch.manual_seed(5)
    y, _, state = cublas.forward(x, weight, bias, a, b, 1.0, 0.5)
    another, _, _ = cublas.forward(x, weight, bias, a, b, 1.0, 0.5)
    torch.manual_seed(5)
    again, _, _ = cublas.forward(x, weight, bias, a, b, 1.0, 0.5)
    assert torch.equal(y, again)
    assert not torch.equal(y, another)
    assert torch.equal(y, cublas.forward(x, weight, bias, a, b, 1.0, 0.5, state)[0])


def test_reasons_for_what_the_kernels_cannot_take():
    x, weight, bias, a, b, _ = problem(4, 6, 8, 2, BF16, FP32, True, "contiguous")
    cases = (
        ("float64", (x.double(), weight.double(), bias, a, b)),
        ("one dtype", (x, weight.float(), bias, a, b)),
        ("rank from 1 to 512, got 513", (x, weight, bias, torch.zeros(513, 8), torch.zeros(6, 513))),
        ("one device", (x, weight.to("meta"), bias, a, b)),
        ("CUDA device, got meta", tuple(t.to("meta") for t in (x, weight, bias, a, b))),
        ("at least one feature", (x[:, :0], weight[:, :0], bias, a[:, :0], b)),
    )
    for words, arguments in cases:
        reason = cublas.unsupported(*arguments, 0.0)
        assert reason is not None
        assert words in reason, (words, reason)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("m, n, k, r", [(37, 53, 45, 5), (10, 300, 24, 32), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_s_inside_the_gemm(dtype, m, n, k, r, bias):
    check(m, n, k, r, dtype, bias=bias, backend=triton_s_inside)


@pytest.mark.parametrize(
    "dtype, adapter_dtype, r, p, reason",
    [
        (BF16, BF16, 8, 0.1, "no dropout"),
        (BF16, BF16, 33, 0.0, "rank of at most 32, got 33"),
        (BF16, FP32, 8, 0.0, "one half-precision dtype, got torch.bfloat16 and torch.float32"),
        (FP32, FP32, 8, 0.0, "one half-precision dtype, got torch.float32"),
        (torch.float64, torch.float64, 8, 0.0, "needs bfloat16, float16 or float32"),
    ],
)
def test_what_s_inside_does_not_take(dtype, adapter_dtype, r, p, reason):
    x, weight, bias, a, b, _ = problem(4, 6, 8, r, dtype, adapter_dtype, True, "contiguous")
    assert reason in (triton_s_inside.unsupported(x, weight, bias, a, b, p) or "")


def test_the_mask_is_the_one_that_the_cublas_backend_makes_of_the_same_seed():
    x, weight, bias, a, b, dy = problem(20, 30, 40, 4, FP32, FP32, True, "contiguous")
    y, s, state = lora_triton.forward(x, weight, bias, a, b, 1.0, 0.5)
    other_y, other_s, same_state = cublas.forward(x, weight, bias, a, b, 1.0, 0.5, state)
    assert torch.equal(state, same_state)
    assert torch.equal(s, other_s)
    torch.testing.assert_close(y, other_y)
    grads = lora_triton.backward(dy, x, weight, a, b, s, state, 1.0, 0.5, ALL)
    for grad, other in zip(grads, cublas.backward(dy, x, weight, a, b, s, state, 1.0, 0.5, ALL)):
        torch.testing.assert_close(grad, other)


def test_a_cpu_tensor_is_taken_only_because_triton_is_interpreted(monkeypatch):
    x, weight, bias, a, b, _ = problem(4, 6, 8, 2, BF16, FP32, True, "contiguous")
    assert cublas.unsupported(x, weight, bias, a, b, 0.0) is None
    monkeypatch.setattr(cublas, "INTERPRETED", False)
    assert "CUDA device, got cpu" in (cublas.unsupported(x, weight, bias, a, b, 0.0) or "")
