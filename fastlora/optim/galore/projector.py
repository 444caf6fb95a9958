"""The basis of one weight's gradient, the small matrix that it makes of a gradient, and how it is renewed.

The gradient of a weight is G (n, m). With its columns projected, P (n, r), R = GᵀP and the weight moves along P Nᵀ;
with its rows projected, Q (m, r), R = G Q and it moves along N Qᵀ. The second is the first for Gᵀ. So with G turned
such that the projected side comes first, (k, l), a one-sided projection has

    basis (k, r) orthonormal        R = GᵀP (l, r)        W ← W − step·P Nᵀ

and the two-sided one P (n, r), Q (m, r), R = PᵀGQ (r, r), W ← W − step·P N Qᵀ. G is only ever multiplied with.

A new basis comes in one step, from that step's G, or over several steps, from sums that are linear in each step's G
(`finish_step`): these can be accumulated over micro-batches and added up over processes while the basis stays fixed.
Everything that lasts from step to step lies in the optimiser's state of the weight, as tensors and integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...introspect import sharding
from ...linalg import native
from ...linalg.operators import CHUNK, LinearOperator, Transposed, working_dtype
from ...linalg.svd import subspace_iteration
from ..moments import Mixing, mixing

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
BASES = ("basis", "basis_right")  # the second for two sides only
REFRESHES = ("subspace", "svd", "streamed")
# Random columns besides the r of a subspace iteration. On MiniLM's gradients, r = 8, one iteration, the worst layer's
# basis holds 0.907 of what the best one does without any, and 0.985 with 8 (bench/galore/bases.py).
EXTRA_COLUMNS = 8
NOT_FINITE = (
    "GaLoreAdamW: gradient: that of a projected weight is NaN or infinite in a step that refreshes its basis, want a "
    "finite one"
)

State = dict[str, Any]
Changes = list[tuple[Mixing, int]]  # how a new basis is made of the old one, and the dimension of R that it concerns


def side_of(proj_type: str, n: int, m: int) -> str:
    """ "left" for P, "right" for Q, or "full". std projects the shorter side (Q where they are equal, as the official
    code does), reverse_std the longer one."""
    if proj_type in ("std", "reverse_std"):
        return "right" if (n >= m) == (proj_type == "std") else "left"
    return proj_type


@dataclass(frozen=True)
class Projector:
    """What is fixed of the projection of one weight (n, m)."""

    n: int
    m: int
    rank: int
    side: str
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, weight: Tensor, group: Mapping[str, Any]) -> Projector:
        n, m = weight.shape
        dtype = working_dtype(weight.dtype)
        return cls(n, m, group["rank"], side_of(group["proj_type"], n, m), dtype, weight.device)

    @property
    def k(self) -> int:
        """The length of the side that is projected."""
        return self.m if self.side == "right" else self.n

    def turned(self, op: LinearOperator) -> LinearOperator:
        """(k, l)"""
        return Transposed(op) if self.side == "right" else op

    # Between refreshes.

    def start(self, state: State, seed: int, streamed: bool) -> None:
        """A random basis, the same in every process. A streamed refresh begins with it at once."""
        columns = self._random(seed, self.k, self.rank), self._random(seed + 1, self.m, self.rank)
        state["basis"] = native.orthonormal(columns[0])
        if self.side == "full":
            state["basis_right"] = native.orthonormal(columns[1])
        state |= {"bases": 0, "refresh_at": 0, "halves": 0, "window": 0}
        if streamed:
            state |= {"halves": 2, "window": 1}

    def _random(self, seed: int, rows: int, columns: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)  # of the host: the same on every device
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def project(self, state: State, op: LinearOperator) -> Tensor:
        """R: (l, r), or (r, r), whole in every process."""
        if self.side == "full":
            product = op.matmul(state["basis_right"])
            return sharding.whole(sharding.spread(state["basis"], product).mT @ product)
        return self.turned(op).rmatmul(state["basis"])

    def sums(self, state: State, op: LinearOperator) -> list[Tensor]:
        """What a streamed refresh adds up of G besides R, now."""
        if not state["halves"]:
            return []
        if self.side == "full":
            return [op.matmul(state["basis_right"]), op.rmatmul(state["basis"])]
        return [self.turned(op).matmul(state["probe"])] if state["halves"] % 2 else []

    def add_(self, weight: Tensor, state: State, low: Tensor, alpha: float) -> None:
        """weight += alpha·P lowᵀ, alpha·low Qᵀ or alpha·P low Qᵀ; nothing of the weight's size is allocated. Of a
        DTensor each process has rows, for which it needs the same rows of what stands left."""
        basis = state["basis"]
        if self.side == "left":
            left, right = basis, sharding.whole(low).mT
        elif self.side == "right":
            left, right = low, basis.mT
        else:
            left, right = basis, low @ state["basis_right"].mT
        left, weight = sharding.local(sharding.spread(left, weight)), sharding.local(weight)
        if weight.dtype == left.dtype:
            weight.addmm_(left, right, alpha=alpha)
            return
        for rows, part in zip(weight.split(CHUNK), left.split(CHUNK)):
            rows.add_(part @ right, alpha=alpha)

    # A refresh from one G.

    def refresh(
        self, state: State, op: LinearOperator, group: Mapping[str, Any], seed: int
    ) -> tuple[Tensor | None, Changes]:
        """The leading singular vectors of G as the basis. R in it, or None where G is zero: it has no directions, and
        the basis stays. Raises ValueError where G is not finite."""
        if group["refresh"] == "svd":
            matrix: Tensor = op.matrix  # type: ignore[attr-defined]
            _check_finite(matrix)
            u, s, vh = torch.linalg.svd(matrix.to(self.dtype), full_matrices=False)
            left, right = u[:, : self.rank].contiguous(), vh[: self.rank].mT.contiguous()
            first, second = (right, left) if self.side == "right" else (left, right)
            changes = self._set(state, group, first, second)
            if self.side == "full" and group["arithmetic"] != "official":
                # PᵀGQ is diagonal but for rounding, of which Adam's first step would make entries of ±1.
                return torch.diag(s[: self.rank]), changes
            return self.project(state, op), changes
        try:
            u, s, vh = subspace_iteration(self.turned(op), self._columns(state, seed), group["refresh_iterations"])
        except ValueError as error:
            raise ValueError(NOT_FINITE) from error
        if not bool(s[0] > 0):
            return None, []
        u, s, v = u[:, : self.rank].contiguous(), s[: self.rank], vh[: self.rank].mT.contiguous()
        changes = self._set(state, group, u, v)
        return torch.diag(s) if self.side == "full" else v * s, changes  # UᵀG = S Vh, from the iteration itself

    def _columns(self, state: State, seed: int) -> Tensor:
        """The old basis and some random columns, orthonormal."""
        extra = min(EXTRA_COLUMNS, min(self.n, self.m) - self.rank)
        if not extra:
            return state["basis"]
        return native.orthonormal(torch.cat((state["basis"], self._random(seed, self.k, extra)), dim=1))

    def _set(self, state: State, group: Mapping[str, Any], basis: Tensor, other: Tensor) -> Changes:
        new = {"basis": basis} | ({"basis_right": other} if self.side == "full" else {})
        changes: Changes = []
        if group["moments"] != "keep":
            for key, dim in zip(BASES, (0 if self.side == "full" else 1, 1)):
                change = mixing(state[key].mT, new[key].mT) if key in new else None
                if change is not None:
                    changes.append((change, dim))
        state |= new
        state["bases"] += 1
        return changes

    # A refresh over several steps.

    def finish_step(self, state: State, group: Mapping[str, Any], low: Tensor, sums: list[Tensor]) -> Changes:
        """Takes a streamed refresh one step further. `low` and `sums` are what `project` and `sums` gave, added up over
        the step.

        One-sided, a half-iteration is V = orth(Σ R), or the singular vectors of Σ G V; two-sided, those of Σ G Q and of
        Σ GᵀP at once. The sums are over `refresh_steps` steps; before the first basis, over one.
        """
        if not state["halves"]:
            return []
        if self.side == "full":
            terms = dict(zip(("product", "product_right"), sums))
        else:
            terms = {"product": sums[0]} if sums else {"probe": low}
        if not terms or not all(_has_entries(term) for term in terms.values()):  # zeros have no directions: wait
            return []
        for key, term in terms.items():
            state[key] = state[key] + term if key in state else term
        state["window"] -= 1
        if state["window"]:
            return []
        state["halves"] -= 1
        state["window"] = group["refresh_steps"] if state["bases"] else 1
        if "product" not in terms:
            state["probe"] = native.orthonormal(state["probe"])
            return []
        state.pop("probe", None)
        left = _left_vectors(state.pop("product"))
        right = _left_vectors(state.pop("product_right")) if self.side == "full" else left
        return self._set(state, group, left, right)

    def begin(self, state: State, group: Mapping[str, Any]) -> None:
        """Begins a streamed refresh."""
        state |= {"halves": 2 * group["refresh_iterations"], "window": group["refresh_steps"]}


def _left_vectors(product: Tensor) -> Tensor:
    """The left singular vectors of (k, r), completed where it has fewer."""
    basis = native.orthonormal(product)
    u, _, _ = native.svd((basis.mT @ product).double())
    return basis @ u.to(basis.dtype)


def all_finite(tensors: list[Tensor]) -> bool:
    """With one answer from the device for all of them."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _has_entries(term: Tensor) -> bool:
    _check_finite(term)
    return bool(term.any())


def _check_finite(tensor: Tensor) -> None:
    if not all_finite([tensor]):
        raise ValueError(NOT_FINITE)
