# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false
# Gradients are None where they are not asked for; a test knows which it asked for.
"""The kernels of a layer's low-rank part, one by one: shrink, expand, and the gradients of A and B."""

import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout

from fastlora.kernels import configs, launch
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.kernels.expand import expand
from fastlora.kernels.grads import ds_and_db, ds_and_db_workspace, weight_grad, weight_grad_workspace
from fastlora.kernels.shrink import shrink, shrink_workspace
from fastlora.kernels.tiling import reduce_partials

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([987654321012345])


def operands(m, n, r, dtype, adapter_dtype, layout):
    """A tensor (m, n), an adapter's factor (r, n) and one (m, r)."""
    torch.manual_seed(m * n + r)
    adapter = (torch.randn(r, n) * max(1, n) ** -0.5).to(adapter_dtype or dtype)
    return [with_layout(t, layout) for t in (torch.randn(m, n).to(dtype), adapter, torch.randn(m, r).to(dtype))]


def workspace_of(size):
    return poisoned_empty(1, size, dtype=FP32)[0]


def dropped(p, m, n):
    """(arguments of the launchers, mask, scale)."""
    return {"seed": SEED, "dropout_p": p} if p else {}, reference_keep_mask(SEED, m, n, p), threshold_and_scale(p)[1]


def assert_right(out, exact, eager, what, layout):
    assert_close_to_fp64(out, exact, eager.to(out.dtype), what)
    if layout not in (None, "contiguous"):
        assert_surroundings_untouched(out)


def check_shrink(
    m,
    k,
    r,
    dtype=BF16,
    adapter_dtype=None,
    *,
    p=0.0,
    layout="contiguous",
    out_layout="contiguous",
    config=None,
    scale=1.5,
):
    x, a, _ = operands(m, k, r, dtype, adapter_dtype, layout)
    arguments, keep, factor = dropped(p, m, k)
    out = poisoned_empty(m, r, dtype=dtype, layout=out_layout)
    shrink(x, a, out, workspace_of(shrink_workspace(x, a, config)), scale=scale, config=config, **arguments)
    exact = (x.double() * keep) @ a.to(dtype).double().t() * scale * factor
    assert_right(out, exact, (x * keep) @ a.to(dtype).t() * scale * factor, "S", out_layout)
    return [out]


def check_expand(
    m,
    n,
    r,
    dtype=BF16,
    adapter_dtype=None,
    *,
    p=0.0,
    layout="contiguous",
    out_layout="contiguous",
    config=None,
    bias_dtype=None,
    alpha=0.75,
):
    _, w, s = operands(m, n, r, dtype, adapter_dtype, layout)
    w, (arguments, keep, factor) = w.t(), dropped(p, m, n)
    bias = torch.randn(2 * n).to(bias_dtype)[::2] if bias_dtype else torch.zeros(n, dtype=dtype)
    out = poisoned_empty(m, n, dtype=dtype, layout=out_layout)
    expand(s, w, out, alpha=alpha, bias=bias if bias_dtype else None, config=config, **arguments)
    exact = (s.double() @ w.to(dtype).double().t()) * alpha * factor * keep + bias.double()
    assert_right(out, exact, (s @ w.to(dtype).t()) * alpha * factor * keep + bias.to(dtype), "T", out_layout)
    return [out]


def check_ds_db(
    m,
    n,
    r,
    dtype=BF16,
    adapter_dtype=None,
    *,
    needs=(True, True),
    layout="contiguous",
    out_layout="contiguous",
    config=None,
):
    dy, b, s = operands(m, n, r, dtype, adapter_dtype, layout)
    b, scaling = b.t(), 1.5
    ds = poisoned_empty(m, r, dtype=dtype, layout=out_layout) if needs[0] else None
    db = poisoned_empty(n, r, dtype=b.dtype, layout=out_layout) if needs[1] else None
    size = ds_and_db_workspace(dy, b, needs_ds=needs[0], needs_db=needs[1], config=config)
    ds_and_db(dy, b, s if needs[1] else None, ds, db, workspace_of(size), scaling=scaling, config=config)
    wide = scaling * dy.double()
    if ds is not None:
        assert_right(ds, wide @ b.to(dtype).double(), (scaling * dy) @ b.to(dtype), "dS", out_layout)
    if db is not None:
        assert_right(db, wide.t() @ s.double(), (scaling * dy).t() @ s, "dB", out_layout)
    return [ds, db]


def check_weight_grad(
    m, k, r, dtype=BF16, adapter_dtype=None, *, p=0.0, layout="contiguous", out_layout=None, config=None
):
    x, _, g = operands(m, k, r, dtype, adapter_dtype, layout)
    arguments, keep, factor = dropped(p, m, k)
    if out_layout is None:  # as in dA: the transpose of a contiguous (r, K)
        out = poisoned_empty(r, k, dtype=adapter_dtype or dtype).t()
    else:
        out = poisoned_empty(k, r, dtype=adapter_dtype or dtype, layout=out_layout)
    weight_grad(x, g, out, workspace_of(weight_grad_workspace(x, r, config)), scale=0.5, config=config, **arguments)
    exact = (x.double() * keep).t() @ g.double() * 0.5 * factor
    assert_right(out, exact, (x * keep).t() @ g * 0.5 * factor, "dA", out_layout)
    return [out]


DROPPING = [check_shrink, check_expand, check_weight_grad]
EVERY = pytest.mark.parametrize("check", [*DROPPING, check_ds_db])


@EVERY
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dtypes_and_dropout(check, dtype, p):
    check(37, 83, 5, dtype, **({"p": p} if check in DROPPING else {}))


@EVERY
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype(check, dtype, adapter_dtype):
    check(20, 50, 8, dtype, adapter_dtype)


