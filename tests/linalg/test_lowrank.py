"""Products of thin factors against torch's SVD of the product."""

import pytest
import torch

from fastlora.linalg.lowrank import balanced, product_svd


@pytest.mark.parametrize("n, k, m", [(8, 6, 9), (5, 7, 30), (20, 12, 4)])
def test_a_products_triplets(n, k, m):
    left, right = torch.randn(n, k), torch.randn(k, m)
    product = left.double() @ right.double()
    with torch.autocast("cpu", torch.bfloat16):
        u, s, vh = product_svd(left, right)
    assert torch.allclose((u * s) @ vh, product, atol=1e-12) and u.dtype == torch.float64
    assert torch.allclose(s, torch.linalg.svdvals(product)[: len(s)], atol=1e-12)
    a, b, sigma = balanced(right, left, 3)
    assert (a.shape, b.shape) == ((3, m), (n, 3)) and torch.equal(sigma, s)
    assert (b @ a - product).norm().item() == pytest.approx(torch.linalg.svdvals(product)[3:].norm().item())
    assert torch.allclose(a @ a.t(), b.t() @ b, atol=1e-12)  # half of the size in each
