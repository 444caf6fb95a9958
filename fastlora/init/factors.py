"""The two factors that a start takes from a truncated SVD, and how they are aligned with what a layer has."""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS = ("ArB2r", "A2rBr", "ArBr", "random")


def split_factors(u: Tensor, vh: Tensor, r: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (r, m) and B (n, r) with orthonormal rows and columns, from disjoint halves of U (n, 2r) and Vh (2r, m). The
    largest entry of each is positive."""
    first, second = slice(0, r), slice(r, 2 * r)
    if split == "random":
        order = torch.randperm(2 * r, generator=torch.Generator().manual_seed(seed)).to(u.device)
        rows, columns = order[first], order[second]
    else:
        rows, columns = {
            "ArB2r": (first, second),
            "A2rBr": (second, first),
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        }[split]
    return _signed(vh[rows]), _signed(u[:, columns].t()).t()


def _signed(rows: Tensor) -> Tensor:
    """Each row with the sign that makes its largest entry positive. A decomposition leaves signs open, and training
    after a start depends on them, since A and B are vectors of different triplets."""
    return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


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