@EVERY
@pytest.mark.parametrize(
    "m, n, r", [(1, 100, 16), (1, 1, 1), (64, 32, 3), (16, 16, 16), (7, 90, 17), (65, 90, 17), (20, 40, 70)]
)
def test_shapes(check, m, n, r):
    check(m, n, r)


@EVERY
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_strides_of_the_operands(check, layout):
    check(21, 35, 6, layout=layout, **({"p": 0.2} if check in DROPPING else {}))


@EVERY
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("m, n", [(9, 37), (9, 200), (200, 37)])  # a split of the columns, or of the rows
def test_strides_of_the_output(check, layout, m, n):
    check(m, n, 5, out_layout=layout)


@EVERY
def test_same_bits_on_every_run(check):
    for size in ((3, 300, 4), (100, 90, 5)):
        options = {"p": 0.1} if check in DROPPING else {}
        assert all(map(torch.equal, check(*size, **options), check(*size, **options)))


CONFIGS = [  # a few parts of each sum, and the blocks of a GPU
    *((check_shrink, (18, 90, 8), configs.ShrinkConfig(16, 16, 16, splits, 4, 2)) for splits in (1, 2, 3)),
    (check_shrink, (70, 130, 20), configs.ShrinkConfig(64, 128, 32, 1, 4, 4)),
    (check_expand, (70, 130, 20), configs.ExpandConfig(64, 128, 32, 4, 1)),
    *((check_ds_db, (90, 50, 8), configs.DsDbConfig(16, n, 16, chunks, 4, 2)) for n in (64, 16) for chunks in (1, 3)),
    (check_ds_db, (70, 300, 12), configs.DsDbConfig(64, 256, 16, 2, 4, 2)),
    *((check_weight_grad, (90, 37, 8), configs.WeightGradConfig(16, 32, 16, chunks, 4, 2)) for chunks in (1, 2, 3)),
    (check_weight_grad, (70, 130, 20), configs.WeightGradConfig(64, 128, 32, 2, 4, 4)),
]


@pytest.mark.parametrize("check, size, config", CONFIGS, ids=lambda value: getattr(value, "__name__", None))
def test_configurations(check, size, config):
    for p in (0.0, 0.5) if check in DROPPING else (0.0,):
        check(*size, config=config, **({"p": p} if p else {}))


@pytest.mark.parametrize("bias_dtype", [BF16, FP32])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_bias_is_neither_scaled_nor_dropped(bias_dtype, p):
    check_expand(20, 45, 4, bias_dtype=bias_dtype, p=p, alpha=-2.0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_ds_or_db_alone(dtype, needs):
    check_ds_db(37, 83, 5, dtype, needs=needs)


def test_fp32_gradients_are_not_rounded_to_bf16_on_the_way():
    for grad in (check_ds_db(30, 40, 4, BF16, FP32)[1], *check_weight_grad(30, 40, 4, BF16, FP32)):
        assert not torch.equal(grad, grad.bfloat16().float())


def test_the_rules():
    """K is split for few rows; a large rank takes two passes over dY."""
    x, a, dy, b = torch.randn(3, 300), torch.randn(4, 300), torch.randn(20, 40), torch.randn(40, 70)
    assert shrink_workspace(x, a) == configs.INTERPRETER_SMS * 3 * 4
    assert configs.ds_db(20, 40, 70, dy.dtype, b.dtype, dy.device) is None
    assert configs.ds_db(20, 40, 48, dy.dtype, b.dtype, dy.device) is not None


def test_p_of_one_drops_everything_but_the_bias():
    assert not check_shrink(5, 20, 4, p=1.0)[0].any()
    (out,) = check_expand(5, 20, 4, p=1.0, bias_dtype=BF16)
    assert torch.equal(out, out[:1].expand_as(out))


def test_no_rows():
    """Nothing is written, and gradients are zero."""
    out, db, da = torch.empty(0, 4), torch.full((8, 4), float("nan")), torch.full((4, 6), float("nan"))
    shrink(torch.empty(0, 8), torch.randn(4, 8), out)
    expand(torch.empty(0, 4), torch.randn(8, 4), torch.empty(0, 8))
    ds_and_db(torch.empty(0, 8), torch.randn(8, 4), torch.empty(0, 4), out, db)
    weight_grad(torch.empty(0, 6), out, da.t())
    assert torch.equal(db, torch.zeros(8, 4)) and torch.equal(da, torch.zeros(4, 6))


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


def test_chunks_are_added_from_the_first_to_the_last_and_their_counters_are_zero_again():
    # 2^24 + 1 + 1 in fp32 stays at 2^24 in this order, and only in this order.
    x, g, da = torch.ones(48, 40), torch.zeros(48, 3), poisoned_empty(3, 40, dtype=FP32)
    g[::16] = torch.tensor([2.0**24, 1.0, 1.0])[:, None]
    config = configs.WeightGradConfig(16, 32, 16, 3, 4, 2)
    weight_grad(x, g, da.t(), workspace_of(weight_grad_workspace(x, 3, config)), config=config)
    assert (da == 2.0**24).all()
    assert not launch.counters_of(x.device, 0).any()
    partials = torch.ones(6, 3, 5)
    partials[0] = 2.0**24
    out = poisoned_empty(3, 5, dtype=FP32, layout="strided")
    reduce_partials(partials, out, 6)
    assert (out == 2.0**24).all()
    assert_surroundings_untouched(out)


def test_fp32_products_are_tf32_only_where_torch_allows_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            assert configs.input_precision(FP32) == precision
        assert configs.input_precision(BF16) == "ieee"
    finally:
        matmul.fp32_precision = before
