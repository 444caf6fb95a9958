"""Factors for Adam's first step, which is sign(G) rather than G.

The first step of Adam on W moves it by −η sign(G); on A and B it moves the effective weight by −η s (B P + R A), where
P = sign(BᵀG) (r, m) and R = sign(GAᵀ) (n, r). Wanted are A and B with the least

    f(A, B) = min_c ‖c (B P + R A) − S‖² / ‖S‖²        S = sign(G)

(c is the learning rate's business, so that f does not change where A and B are scaled together). There is no closed
form: P and R jump. While they stay what they are, though, f is a least-squares problem, so `minimise` solves for B with
P and R fixed, then for A, goes as far in that direction as lowers f itself, takes the new P and R, and so on. f never
rises, and some ten rounds are enough. Nothing of size n×m is needed but G: everything is skinny products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import linalg

ROUNDS = 30
LEAST_STEP = 1.0 / 64
LEAST_GAIN = 1e-5
BLOCK = 1024  # rows of sign(G) that exist at a time


class Matrix:
    """G as an operator, without the copy that `truncated_svd` makes of a tensor."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.shape, self.dtype, self.device = tuple(gradient.shape), gradient.dtype, gradient.device

    def matmul(self, v: Tensor) -> Tensor:
        """G v for v (m, k)."""
        return self.gradient @ v

    def rmatmul(self, u: Tensor) -> Tensor:
        """Gᵀ u for u (n, k)."""
        return self.gradient.t() @ u


class Signs:
    """sign(G), an operator that multiplies from both sides: a block of rows at a time, so that no second (n, m) matrix
    exists."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.shape, self.dtype, self.device = tuple(gradient.shape), gradient.dtype, gradient.device
        self.squared_norm = float(sum(int(torch.count_nonzero(rows)) for _, rows in self._blocks()))

    def matmul(self, v: Tensor) -> Tensor:
        """sign(G) v for v (m, k)."""
        return torch.cat([rows @ v for _, rows in self._blocks()])

    def rmatmul(self, u: Tensor) -> Tensor:
        """sign(G)ᵀ u for u (n, k)."""
        out = u.new_zeros(self.shape[1], u.shape[1])
        for place, rows in self._blocks():
            out.addmm_(rows.t(), u[place])
        return out

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.shape[0], BLOCK):
            place = slice(start, start + BLOCK)
            yield place, torch.sign(self.gradient[place])


class Found(NamedTuple):
    """A (r, m) and B (n, r), with ‖A‖² + ‖B‖² = 2r as of orthonormal factors, f of them, and the rounds it took."""

    a: Tensor
    b: Tensor
    objective: float
    rounds: int


def objective(gradient: Tensor, signs: Signs, a: Tensor, b: Tensor) -> float:
    """f(A, B), in [0, 1]."""
    return _State(gradient, signs, a, b).objective


def minimise(gradient: Tensor, signs: Signs, a: Tensor, b: Tensor, rounds: int = ROUNDS) -> Found:
    """Lowers f from a start (A, B)."""
    state = _State(gradient, signs, a, b)
    state = _State(gradient, signs, a * state.best_scale, b * state.best_scale)
    done = 0
    for _ in range(rounds):
        better = _search(gradient, signs, state)
        if better is None:
            break
        done += 1
        gain, state = state.objective - better.objective, better
        if gain < LEAST_GAIN:
            break
    size = (2 * len(a) / (state.a.square().sum() + state.b.square().sum()).clamp_min(1e-30)).sqrt()
    return Found(state.a * size, state.b * size, state.objective, done)


def leading_factors(matrix: Matrix | Signs, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """A = Vᵀ[:r] and B = U[:, :r]: the same triplets on both sides. For signs that is a better start than LoRA-GA's
    disjoint halves: tests/test_sign.py compares them."""
    u, _, vh, _ = linalg.truncated_svd(matrix, r, seed=seed)
    return vh, u


class _State:
    """A point of the search and what belongs to it."""

    def __init__(self, gradient: Tensor, signs: Signs, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.p, self.r = torch.sign(b.t() @ gradient), torch.sign(gradient @ a.t())
        self.p_s = signs.matmul(self.p.t()).t()  # P Sᵀ (r, n)
        self.s_r = signs.rmatmul(self.r).t()  # RᵀS (r, m)
        inner = _dot(b.t(), self.p_s) + _dot(self.s_r, a)
        squared = (
            _dot(b.t() @ b, self.p @ self.p.t())
            + _dot(self.r.t() @ self.r, a @ a.t())
            + 2 * _dot(b.t() @ self.r, self.p @ a.t())
        )
        whole = signs.squared_norm
        self.best_scale = inner / squared if squared > 0 else 1.0
        self.objective = max(0.0, 1.0 - inner * inner / (squared * whole)) if squared > 0 and whole > 0 else 1.0


def _search(gradient: Tensor, signs: Signs, state: _State) -> _State | None:
    """The next point, or None where there is no better one in this direction."""
    cross = state.p @ state.a.t()  # P Aᵀ
    b = _solve(state.p @ state.p.t(), state.p_s - cross @ state.r.t()).t()
    a = _solve(state.r.t() @ state.r, state.s_r - (state.r.t() @ b) @ state.p)
    step = 1.0
    while step >= LEAST_STEP:
        candidate = _State(gradient, signs, torch.lerp(state.a, a, step), torch.lerp(state.b, b, step))
        if candidate.objective < state.objective:
            return candidate
        step /= 2
    return None


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares from the normal equations, in float64; columns of signs may coincide, hence the pseudo-inverse."""
    inverse = torch.linalg.pinv(gram.double(), rtol=1e-10, hermitian=True)
    return (inverse @ right.double()).to(right.dtype)


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum())
