# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# Gradients are None where they are not asked for; a test knows which it asked for.

import pytest
import torch
from test_cublas_backend import ALL, BF16, FP16, FP32, check, problem

from fastlora.ops.lora import cublas, triton_s_inside
from fastlora.ops.lora import triton as lora_triton


@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_output_and_gradients(dtype, adapter_dtype, p):
    check(37, 53, 45, 5, dtype, adapter_dtype, p=p, backend=lora_triton)


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


@pytest.mark.parametrize("m, n, k, r", [(1, 33, 40, 16), (1, 1, 1, 1), (20, 40, 17, 60)])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes(m, n, k, r, bias):
    check(m, n, k, r, p=0.1, bias=bias, backend=lora_triton)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed(needs):
    check(18, 35, 20, 4, p=0.2, needs=needs, backend=lora_triton)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_strides(layout):
    check(18, 35, 20, 4, layout=layout, backend=lora_triton)


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


def test_saved_tensors_are_not_written_to():
    x, weight, bias, a, b, dy = problem(20, 30, 40, 4, BF16, FP32, True, "contiguous")
    _, s, state = lora_triton.forward(x, weight, bias, a, b, 1.0, 0.5)
    saved = (dy, x, weight, a, b, s, state)
    copies = [t.clone() for t in saved]
    lora_triton.backward(*saved, 1.0, 0.5, ALL)
    for tensor, copy in zip(saved, copies):
        assert torch.equal(tensor, copy)


def test_a_cpu_tensor_is_taken_only_because_triton_is_interpreted(monkeypatch):
    x, weight, bias, a, b, _ = problem(4, 6, 8, 2, BF16, FP32, True, "contiguous")
    assert cublas.unsupported(x, weight, bias, a, b, 0.0) is None
    monkeypatch.setattr(cublas, "INTERPRETED", False)
    assert "CUDA device, got cpu" in (cublas.unsupported(x, weight, bias, a, b, 0.0) or "")
