"""Each Triton kernel on a GPU, against fp64, with outputs poisoned by NaN; and the mask against its specification."""

import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SQUARE, ODD, ROW, NARROW = (2048, 4096, 4096), (777, 1000, 1001), (1, 4096, 64), (8192, 64, 4096)  # M, N, K
# Each case compiles its kernels anew, so this is no full product: every size at r = 16, every rank class at one size,
# the other dtypes (of x, of the adapters) on an aligned and an unaligned problem.
CASES = [((BF16, BF16), size, 16) for size in (SQUARE, ODD, ROW, NARROW)]
CASES += [((BF16, BF16), SQUARE, r) for r in (1, 48, 64, 256)]
CASES += [
    (kind, size, r) for kind in ((FP16, FP16), (FP32, FP32), (BF16, FP32)) for size, r in ((SQUARE, 16), (ODD, 48))
]


def name_of(case) -> str:
    (dtype, adapter_dtype), size, r = case
    return f"{dtype}+{adapter_dtype}-{'x'.join(map(str, size))}-r{r}".replace("torch.", "")


@pytest.fixture(params=CASES, ids=name_of)
def case(request):
    return request.param


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(shape, device="cuda", generator=generator) * scale).to(dtype)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return poisoned_empty(*shape, dtype=dtype, device="cuda", layout="offset")


def workspace(size: int) -> torch.Tensor | None:
    return torch.full((size,), float("nan"), device="cuda") if size else None


def check(out: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, what: str) -> None:
    assert_close_to_fp64(out, exact, eager.to(out.dtype), what=what)
    assert_surroundings_untouched(out)


def test_shrink(case):
    from fastlora.kernels.shrink import shrink, shrink_workspace

    kind, (m, _, k), r = case
    x, a = normal(m, k, dtype=kind[0]), normal(r, k, dtype=kind[1], scale=k**-0.5)
    out = empty(m, r, dtype=kind[0])
    shrink(x, a, out, workspace(shrink_workspace(x, a)), scale=0.5)
    check(out, 0.5 * x.double() @ a.to(x.dtype).double().t(), 0.5 * (x @ a.to(x.dtype).t()), "S")


def test_expand(case):
    from fastlora.kernels.expand import expand

    kind, (m, n, _), r = case
    s, b, bias = normal(m, r, dtype=kind[0]), normal(n, r, dtype=kind[1], scale=r**-0.5), normal(n, dtype=kind[0])
    out = empty(m, n, dtype=kind[0])
    expand(s, b, out, alpha=-1.5, bias=bias)
    cast = b.to(s.dtype)
    check(out, -1.5 * s.double() @ cast.double().t() + bias.double(), -1.5 * (s @ cast.t()) + bias, "T")


def test_ds_and_db(case):
    from fastlora.kernels.grads import ds_and_db, ds_and_db_workspace

    kind, (m, n, _), r = case
    dy, b, s = normal(m, n, dtype=kind[0]), normal(n, r, dtype=kind[1], scale=r**-0.5), normal(m, r, dtype=kind[0])
    ds, db = empty(m, r, dtype=kind[0]), empty(n, r, dtype=kind[1])
    ds_and_db(dy, b, s, ds, db, workspace(ds_and_db_workspace(dy, b)), scaling=2.0)
    cast = b.to(dy.dtype)
    check(ds, 2.0 * dy.double() @ cast.double(), 2.0 * (dy @ cast), "dS")
    check(db, 2.0 * dy.double().t() @ s.double(), 2.0 * (dy.t() @ s), "dB")


def test_weight_grad(case):
    from fastlora.kernels.grads import weight_grad, weight_grad_workspace

    kind, (m, _, k), r = case
    x, g, out = normal(m, k, dtype=kind[0]), normal(m, r, dtype=kind[0]), empty(r, k, dtype=kind[1])
    weight_grad(x, g, out.t(), workspace(weight_grad_workspace(x, r)))
    check(out, g.double().t() @ x.double(), g.t() @ x, "dA")


