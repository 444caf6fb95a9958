"""Matrices with spectra that are easy and with some that are not, and truncated SVDs of them beside LAPACK's."""

import torch
from torch import Tensor

from fastlora.linalg import truncated_svd

RANK = 8
SPECTRA = {
    "fast": [0.7**i for i in range(60)],
    "slow": [(1 + i) ** -0.5 for i in range(60)],
    "flat": [1.0] * 60,
    "clustered": [1.0] * 10 + [0.99] * 10 + [0.5] * 40,
    "deficient": [1.0] * 5 + [0.0] * 55,
    "zero": [0.0] * 60,
    "tiny": [1e-30 * 0.9**i for i in range(60)],
    "huge": [1e30 * 0.9**i for i in range(60)],
}


def matrix_with(spectrum: list[float], dtype: torch.dtype, n: int, m: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    s = torch.tensor(spectrum[: min(n, m)], dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64, generator=generator))[0]
    return (u * s @ v.T).to(dtype)


def check_against_lapack(g: Tensor, rank: int, **options) -> None:
    """Singular values to a part in 1000 of the largest, an approximation within 0.1 % of the best, orthonormal
    factors."""
    u, s, vh, error = truncated_svd(g, rank, **options)
    n, m = g.shape
    assert (u.shape, s.shape, vh.shape) == ((n, rank), (rank,), (rank, m))
    expected = torch.linalg.svdvals(g.double())
    largest = expected[0].item()
    assert torch.allclose(s.double(), expected[:rank], rtol=0, atol=1e-3 * largest)
    assert torch.all(s[:-1] >= s[1:])
    actual = torch.linalg.norm(g.double() - (u.double() * s.double()) @ vh.double())
    best = torch.linalg.norm(expected[rank:])
    noise = 1e-5 if g.dtype != torch.float64 else 1e-12
    assert actual <= 1.001 * best + noise * torch.linalg.norm(g.double())
    assert 0.5 * best - noise * largest <= error.double() <= 2.0 * actual + noise * largest * n**0.5
    if largest > 0:
        tolerance = 1e-5 if g.dtype != torch.float64 else 1e-9
        for factor in (u.T @ u, vh @ vh.T):
            assert torch.allclose(factor.double(), torch.eye(rank, dtype=torch.float64), atol=tolerance)
