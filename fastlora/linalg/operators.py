"""What can be decomposed: a matrix, a product of two factors, or anything that multiplies from both sides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

COMPUTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
P = ParamSpec("P")
R = TypeVar("R")

CHUNK = 1024  # tokens cast to the working dtype at a time, so that no cast copy of a whole factor exists


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function with autocast off: half-precision products would leave bases that are not orthonormal."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


@runtime_checkable
class LinearOperator(Protocol):
    """A real (n, m) matrix G known by its products; `shape` is (..., n, m)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def matmul(self, v: Tensor, /) -> Tensor:
        """G v for v (..., m, c): (..., n, c)."""
        ...

    def rmatmul(self, u: Tensor, /) -> Tensor:
        """Gᵀ u for u (..., n, c): (..., m, c)."""
        ...


def check_matrix(where: str, matrix: Tensor, wanted: str, rows: int = 1) -> None:
    """Raises ValueError for a tensor that is no dense matrix (..., n, m) with at least one entry (or no row, with rows
    = 0) of a dtype that can be computed with."""
    filled = matrix.dim() >= 2 and matrix.shape[-2] >= rows and 0 not in (*matrix.shape[:-2], matrix.shape[-1])
    if filled and matrix.layout == torch.strided and matrix.dtype in COMPUTABLE:
        return
    layout = "" if matrix.layout == torch.strided else f"{matrix.layout} "
    kinds = "float64, float32, float16 or bfloat16"
    raise ValueError(
        f"{where}: got a {layout}{matrix.dtype} tensor of shape {tuple(matrix.shape)}, want {wanted}, dense, {kinds}, "
        "with at least one entry"
    )


class Explicit:
    """A matrix (..., n, m), held in the working dtype and divided by `scale`, its largest absolute entry."""

    def __init__(self, matrix: Tensor) -> None:
        dtype = working_dtype(matrix.dtype)
        largest = matrix.abs().amax(dim=(-2, -1), keepdim=True).to(torch.float64)
        if not torch.isfinite(largest).all():
            raise ValueError(
                f"truncated_svd: matrix {tuple(matrix.shape)}: it has NaN or infinite entries, want finite ones"
            )
        self.scale = torch.where(largest > 0, largest, 1.0)
        self.matrix = (matrix.to(torch.float64) / self.scale).to(dtype)
        self.shape, self.dtype, self.device = tuple(matrix.shape), dtype, matrix.device

    def matmul(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def rmatmul(self, u: Tensor) -> Tensor:
        return self.matrix.mT @ u


class Factored:
    """G = dYᵀ X for dY (..., T, n) and X (..., T, m), the gradient of a linear layer's weight, never formed.

    Works in float32 (float64 for float64 factors), casting CHUNK tokens at a time. Raises ValueError where the factors
    do not fit together.
    """

    def __init__(self, x: Tensor, dy: Tensor) -> None:
        for name, factor in (("x", x), ("dy", dy)):
            check_matrix(f"Factored: {name}", factor, "(..., T, features)", rows=0)
        if x.dim() != dy.dim() or x.shape[:-1] != dy.shape[:-1]:
            raise ValueError(
                f"Factored: x, dy: got shapes {tuple(x.shape)} and {tuple(dy.shape)}, "
                "want (..., T, m) and (..., T, n) with one T"
            )
        if x.device != dy.device:
            raise ValueError(f"Factored: x, dy: got devices {x.device} and {dy.device}, want one")
        self.x, self.dy = x, dy
        self.shape = (*x.shape[:-2], dy.shape[-1], x.shape[-1])
        self.dtype = working_dtype(torch.promote_types(x.dtype, dy.dtype))
        self.device = x.device

    def matmul(self, v: Tensor) -> Tensor:
        return self._through(self.x, self.dy, v)

    def rmatmul(self, u: Tensor) -> Tensor:
        return self._through(self.dy, self.x, u)

    def _through(self, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
        """secondᵀ (first v)."""
        out = v.new_zeros(*second.shape[:-2], second.shape[-1], v.shape[-1])
        for start in range(0, first.shape[-2], CHUNK):
            rows = slice(start, start + CHUNK)
            left, right = second[..., rows, :].to(v.dtype).mT, first[..., rows, :].to(v.dtype) @ v
            if out.dim() == 2:
                out.addmm_(left, right)
            else:
                out += left @ right
        return out


class Rows:
    """A matrix (n, m) of any float dtype and strides as it lies: CHUNK of its rows are cast to the working dtype at a
    time, so that no copy of it exists."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape, self.dtype, self.device = tuple(matrix.shape), working_dtype(matrix.dtype), matrix.device

    def matmul(self, v: Tensor) -> Tensor:
        if self.matrix.dtype == v.dtype:
            return self.matrix @ v
        return torch.cat([rows.to(v.dtype) @ v for rows in self.matrix.split(CHUNK)])

    def rmatmul(self, u: Tensor) -> Tensor:
        if self.matrix.dtype == u.dtype:
            return self.matrix.mT @ u
        out = u.new_zeros(self.shape[1], u.shape[1])
        for rows, part in zip(self.matrix.split(CHUNK), u.split(CHUNK)):
            out.addmm_(rows.to(u.dtype).mT, part)
        return out


class Transposed:
    """Gᵀ of an operator G."""

    def __init__(self, op: LinearOperator) -> None:
        self.op = op
        *batch, n, m = op.shape
        self.shape, self.dtype, self.device = (*batch, m, n), op.dtype, op.device

    def matmul(self, v: Tensor) -> Tensor:
        return self.op.rmatmul(v)

    def rmatmul(self, u: Tensor) -> Tensor:
        return self.op.matmul(u)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; every other float is computed with in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