def test_gemms(case):
    from fastlora.kernels import configs
    from fastlora.kernels.gemm import forward_gemm, forward_gemm_with_s, input_grad_gemm

    kind, (m, n, k), r = case
    dtype = kind[0]
    x, w, dy = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, scale=k**-0.5), normal(m, n, dtype=dtype)
    a, b = normal(r, k, dtype=kind[1], scale=k**-0.5), normal(n, r, dtype=kind[1], scale=r**-0.5)
    s, bias, cast_a, cast_b = normal(m, r, dtype=dtype), normal(n, dtype=dtype), a.to(dtype), b.to(dtype)

    y = empty(m, n, dtype=dtype)
    forward_gemm(x, w, bias, s, b, y, 1.5)
    base = x.double() @ w.double().t() + bias.double()
    check(y, base + 1.5 * s.double() @ cast_b.double().t(), (x @ w.t() + bias) + 1.5 * (s @ cast_b.t()), "y")

    dx = empty(m, k, dtype=dtype)
    input_grad_gemm(dy, w, s, a, dx)
    check(dx, dy.double() @ w.double() + s.double() @ cast_a.double(), dy @ w + s @ cast_a, "dX")

    if r <= configs.MAX_RANK_INSIDE:
        y, made = empty(m, n, dtype=dtype), empty(m, r, dtype=dtype)
        forward_gemm_with_s(x, w, bias, a, b, y, made, 1.5)
        check(made, x.double() @ cast_a.double().t(), x @ cast_a.t(), "S inside")
        low_rank = 1.5 * (x.double() @ cast_a.double().t()) @ cast_b.double().t()
        check(y, base + low_rank, (x @ w.t() + bias) + 1.5 * ((x @ cast_a.t()) @ cast_b.t()), "y with S inside")


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("m, k", [(513, 1000), (2048, 4096), (3, 7)])
def test_every_kernel_makes_the_reference_mask(m, k, p):
    """With A = I (K up to 512 at a time), S is the masked x: the mask is read off each kernel, bit by bit."""
    from fastlora.kernels.dropout import new_seed, reference_keep_mask
    from fastlora.kernels.expand import expand
    from fastlora.kernels.gemm import input_grad_gemm
    from fastlora.kernels.shrink import shrink, shrink_workspace

    seed = new_seed(torch.device("cuda"))
    keep = reference_keep_mask(seed, m, k, p)
    ones = torch.ones(m, k, device="cuda", dtype=BF16)
    for start in range(0, k, 512):
        rows = min(512, k - start)
        a = torch.zeros(rows, k, device="cuda", dtype=BF16)
        a[:, start : start + rows] = torch.eye(rows, device="cuda", dtype=BF16)
        s = poisoned_empty(m, rows, dtype=BF16, device="cuda")
        shrink(ones, a, s, workspace(shrink_workspace(ones, a)), seed=seed, dropout_p=p)
        assert torch.equal(s != 0, keep[:, start : start + rows])

    narrow = torch.ones(m, 1, device="cuda", dtype=BF16)
    dx = poisoned_empty(m, k, dtype=BF16, device="cuda")
    expand(narrow, torch.ones(k, 1, device="cuda", dtype=BF16), dx, seed=seed, dropout_p=p)
    assert torch.equal(dx != 0, keep)

    dx = poisoned_empty(m, k, dtype=BF16, device="cuda")
    dy, w = (torch.zeros(*shape, device="cuda", dtype=BF16) for shape in ((m, 32), (32, k)))
    ones_a = torch.ones(1, k, device="cuda", dtype=BF16)
    input_grad_gemm(dy, w, narrow, ones_a, dx, seed=seed, dropout_p=p)
    assert torch.equal(dx != 0, keep)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_weight_grad_drops_what_the_mask_drops(p):
    from fastlora.kernels.dropout import new_seed, reference_keep_mask, threshold_and_scale
    from fastlora.kernels.grads import weight_grad, weight_grad_workspace

    m, k, r = 1000, 1024, 16
    seed = new_seed(torch.device("cuda"))
    x, g = normal(m, k, dtype=FP32), normal(m, r, dtype=FP32)
    out = empty(r, k, dtype=FP32)
    weight_grad(x, g, out.t(), workspace(weight_grad_workspace(x, r)), seed=seed, dropout_p=p)
    dropped = x.double() * reference_keep_mask(seed, m, k, p) * threshold_and_scale(p)[1]
    check(out, g.double().t() @ dropped, g.t() @ dropped.float(), "dA")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="needs 40 GB of GPU memory",
)
def test_more_than_two_to_the_31_elements():
    """x of 131,080 × 16,400 bf16 has 2.15e9 elements: an index in 32 bits would wrap."""
    from fastlora.kernels.shrink import shrink, shrink_workspace

    m, k, r = 131_080, 16_400, 16
    x = torch.ones(m, k, device="cuda", dtype=BF16)
    x[-1] = 2.0
    a = torch.full((r, k), 2.0**-10, device="cuda", dtype=BF16)
    out = poisoned_empty(m, r, dtype=FP32, device="cuda")
    shrink(x, a, out, workspace(shrink_workspace(x, a)))
    expected = torch.full((m, r), k * 2.0**-10, device="cuda")
    expected[-1] *= 2
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=0)
