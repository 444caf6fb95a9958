"""Truncated singular value decompositions without the full one, and without the matrix where only its products are at
hand."""

from .operators import Factored, LinearOperator
from .orthogonal import orthonormal
from .svd import TruncatedSVD, truncated_svd

__all__ = ["Factored", "LinearOperator", "TruncatedSVD", "orthonormal", "truncated_svd"]
