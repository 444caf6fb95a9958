# pyright: reportArgumentType=false

import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout

from fastlora.kernels import configs
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.kernels.expand import expand

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([31415926535])


def check(
    m,
    n,
    r,
    dtype=BF16,
    adapter_dtype=None,
    *,
    p=0.0,
    bias_dtype=None,
    alpha=0.75,
    layouts=("contiguous", "contiguous", "contiguous"),
    config=None,
):
    torch.manual_seed(m * n + r)
    s = with_layout(torch.randn(m, r).to(dtype), layouts[0])
    w = with_layout((torch.randn(n, r) * r**-0.5).to(adapter_dtype or dtype), layouts[1])
    bias = torch.randn(2 * n).to(bias_dtype)[::2] if bias_dtype else None
    out = poisoned_empty(m, n, dtype=dtype, layout=layouts[2])
    dropout = dict(seed=SEED, dropout_p=p) if p else {}
    expand(s, w, out, alpha=alpha, bias=bias, config=config, **dropout)

    factor = alpha * threshold_and_scale(p)[1]
    keep = reference_keep_mask(SEED, m, n, p)
    reference = (s.double() @ w.to(dtype).double().t()) * factor * keep
    eager = (s @ w.to(dtype).t()) * factor * keep
    if bias is not None:
        reference, eager = reference + bias.double(), eager + bias.to(dtype)
    assert_close_to_fp64(out, reference, eager, "T")
    if layouts[2] != "contiguous":
        assert_surroundings_untouched(out)
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dtypes_and_dropout(dtype, p):
    check(37, 83, 5, dtype, p=p)


@pytest.mark.parametrize("bias_dtype", [BF16, FP32])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_bias_is_neither_scaled_nor_dropped(bias_dtype, p):
    check(20, 45, 4, bias_dtype=bias_dtype, p=p, alpha=-2.0)


@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype(dtype, adapter_dtype):
    check(20, 50, 8, dtype, adapter_dtype)


@pytest.mark.parametrize("m, n, r", [(1, 100, 16), (1, 1, 1), (64, 32, 3), (7, 90, 17), (18, 40, 70)])
def test_shapes(m, n, r):
    check(m, n, r)


def test_no_rows():
    out = torch.empty(0, 8)
    expand(torch.empty(0, 4), torch.randn(8, 4), out)
    assert out.shape == (0, 8)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_strides_of_the_operands(layout):
    check(21, 35, 6, layouts=(layout, layout, "contiguous"), p=0.2)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_strides_of_the_output(layout):
    check(19, 37, 5, layouts=("contiguous", "contiguous", layout))


def test_blocks_of_a_gpu():
    check(70, 130, 20, config=configs.ExpandConfig(64, 128, 32, 4, 1), p=0.1, bias_dtype=BF16)


def test_p_of_one_leaves_the_bias():
    out = check(5, 20, 4, p=1.0, bias_dtype=BF16)
    assert torch.equal(out, out[:1].expand_as(out))
