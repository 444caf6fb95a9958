import dataclasses

import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout
from torch.nn.functional import linear

from fastlora.kernels import configs, gemm
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([271828182845904])
TINY = configs.GemmConfig(32, 64, 32, 4, num_stages=2, epilogue_split=2, block_r=16)


def operands(m, n, k, r, dtype, adapter_dtype=None, layout="contiguous", weight_layout="contiguous"):
    """x (m, k), weight (n, k), lora_A (r, k), lora_B (n, r), every one laid out as asked for."""
    torch.manual_seed(m * n + k + r)
    x = with_layout(torch.randn(m, k).to(dtype), layout)
    weight = with_layout((torch.randn(n, k) * k**-0.5).to(dtype), weight_layout)
    a = with_layout((torch.randn(r, k) * k**-0.5).to(adapter_dtype or dtype), layout)
    b = with_layout((torch.randn(n, r) * r**-0.5).to(adapter_dtype or dtype), layout)
    return x, weight, a, b


def check_forward(
    m, n, k, r, dtype=BF16, *, scaling=1.5, bias_dtype=None, out_layout="contiguous", config=None, **kinds
):
    x, weight, a, b = operands(m, n, k, r, dtype, **kinds)
    s = linear(x, a.to(dtype))
    bias = torch.randn(2 * n).to(bias_dtype)[::2] if bias_dtype else None
    out = poisoned_empty(m, n, dtype=dtype, layout=out_layout)
    gemm.forward_gemm(x, weight, bias, s, b, out, scaling, config=config)

    b = b.to(dtype)
    bias64, bias = (None, None) if bias is None else (bias.double(), bias.to(dtype))
    reference = linear(x.double(), weight.double(), bias64) + scaling * linear(s.double(), b.double())
    assert_close_to_fp64(out, reference, linear(x, weight, bias) + scaling * linear(s, b), "y")
    if out_layout != "contiguous":
        assert_surroundings_untouched(out)


def check_forward_with_s(m, n, k, r, dtype=BF16, *, p=0.0, scaling=1.5, config=None, **kinds):
    x, weight, a, b = operands(m, n, k, r, dtype, **kinds)
    out, s = poisoned_empty(m, n, dtype=dtype), poisoned_empty(m, r, dtype=dtype, layout="strided")
    dropout = dict(seed=SEED, dropout_p=p) if p else {}
    gemm.forward_gemm_with_s(x, weight, None, a, b, out, s, scaling, config=config, **dropout)

    a, b, keep, scale = a.to(dtype), b.to(dtype), reference_keep_mask(SEED, m, k, p), threshold_and_scale(p)[1]
    s64, eager_s = linear(x.double() * keep * scale, a.double()), linear(x * keep * scale, a)
    assert_close_to_fp64(s, s64, eager_s, "S")
    assert_surroundings_untouched(s)
    reference = linear(x.double(), weight.double()) + scaling * linear(s64, b.double())
    assert_close_to_fp64(out, reference, linear(x, weight) + scaling * linear(eager_s, b), "y")


def check_input_grad(m, n, k, r, dtype=BF16, *, p=0.0, out_layout="contiguous", config=None, **kinds):
    dy, weight_t, b_t, a_t = operands(m, k, n, r, dtype, **kinds)  # what is summed over is N here, and K the columns
    weight, ds = weight_t.t(), linear(dy, b_t.to(dtype))
    out = poisoned_empty(m, k, dtype=dtype, layout=out_layout)
    dropout = dict(seed=SEED, dropout_p=p) if p else {}
    gemm.input_grad_gemm(dy, weight, ds, a_t.t(), out, config=config, **dropout)

    a_t, keep, scale = a_t.to(dtype), reference_keep_mask(SEED, m, k, p), threshold_and_scale(p)[1]
    reference = dy.double() @ weight.double() + linear(ds.double(), a_t.double()) * keep * scale
    assert_close_to_fp64(out, reference, dy @ weight + linear(ds, a_t) * keep * scale, "dX")
    if out_layout != "contiguous":
        assert_surroundings_untouched(out)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dtypes(dtype):
    check_forward(37, 75, 45, 5, dtype, bias_dtype=dtype)
    check_forward_with_s(37, 75, 45, 5, dtype, p=0.3)
    check_input_grad(37, 45, 75, 5, dtype, p=0.3)


@pytest.mark.parametrize("m, n, k, r", [(1, 64, 64, 8), (1, 1, 1, 1), (40, 70, 72, 17), (33, 24, 16, 30)])
def test_shapes(m, n, k, r):
    check_forward(m, n, k, r, bias_dtype=BF16)
    check_forward_with_s(m, n, k, r, config=dataclasses.replace(TINY, block_r=32))
    check_input_grad(m, n, k, r)


