# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false
# Gradients are None where they are not asked for; a test knows which it asked for.

import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout

from fastlora.kernels import configs, launch
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.kernels.grads import ds_and_db, ds_and_db_workspace, weight_grad, weight_grad_workspace
from fastlora.kernels.shrink import shrink
from fastlora.kernels.tiling import reduce_partials

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([2718281828459])
PLAIN = ("contiguous", "contiguous", "contiguous")


def workspace_of(size):
    return poisoned_empty(1, size, dtype=FP32)[0]


def check_ds_db(
    m, n, r, dtype=BF16, adapter_dtype=None, needs=(True, True), layouts=PLAIN, out_layout="contiguous", config=None
):
    torch.manual_seed(m * n + r)
    adapter_dtype = adapter_dtype or dtype
    dy = with_layout(torch.randn(m, n).to(dtype), layouts[0])
    b = with_layout((torch.randn(n, r) * r**-0.5).to(adapter_dtype), layouts[1])
    s = with_layout(torch.randn(m, r).to(dtype), layouts[2])
    scaling = 1.5
    ds = poisoned_empty(m, r, dtype=dtype, layout=out_layout) if needs[0] else None
    db = poisoned_empty(n, r, dtype=adapter_dtype, layout=out_layout) if needs[1] else None
    size = ds_and_db_workspace(dy, b, needs_ds=needs[0], needs_db=needs[1], config=config)
    ds_and_db(dy, b, s if needs[1] else None, ds, db, workspace_of(size), scaling=scaling, config=config)
    if ds is not None:
        eager = (scaling * dy) @ b.to(dtype)
        assert_close_to_fp64(ds, scaling * (dy.double() @ b.to(dtype).double()), eager, "dS")
    if db is not None:
        eager = ((scaling * dy).t() @ s).to(adapter_dtype)
        assert_close_to_fp64(db, scaling * (dy.double().t() @ s.double()), eager, "dB")
    for out in (ds, db):
        if out is not None and out_layout != "contiguous":
            assert_surroundings_untouched(out)
    return ds, db


def check_weight_grad(
    m, k, r, dtype=BF16, adapter_dtype=None, p=0.0, layouts=("contiguous", "contiguous"), out_layout="grad", config=None
):
    torch.manual_seed(m * k + r)
    x = with_layout(torch.randn(m, k).to(dtype), layouts[0])
    g = with_layout(torch.randn(m, r).to(dtype), layouts[1])
    if out_layout == "grad":  # as in dA: the transpose of a contiguous (r, K)
        out = poisoned_empty(r, k, dtype=adapter_dtype or dtype).t()
    else:
        out = poisoned_empty(k, r, dtype=adapter_dtype or dtype, layout=out_layout)
    dropout = dict(seed=SEED, dropout_p=p) if p else {}
    weight_grad(x, g, out, workspace_of(weight_grad_workspace(x, r, config)), scale=0.5, config=config, **dropout)

    keep = reference_keep_mask(SEED, m, k, p)
    factor = 0.5 * threshold_and_scale(p)[1]
    reference = (x.double() * keep).t() @ g.double() * factor
    eager = (((x * keep).t() @ g) * factor).to(out.dtype)
    assert_close_to_fp64(out, reference, eager, "dA")
    if out_layout not in ("grad", "contiguous"):
        assert_surroundings_untouched(out)
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_ds_and_db(dtype, needs):
    check_ds_db(37, 83, 5, dtype, needs=needs)


@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype(dtype, adapter_dtype):
    check_ds_db(20, 50, 8, dtype, adapter_dtype)
    check_weight_grad(20, 50, 8, dtype, adapter_dtype)


def test_fp32_gradients_are_not_rounded_to_bf16_on_the_way():
    _, db = check_ds_db(30, 40, 4, BF16, FP32)
    assert not torch.equal(db, db.bfloat16().float())
    da = check_weight_grad(30, 40, 4, BF16, FP32)
    assert not torch.equal(da, da.bfloat16().float())


@pytest.mark.parametrize("m, n, r", [(1, 100, 16), (1, 1, 1), (100, 20, 3), (16, 32, 16), (65, 90, 17), (20, 40, 70)])
def test_shapes(m, n, r):
    check_ds_db(m, n, r)
    check_weight_grad(m, n, r, p=0.25)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_strides_of_the_operands(layout):
    check_ds_db(21, 35, 6, layouts=(layout, layout, layout))
    check_weight_grad(21, 35, 6, layouts=(layout, layout), p=0.2)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("m", [10, 200])  # without and with chunks of rows
