"""Products of thin factors: their singular values from a small core."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import SVD, svd
from .operators import outside_autocast


@outside_autocast
def product_svd(left: Tensor, right: Tensor) -> SVD:
    """The thin SVD of left right, for left (n, k) and right (k, m) of any k, in float64; nothing of n×m is formed."""
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double().t())
    u, s, vh = svd(left_core @ right_core.t())
    return SVD(left_basis @ u, s, vh @ right_basis.t())


def balanced(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (rank, m) and B (n, rank) nearest to b a, each with the roots of the singular values, and all of these."""
    u, s, vh = product_svd(b, a)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root, s
