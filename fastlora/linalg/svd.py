"""`truncated_svd`: the leading singular triplets by randomised subspace iteration or block Lanczos."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.checks import check, check_choice, is_integer
from . import native
from .lanczos import block_lanczos
from .operators import Explicit, Factored, LinearOperator, check_matrix, outside_autocast
from .orthogonal import orthonormal

METHODS = ("randomized", "lanczos")
PROBES = 16


class TruncatedSVD(NamedTuple):
    """G ≈ U diag(S) Vh: U (..., n, k), S (..., k) descending, Vh (..., k, m).

    `error` (...,): an estimate of ‖G − U diag(S) Vh‖_F, from PROBES random probes (standard deviation about a third of
    it at most).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: Tensor


@outside_autocast
def truncated_svd(
    operator: Tensor | tuple[Tensor, Tensor] | LinearOperator,
    rank: int,
    method: str = "randomized",
    *,
    oversampling: int | None = None,
    iterations: int | None = None,
    seed: int = 0,
) -> TruncatedSVD:
    """The `rank` leading singular triplets of a matrix, of a product of factors, or of anything that multiplies.
    Autocast is off within.

    Args:
        operator: a matrix (..., n, m) or factors (X (..., T, m), dY (..., T, n)) that stand for dYᵀ X, batched over the
            leading dimensions; or an object with
            `shape`, `dtype`, `device`, `matmul` and `rmatmul` (`LinearOperator`). float16 and bfloat16 are computed
            with in float32.
        rank: k >= 1; at most min(n, m).
        method: "randomized", subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4): few, wide products.
            "lanczos", block
            Golub–Kahan–Lanczos with full reorthogonalisation: fewer products to the same accuracy where the spectrum is
            flat.
        oversampling: columns beyond `rank` (by default rank + 8): more of them, more accuracy for flat or clustered
            spectra.
        iterations: power iterations (default 4), or Lanczos steps (default 6).
        seed: of the random start; the same seed gives the same result.

    Returns:
        `TruncatedSVD`.

    Raises:
        ValueError: a rank, oversampling, iterations or seed that are no integers or out of range; an unknown method;
            entries that are not finite; empty and sparse tensors, and dtypes other than those four.

    Examples:
        >>> U, S, Vh, error = truncated_svd(torch.randn(300, 200), rank=8)
        >>> U.shape, S.shape, Vh.shape
        (torch.Size([300, 8]), torch.Size([8]), torch.Size([8, 200]))
    """
    check_choice("truncated_svd", "method", method, METHODS)
    op = _as_operator(operator)
    n, m = op.shape[-2:]
    right = is_integer(rank) and rank <= min(n, m)
    check(right, "truncated_svd", "rank", rank, f"an integer in [1, {min(n, m)}] for a matrix {n}×{m}")
    for argument, value, least in (
        ("oversampling", oversampling, 0),
        ("iterations", iterations, 0 if method == "randomized" else 1),
        ("seed", seed, None),
    ):
        if value is None and least is not None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            wanted = "an integer" if least is None else f"an integer of at least {least}, or None"
            raise ValueError(f"truncated_svd: {argument}: got {value!r}, want {wanted}")
    width = min(rank + (rank + 8 if oversampling is None else oversampling), min(n, m))
    generator = torch.Generator().manual_seed(seed)
    draw = _Gaussian(op, generator)
    if min(n, m) <= 2 * width:
        u, s, vh = _whole(op)
    elif method == "randomized":
        q = orthonormal(op.matmul(draw(width)))
        u, s, vh = subspace_iteration(op, q, 4 if iterations is None else iterations)
    else:
        u, s, vh = _from_left_basis(*block_lanczos(op, draw(width), 6 if iterations is None else iterations))
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    probes = draw(PROBES)
    residual = op.matmul(probes) - u @ (s.unsqueeze(-1) * (vh @ probes))
    error = residual.double().square().sum(dim=(-2, -1)).div(PROBES).sqrt()
    scale = op.scale if isinstance(op, Explicit) else None
    if scale is not None:
        s = (s.double() * scale.squeeze(-1)).to(s.dtype)
        error = error * scale[..., 0, 0]
    return TruncatedSVD(u, s, vh, error.to(s.dtype))


class _Gaussian:
    """Draws (..., m, c) Gaussian blocks on the host, so that the result does not depend on the device."""

    def __init__(self, op: LinearOperator, generator: torch.Generator) -> None:
        self.op, self.generator = op, generator

    def __call__(self, columns: int) -> Tensor:
        shape = (*self.op.shape[:-2], self.op.shape[-1], columns)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.op.device, self.op.dtype)


def _as_operator(operator: Tensor | tuple[Tensor, Tensor] | LinearOperator) -> LinearOperator:
    if isinstance(operator, Tensor):
        check_matrix("truncated_svd: operator", operator, "(..., n, m)")
        return Explicit(operator)
    if isinstance(operator, tuple) and len(operator) == 2 and all(isinstance(part, Tensor) for part in operator):
        for factor in operator:
            check_matrix("truncated_svd: operator", factor, "factors (..., T, m) and (..., T, n)")
        return Factored(*operator)
    if isinstance(operator, LinearOperator):
        if len(operator.shape) < 2 or 0 in operator.shape or operator.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"truncated_svd: operator: got {operator.dtype} of shape {tuple(operator.shape)}, want float32 or "
                "float64, (..., n, m) with at least one entry"
            )
        return operator
    raise ValueError(
        f"truncated_svd: operator: got {type(operator).__name__}, want a tensor, factors (X, dY), or an object with "
        "shape, dtype, device, matmul and rmatmul"
    )


def subspace_iteration(op: LinearOperator, q: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., n, c), S (..., c) descending, Vh (..., c, m): the triplets of Q Qᵀ G for the basis Q that q (..., n, c),
    orthonormal, becomes when it is multiplied `iterations` times by GGᵀ. Raises ValueError where a product is not
    finite."""
    for _ in range(iterations):
        q = orthonormal(op.matmul(orthonormal(op.rmatmul(q))))
    return _from_left_basis(q, op.rmatmul(q))


def _whole(op: LinearOperator) -> tuple[Tensor, Tensor, Tensor]:
    """All of them by LAPACK: with a short side of at most 2·width, the matrix is no larger than the bases would be."""
    n, m = op.shape[-2:]
    q = (
        torch.eye(n, dtype=op.dtype, device=op.device)
        if n <= m
        else orthonormal(op.matmul(torch.eye(m, dtype=op.dtype, device=op.device)))
    )
    q = q.expand(*op.shape[:-2], *q.shape[-2:])
    return _from_left_basis(q, op.rmatmul(q))


def _from_left_basis(q: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of Q Qᵀ G from Q (n, c) and Z = Gᵀ Q (m, c)."""
    if not bool(torch.isfinite(z).all()):
        raise ValueError("truncated_svd: operator: its products are NaN or infinite, want finite ones")
    u, s, vh = native.svd(z.mT.double())
    return q @ u.to(q.dtype), s.to(q.dtype), vh.to(q.dtype)