def test_strides_of_the_outputs(layout, m):
    check_ds_db(m, 37, 5, out_layout=layout)
    check_weight_grad(m, 37, 5, out_layout=layout)


@pytest.mark.parametrize("block_n, num_chunks", [(64, 1), (64, 3), (16, 1), (16, 3)])
def test_one_strip_or_several_one_chunk_or_several(block_n, num_chunks):
    check_ds_db(90, 50, 8, config=configs.DsDbConfig(16, block_n, 16, num_chunks, 4, 2))


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_chunks_of_rows(num_chunks, p):
    check_weight_grad(90, 37, 8, config=configs.WeightGradConfig(16, 32, 16, num_chunks, 4, 2), p=p)


def test_blocks_of_a_gpu():
    check_ds_db(70, 300, 12, config=configs.DsDbConfig(64, 256, 16, 2, 4, 2))
    check_weight_grad(70, 130, 20, config=configs.WeightGradConfig(64, 128, 32, 2, 4, 4), p=0.1)


def test_a_large_rank_takes_two_passes():
    dy, b = torch.randn(20, 40), torch.randn(40, 70)
    assert configs.ds_db(20, 40, 70, dy.dtype, b.dtype, dy.device) is None
    assert configs.ds_db(20, 40, 48, dy.dtype, b.dtype, dy.device) is not None


def test_no_rows_means_zero_gradients():
    ds, db, da = torch.empty(0, 4), torch.full((8, 4), float("nan")), torch.full((4, 6), float("nan"))
    ds_and_db(torch.empty(0, 8), torch.randn(8, 4), torch.empty(0, 4), ds, db)
    weight_grad(torch.empty(0, 6), ds, da.t())
    assert torch.equal(db, torch.zeros(8, 4))
    assert torch.equal(da, torch.zeros(4, 6))


def test_backward_drops_what_forward_dropped():
    # With A = I, S is drop(x); with dS = I, dAᵀ is drop(x)ᵀ: the very same elements must be 0.
    size, p = 45, 0.4
    torch.manual_seed(0)
    x, eye = torch.randn(size, size), torch.eye(size)
    s, da = poisoned_empty(size, size, dtype=FP32), poisoned_empty(size, size, dtype=FP32)
    shrink(x, eye, s, seed=SEED, dropout_p=p)
    weight_grad(x, eye, da.t(), workspace_of(weight_grad_workspace(x, size)), seed=SEED, dropout_p=p)
    torch.testing.assert_close(s, da, rtol=1e-6, atol=0)
    assert 0.45 < (s != 0).double().mean() < 0.75


def test_same_bits_on_every_run():
    for first, second in zip(check_ds_db(100, 90, 5), check_ds_db(100, 90, 5)):
        assert torch.equal(first, second)
    assert torch.equal(check_weight_grad(100, 30, 5, p=0.1), check_weight_grad(100, 30, 5, p=0.1))


def test_chunks_are_added_from_the_first_to_the_last_and_their_counters_are_zero_again():
    # 2^24 + 1 + 1 in fp32 stays at 2^24 in this order, and only in this order.
    x, g, da = torch.ones(48, 40), torch.zeros(48, 3), poisoned_empty(3, 40, dtype=FP32)
    g[::16] = torch.tensor([2.0**24, 1.0, 1.0])[:, None]
    config = configs.WeightGradConfig(16, 32, 16, 3, 4, 2)
    weight_grad(x, g, da.t(), workspace_of(weight_grad_workspace(x, 3, config)), config=config)
    assert (da == 2.0**24).all()
    assert not launch.counters_of(x.device, 0).any()


def test_partials_are_added_from_the_first_to_the_last():
    # 2^24 + 1 + 1 + … in fp32 stays at 2^24 in this order, and only in this order.
    partials = torch.ones(6, 3, 5)
    partials[0] = 2.0**24
    out = poisoned_empty(3, 5, dtype=FP32, layout="strided")
    reduce_partials(partials, out, 6)
    assert (out == 2.0**24).all()
    assert_surroundings_untouched(out)
