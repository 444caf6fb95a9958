"""The two factors that a start takes from a truncated SVD, and how they are aligned with what a layer has."""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS = ("ArB2r", "A2rBr", "ArBr", "random")


def split_factors(u: Tensor, vh: Tensor, r: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (r, m) and B (n, r) with orthonormal rows and columns, from disjoint halves of U (n, 2r) and Vh (2r, m)."""
    first, second = slice(0, r), slice(r, 2 * r)
    if split == "ArB2r":
        return vh[first], u[:, second]
    if split == "A2rBr":
        return vh[second], u[:, first]
    if split == "ArBr":
        return vh[1 : 2 * r : 2], u[:, 0 : 2 * r : 2]
    order = torch.randperm(2 * r, generator=torch.Generator().manual_seed(seed)).to(u.device)
    return vh[order[first]], u[:, order[second]]


# New factors.
def align(new: Tensor, old: Tensor) -> Tensor:
    """R new, with the orthogonal R (r, r) that brings the rows of `new` (r, d) nearest to those of `old`."""
    u, _, vh = torch.linalg.svd(old @ new.t())
    return u @ vh @ new


def smoothed(new: Tensor, old: Tensor, smoothing: float) -> Tensor:
    """α old + (1 − α) R new (r, d), of the length that α and 1 − α give between theirs.

    Without the last, each average of bases that are at right angles would be shorter by √½, and so would be the
    adapter's steps.
    """
    mean = smoothing * old + (1 - smoothing) * align(new, old)
    length = smoothing * old.norm() + (1 - smoothing) * new.norm()
    return mean * (length / mean.norm())
