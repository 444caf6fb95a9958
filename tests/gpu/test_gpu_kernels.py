"""The kernels' masks on a GPU against their specification, and more than 2^31 elements. (Values: the contracts'.)"""

import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


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
