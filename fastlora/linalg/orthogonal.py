"""Orthonormal bases of tall matrices: CholeskyQR with a float64 Gram matrix, Householder QR where that is not safe."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import check_matrix, outside_autocast

# CholeskyQR loses orthogonality like κ²·2⁻⁵³: 1e5 leaves 1e-6, float32's own level.
MAX_CONDITION = 1e5


@outside_autocast
def orthonormal(matrix: Tensor) -> Tensor:
    """Q (..., n, c) with orthonormal columns that span the columns of `matrix` (..., n, c), n >= c.

    Where the columns are dependent (an idle expert, fewer tokens than columns, a zero matrix), Q is completed by other
    orthonormal columns. Deterministic. Raises ValueError for more columns than rows, and for empty or sparse tensors.
    Source: Yamamoto et al. 2015, CholeskyQR2; Golub and Van Loan, §5.2.
    """
    check_matrix("orthonormal: matrix", matrix, "(..., n, c)")
    n, c = matrix.shape[-2:]
    if n < c:
        raise ValueError(f"orthonormal: matrix: got {n}×{c}, want no more columns than rows")
    if matrix.dtype == torch.float64:  # 1e-6 would be a loss there
        return torch.linalg.qr(matrix)[0]
    wide = matrix.to(torch.float64)
    # Unit columns first: a factor of 1e6 between two columns is no ill-conditioning.
    norms = wide.norm(dim=-2, keepdim=True)
    wide = wide / torch.where(norms > 0, norms, 1.0)
    r, info = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
    diagonal = r.diagonal(dim1=-2, dim2=-1).abs()
    safe = (info == 0) & (diagonal.amin(-1) * MAX_CONDITION > diagonal.amax(-1))
    if bool(safe.all()):
        return torch.linalg.solve_triangular(r, wide, upper=True, left=False).to(matrix.dtype)
    return torch.linalg.qr(wide)[0].to(matrix.dtype)
