# pyright: reportArgumentType=false

import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout

from fastlora.kernels import configs
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.kernels.shrink import shrink, shrink_workspace

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([987654321012345])


def check(
    m,
    k,
    r,
    dtype=BF16,
    adapter_dtype=None,
    p=0.0,
    scale=1.0,
    layouts=("contiguous", "contiguous", "contiguous"),
    config=None,
):
    torch.manual_seed(m * k + r)
    x = with_layout(torch.randn(m, k).to(dtype), layouts[0])
    a = with_layout((torch.randn(r, k) * max(1, k) ** -0.5).to(adapter_dtype or dtype), layouts[1])
    out = poisoned_empty(m, r, dtype=dtype, layout=layouts[2])
    workspace = poisoned_empty(1, shrink_workspace(x, a, config), dtype=FP32)[0]
    dropout = dict(seed=SEED, dropout_p=p) if p else {}
    shrink(x, a, out, workspace, scale=scale, config=config, **dropout)

    keep = reference_keep_mask(SEED, m, k, p)
    factor = scale * threshold_and_scale(p)[1]
    reference = (x.double() * keep) @ a.to(dtype).double().t() * factor
    eager = (x * keep) @ a.to(dtype).t() * factor
    assert_close_to_fp64(out, reference, eager, "S")
    if layouts[2] != "contiguous":
        assert_surroundings_untouched(out)
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dtypes_and_dropout(dtype, p):
    check(37, 83, 5, dtype, p=p, scale=1.5)


@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype(dtype, adapter_dtype):
    check(20, 50, 8, dtype, adapter_dtype)


@pytest.mark.parametrize("m, k, r", [(1, 100, 16), (1, 1, 1), (64, 32, 3), (16, 16, 16), (7, 90, 17), (33, 40, 70)])
def test_shapes(m, k, r):
    check(m, k, r)


def test_no_rows():
    out = torch.empty(0, 4)
    shrink(torch.empty(0, 8), torch.randn(4, 8), out)
    assert out.shape == (0, 4)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_strides_of_x_and_of_the_adapter(layout):
    check(21, 35, 6, layouts=(layout, layout, "contiguous"), p=0.2)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("k", [30, 200])  # without and with a split of K
def test_strides_of_the_output(layout, k):
    check(9, k, 5, layouts=("contiguous", "contiguous", layout))


@pytest.mark.parametrize("num_splits", [1, 2, 3])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_splits_of_k(num_splits, p):
    config = configs.ShrinkConfig(16, 16, 16, num_splits, 4, 2)
    check(18, 90, 8, config=config, p=p)


def test_the_rule_splits_k_for_few_rows():
    x, a = torch.randn(3, 300), torch.randn(4, 300)
    assert shrink_workspace(x, a) == configs.INTERPRETER_SMS * 3 * 4
    check(3, 300, 4)


def test_blocks_of_a_gpu():
    check(70, 130, 20, config=configs.ShrinkConfig(64, 128, 32, 1, 4, 4), p=0.1)


def test_p_of_one_drops_everything():
    out = check(5, 20, 4, p=1.0)
    assert not out.any()


def test_same_bits_on_every_run():
    assert torch.equal(check(3, 300, 4, p=0.1), check(3, 300, 4, p=0.1))


def test_fp32_products_are_tf32_only_where_torch_allows_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert configs.input_precision(FP32) == "ieee"
        matmul.fp32_precision = "tf32"
        assert configs.input_precision(FP32) == "tf32"
        assert configs.input_precision(BF16) == "ieee"
    finally:
        matmul.fp32_precision = before
