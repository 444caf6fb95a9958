# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import contracts
import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout

from fastlora.kernels import dora
from fastlora.ops.dora import triton as dora_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def problem(n, k, r, dtype, adapter_dtype, layout="contiguous"):
    torch.manual_seed(n + k + r)
    weight = with_layout((torch.randn(n, k) * k**-0.5).to(dtype), layout)
    a = with_layout((torch.randn(r, k) * k**-0.5).to(adapter_dtype), layout)
    b = with_layout((torch.randn(n, r) * r**-0.5).to(adapter_dtype), layout)
    return weight, a, b


def norm_of(weight, a, b, scaling):
    norm = poisoned_empty(1, weight.shape[0], dtype=FP32)[0]
    size = dora.norm_workspace(weight, a)
    dora.dora_norm(weight, a, b, scaling, norm, torch.full((size,), float("nan")) if size else None)
    return norm


def exact_norm(weight, a, b, scaling):
    return (weight.double() + scaling * (b.double() @ a.double())).norm(dim=1)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)])
@pytest.mark.parametrize("n, k, r", [(21, 53, 7), (1, 1, 1), (33, 300, 16), (5, 40, 70)])
def test_norms(n, k, r, dtypes):
    """In fp32 whatever W0 is: a norm rounded to bf16, as eager PyTorch has it, would be off by 2e-3."""
    weight, a, b = problem(n, k, r, *dtypes)
    torch.testing.assert_close(norm_of(weight, a, b, 1.5).double(), exact_norm(weight, a, b, 1.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_strides(layout):
    weight, a, b = problem(21, 35, 6, FP32, FP32, layout)
    torch.testing.assert_close(norm_of(weight, a, b, -2.0).double(), exact_norm(weight, a, b, -2.0), rtol=1e-6, atol=0)


def test_a_split_of_the_columns_gives_the_same_norms(monkeypatch):
    weight, a, b = problem(20, 300, 4, FP32, FP32)
    whole = norm_of(weight, a, b, 1.0)
    monkeypatch.setattr(dora.configs, "_parts", lambda programs, blocks, wanted: 3)
    assert dora.norm_config(weight, a).num_splits == 3
    torch.testing.assert_close(norm_of(weight, a, b, 1.0), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("value", [1e-30, 1e-22, 1e22, 1e30])
def test_norms_whose_squares_are_no_fp32(value, splits, monkeypatch):
    monkeypatch.setattr(dora.configs, "_parts", lambda programs, blocks, wanted: splits)
    weight, a, b = problem(20, 300, 4, FP32, FP32)
    weight, b = weight * value, torch.zeros_like(b)
    weight[3] = 0
    got = norm_of(weight, a, b, 1.0).double() / value
    torch.testing.assert_close(got, exact_norm(weight, a, b, 1.0) / value, rtol=1e-6, atol=0)


def test_a_row_of_zeros_is_scaled_to_nothing():
    z, dy = torch.randn(2, 9, 5)
    z[:, 2] = 0
    magnitude, norm = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 0.0, 0.5, 1e-39])
    y = dora_triton.scale(z, magnitude, norm, None)
    dz, dm, _ = dora_triton.scale_backward(dy, z, magnitude, norm, (True, True, False))
    assert dz is not None and dm is not None
    for got, source in ((y, z), (dz, dy)):
        assert not got[:, 2].any() and torch.equal(got[:, :2], source[:, :2] * torch.tensor([0.5, 2.0]))
    assert dm[2] == 0 and torch.allclose(dm[:2], (dy * z).sum(0)[:2] / norm[:2])


def test_rows_that_nearly_cancel():
    """Of W0 = −s·B A (1 + 2⁻¹⁰) is left what a difference of squares in fp32 would not even give the sign of."""
    _, a, b = problem(20, 64, 4, FP32, FP32)
    weight = -0.5 * (b @ a) * (1 + 2.0**-10)
    exact = exact_norm(weight, a, b, 0.5)
    assert (exact < 2e-3 * weight.double().norm(dim=1)).all()
    torch.testing.assert_close(norm_of(weight, a, b, 0.5).double(), exact, rtol=1e-3, atol=0)
    squares = weight.square().sum(1) + 2 * 0.5 * ((weight @ a.t()) * b).sum(1) + 0.25 * ((b @ (a @ a.t())) * b).sum(1)
    assert ((squares.double() - exact.square()).abs() > 0.1 * exact.square()).any()


def scale_problem(m, n, dtype, magnitude_dtype=FP32, layout="contiguous"):
    torch.manual_seed(m + n)
    z, dy = (with_layout(torch.randn(m, n).to(dtype), layout) for _ in range(2))
    magnitude, norm, bias = (torch.rand(n) + 0.5).to(magnitude_dtype), torch.rand(n) + 0.5, torch.randn(n).to(dtype)
    return z, dy, magnitude, norm, bias


@pytest.mark.parametrize("dtype, magnitude_dtype", [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("m, n", [(21, 53), (1, 1), (40, 33)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset"])
def test_scaling_and_its_gradients(m, n, dtype, magnitude_dtype, layout):
    z, dy, magnitude, norm, bias = scale_problem(m, n, dtype, magnitude_dtype, layout)
    y, dz = (poisoned_empty(m, n, dtype=dtype, layout=layout) for _ in range(2))
    sums = poisoned_empty(2, n, dtype=FP32)
    size = dora.scale_backward_workspace(dy)
    dora.scale(z, magnitude, norm, bias, y)
    dora.scale_backward(
        dy, z, magnitude, norm, dz, sums, torch.full((size,), float("nan")) if size else None, needs_bias=True
    )

    def eager(of):
        leaves = [t.to(of).requires_grad_() for t in (z, magnitude, bias)]
        result = leaves[1] / norm.to(of) * leaves[0] + leaves[2]
        return [result.detach(), *torch.autograd.grad(result, leaves, dy.to(of))]

    got = [y, dz, sums[0].to(dtype), sums[1].to(dtype)]
    for what, one, exact, near in zip(("y", "dz", "dm", "db"), got, eager(torch.float64), eager(dtype), strict=True):
        assert_close_to_fp64(one, exact, near, what)
    for written in (y, dz) if layout != "contiguous" else ():
        assert_surroundings_untouched(written)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_what_is_needed(needs):
    z, dy, magnitude, norm, _ = scale_problem(37, 20, FP32)
    whole = dora_triton.scale_backward(dy, z, magnitude, norm, (True, True, True))
    some = dora_triton.scale_backward(dy, z if needs[1] else None, magnitude, norm, needs)
    for one, other, needed in zip(some, whole, needs, strict=True):
        assert torch.equal(one, other) if needed else one is None


def test_no_rows_and_in_place():
    _, dy, magnitude, norm, bias = scale_problem(0, 20, FP32)
    assert dora_triton.scale(dy, magnitude, norm, bias).shape == (0, 20)
    dz, dm, db = dora_triton.scale_backward(dy, dy, magnitude, norm, (True, True, True))
    assert dz.shape == (0, 20)
    assert torch.equal(dm, torch.zeros(20))
    assert torch.equal(db, torch.zeros(20))
    z, _, magnitude, norm, bias = scale_problem(9, 20, FP32)
    y = dora_triton.scale(z, magnitude, norm, bias)
    assert dora_triton.scale(z, magnitude, norm, bias, in_place=True) is z
    assert torch.equal(z, y)


def test_same_bits_on_every_run():
    weight, a, b = problem(40, 90, 6, BF16, FP32)
    z, dy, magnitude, norm, _ = scale_problem(60, 40, BF16)
    assert torch.equal(norm_of(weight, a, b, 1.0), norm_of(weight, a, b, 1.0))
    first, second = (dora_triton.scale_backward(dy, z, magnitude, norm, (True, True, True)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class TestDora(contracts.Interpreted, contracts.Dora):
    pass
