"""Block Golub–Kahan–Lanczos with full reorthogonalisation (Golub and Van Loan, §10.4): bases of the Krylov spaces of
GGᵀ and GᵀG, block by block, each against all blocks before it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .operators import Explicit, Factored, LinearOperator
from .orthogonal import orthonormal

MAX_SKEW = 1e-4  # how far from orthonormal a basis may be before it is made again


def block_lanczos(op: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """U (..., n, s·b) with orthonormal columns and Z = GᵀU (..., m, s·b), from the block start (..., m, b).

    As many steps s as asked for, or as there is room for. By the compiled op for a matrix (a batch of them one by one)
    or factors in float32 or less, else by torch. Where a Krylov space is exhausted, as for a matrix of low rank, the
    last blocks are what rounding leaves, and U is made orthonormal once more.
    """
    n, m = op.shape[-2:]
    steps = max(1, min(steps, min(n, m) // start.shape[-1]))
    basis, product = _by_op(op, start, steps) or by_torch(op, start, steps)
    gram = basis.mT @ basis
    skew = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()
    if not bool(skew <= MAX_SKEW) and bool(torch.isfinite(skew)):
        basis = torch.linalg.qr(basis.double())[0].to(basis.dtype)
        product = op.rmatmul(basis)
    return basis, product


def _by_op(op: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor] | None:
    if isinstance(op, Explicit):
        pairs = [(None, matrix) for matrix in op.matrix.reshape(-1, *op.shape[-2:])]
    elif isinstance(op, Factored):
        flat = (factor.reshape(-1, *factor.shape[-2:]) for factor in (op.x, op.dy))
        pairs = list(zip(*flat))
    else:
        return None
    blocks = start.reshape(-1, *start.shape[-2:])
    found = [native.lanczos(x, y, block, steps) for (x, y), block in zip(pairs, blocks)]
    if not found or any(one is None for one in found):
        return None
    basis, product = (torch.stack(parts) for parts in zip(*found))  # type: ignore[arg-type]
    batch = op.shape[:-2]
    return basis.reshape(*batch, *basis.shape[-2:]), product.reshape(*batch, *product.shape[-2:])


def by_torch(op: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The same in torch: the fallback, and what the compiled op is checked against."""
    us: list[Tensor] = []
    zs: list[Tensor] = []
    vs = [orthonormal(start)]
    for step in range(steps):
        us.append(_against(op.matmul(vs[-1]), us))
        zs.append(op.rmatmul(us[-1]))
        if step + 1 < steps:
            vs.append(_against(zs[-1], vs))
    return torch.cat(us, dim=-1), torch.cat(zs, dim=-1)


def _against(new: Tensor, basis: list[Tensor]) -> Tensor:
    """An orthonormal block of new's columns, orthogonal to every block of the basis; twice, which is enough (Kahan,
    Parlett)."""
    if not bool(torch.isfinite(new).all()):  # LAPACK would not say so in words
        raise ValueError("truncated_svd: operator: its products are NaN or infinite, want finite ones")
    if not basis:
        return orthonormal(new)
    previous = torch.cat(basis, dim=-1)
    for _ in range(2):
        norms = new.norm(dim=-2, keepdim=True)
        new = new / torch.where(norms > 0, norms, 1.0)
        new = orthonormal(new - previous @ (previous.mT @ new))
    return new