@pytest.mark.parametrize("adapter_dtype, dtype", [(FP32, BF16), (FP32, FP16), (BF16, FP32)])
def test_adapters_and_bias_of_another_dtype(adapter_dtype, dtype):
    check_forward(20, 50, 40, 8, dtype, adapter_dtype=adapter_dtype, bias_dtype=adapter_dtype)
    check_forward_with_s(20, 50, 40, 8, dtype, adapter_dtype=adapter_dtype)
    check_input_grad(20, 50, 40, 8, dtype, adapter_dtype=adapter_dtype, p=0.2)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_strides(layout):
    out_layout = "offset" if layout == "expanded" else layout
    for check in (check_forward, check_input_grad):
        check(21, 40, 35, 6, layout=layout, weight_layout=layout, out_layout=out_layout)
        check(21, 40, 35, 6, weight_layout=layout)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_a_weight_stored_either_way_is_read_by_descriptors_where_it_is_aligned(by_column, aligned, monkeypatch):
    """By column as transformers' Conv1D stores it: weight.t() of a contiguous (K, N)."""
    described = []
    descriptor = gemm._descriptor
    monkeypatch.setattr(gemm, "_descriptor", lambda *args: described.append(args[1:]) or descriptor(*args))
    m, n, k, r = (40, 72, 48, 4) if aligned else (40, 73, 47, 4)
    x, weight, _, b = operands(m, n, k, r, BF16)
    if by_column:
        weight = weight.t().contiguous().t()
    out = poisoned_empty(m, n, dtype=BF16)
    s = torch.randn(m, r).to(BF16)
    gemm.forward_gemm(x, weight, None, s, b, out, 2.0)
    reference = linear(x.double(), weight.double()) + 2 * linear(s.double(), b.double())
    assert_close_to_fp64(out, reference, linear(x, weight) + 2 * linear(s, b))
    weight_block = (32, 64) if by_column else (64, 32)
    assert described == ([(32, 32), weight_block, (32, 32)] if aligned else [])


@pytest.mark.parametrize("scaling", [0.0, -2.0, 0.3, 1000.0])
def test_scaling(scaling):
    check_forward(20, 30, 40, 4, scaling=scaling)
    check_forward(20, 30, 40, 4, FP16, scaling=scaling)
    check_forward_with_s(20, 30, 40, 4, scaling=scaling)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_slices_of_the_epilogue(split):
    config = dataclasses.replace(TINY, epilogue_split=split, group_m=2)
    check_forward(40, 100, 20, 6, bias_dtype=FP32, config=config)
    check_forward_with_s(40, 100, 20, 20, p=0.4, config=dataclasses.replace(config, block_r=32))
    check_input_grad(40, 20, 100, 20, p=0.4, config=config)  # beyond one block of the rank


@pytest.mark.parametrize("target", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_the_configurations_that_gpus_get(target, monkeypatch):
    monkeypatch.setattr(configs, "capability", lambda device: target)
    monkeypatch.setattr(configs, "num_sms", lambda device: 2)  # few, so that the largest tiles win
    check_forward(200, 280, 72, 8, bias_dtype=BF16)
    check_input_grad(200, 72, 280, 8, p=0.1)
    check_forward_with_s(100, 80, 72, 8)
    check_forward(33, 41, 55, 300)  # nothing is aligned, and the rank takes many steps


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32_products_follow_torchs_setting(precision, monkeypatch):
    seen = []
    monkeypatch.setattr(gemm, "_lora_gemm_kernel", {(1,): lambda *_, **flags: seen.append(flags["PRECISION"])})
    x, weight, _, b = operands(8, 8, 8, 2, FP32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        gemm.forward_gemm(x, weight, None, torch.ones(8, 2), b, torch.empty(8, 8), 1.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == [precision]


def test_no_rows():
    x, weight, a, b = operands(0, 12, 8, 2, BF16)
    out, s = torch.empty(0, 12, dtype=BF16), torch.empty(0, 2, dtype=BF16)
    gemm.forward_gemm(x, weight, None, s, b, out, 1.0)
    gemm.forward_gemm_with_s(x, weight, None, a, b, out, s, 1.0)
    gemm.input_grad_gemm(out, weight, s, a, x)


def test_everything_dropped_leaves_the_frozen_layer():
    check_input_grad(20, 30, 40, 4, p=1.0)
    check_forward_with_s(20, 30, 40, 4, p=1.0)


def test_a_non_finite_token_stays_in_its_row():
    x, weight, _, b = operands(40, 72, 48, 4, BF16)
    x[7, 3] = float("inf")
    out = poisoned_empty(40, 72, dtype=BF16)
    gemm.forward_gemm(x, weight, None, torch.ones(40, 4, dtype=BF16), b, out, 1.0)
    assert not out[7].isfinite().any()
    assert out[torch.arange(40) != 7].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        dict(weight=torch.empty(12, 9)),
        dict(s=torch.empty(5, 2)),
        dict(out=torch.empty(4, 13)),
        dict(bias=torch.empty(13)),
        dict(out=torch.empty(4, 12, dtype=BF16)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change):
    good = dict(
        x=torch.empty(4, 8),
        weight=torch.empty(12, 8),
        bias=None,
        s=torch.empty(4, 2),
        lora_B=torch.empty(12, 2),
        out=torch.empty(4, 12),
    )
    with pytest.raises(AssertionError):
        gemm.forward_gemm(**{**good, **change}, scaling=1.0)
