"""Streaming subspace iteration: the leading singular triplets of G = Σ wᵢ dYᵢᵀ Xᵢ from one pass over the micro-batches,
G never formed.

State: Q (n, c) orthonormal and Z = GᵀQ (m, c), so that G ≈ Q Zᵀ. A micro-batch multiplies five times with the running
sum

    G⁺ V = Q (Zᵀ V) + w dYᵀ (X V)        G⁺ᵀ U = Z (Qᵀ U) + w Xᵀ (dY U)

starting from G⁺ᵀ Q. docs/lora_ga.md has the measurements. Ideas: Halko, Martinsson and Tropp
2011 (subspace iteration); the sum is compressed again after each micro-batch, as frequent directions does with rows
(Ghashami et al. 2016).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..linalg import native

PROBES = 8  # random directions that measure what the sketch misses
# Columns of Z smaller than this beside the largest are rounding: random directions take their place.
NEGLIGIBLE = 1e-6


@lru_cache(maxsize=16)
def probes(m: int, device: torch.device) -> Tensor:
    """(m, PROBES) Gaussian, drawn on the host: one for all layers with m inputs, on every device and every rank."""
    return torch.randn(m, PROBES, generator=torch.Generator().manual_seed(1)).to(device)


class StreamingSketch:
    """One layer's sketch. n = out_features, m = in_features, `width` c = number of columns kept (at most min(n, m)).

    `tokens` and `updates` count what was added; `skipped` counts micro-batches whose gradient was not finite.
    """

    def __init__(self, n: int, m: int, width: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.n, self.m, self.width, self.seed = n, m, min(width, n, m), seed
        self.q = torch.zeros(n, self.width, device=device)
        self.z = torch.zeros(m, self.width, device=device)
        self.probed = torch.zeros(n, PROBES, device=device)  # G P, linear in G
        self.tokens = self.updates = self.skipped = 0
        # The refining pass: its row basis P (None before it), Y = G P and Z = GᵀQ.
        self.row_basis: Tensor | None = None
        self.refined_y = self.refined_z = self.q.new_zeros(0)
        self.refined_updates = 0

    @property
    def nbytes(self) -> int:
        """What the sketch occupies between updates."""
        tensors = (self.q, self.z, self.probed, self.refined_y, self.refined_z, self.row_basis)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def has_gradient(self) -> bool:
        """Whether anything but zeros was added."""
        return bool(self.z.any())

    def update(self, x: Tensor, dy: Tensor, weight: float = 1.0) -> None:
        """Adds weight·dYᵀX for x (T, m), dy (T, n) of any float dtype. Nothing of size n×m is formed."""
        if x.shape[0] == 0:
            return
        probed = native.factored_product(x, dy, probes(self.m, self.device), weight)
        if not bool(torch.isfinite(probed).all()):
            self.skipped += 1
            return
        if self.row_basis is not None:
            self.refined_y += native.factored_product(x, dy, self.row_basis, weight)
            self.refined_z += native.factored_product(dy, x, self.q, weight)
            self.refined_updates += 1
            return
        if not native.sketch_update(self.q, self.z, self._start(), x, dy, weight):
            self.skipped += 1
            return
        self.probed += probed
        self.tokens += x.shape[0]
        self.updates += 1

    def _start(self) -> Tensor | None:
        """None where Q is full, else Z with random directions where it has none: at first, and while it holds fewer
        tokens than columns."""
        sizes = self.z.abs().amax(dim=0)
        largest = sizes.max()
        if bool(sizes.min() > NEGLIGIBLE * largest):
            return None
        random = self._random(self.width, stream=2 + self.updates)
        return self.z / torch.where(largest > 0, largest, 1.0) + NEGLIGIBLE * random

    def _random(self, columns: int, stream: int) -> Tensor:
        """(m, columns) Gaussian, drawn on the host: the same on every device and every rank."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + stream)
        return torch.randn(self.m, columns, generator=generator).to(self.device)

    def scale_by(self, factor: float) -> None:
        """Multiplies the gradient added so far (in a refining pass, in that pass) by a number."""
        for linear in (self.refined_y, self.refined_z) if self.refining else (self.z, self.probed):
            linear.mul_(factor)

    # Refining: a second pass with fixed bases. It is linear in G, so ranks simply add.

    @property
    def refining(self) -> bool:
        return self.row_basis is not None

    def start_refining(self, bases: StreamingSketch | None = None) -> None:
        """From here on `update` accumulates G P and GᵀQ for the bases found so far, or for another sketch's."""
        if bases is not None:
            self.z = self.z @ (self.q.t() @ bases.q.to(self.device))  # what Q Zᵀ holds of G, in the other's columns
            self.q, self.width = bases.q.to(self.device, copy=True), bases.width
        elif self.refined_updates:  # a further round starts from what the last one found
            self.q, self.z = self.factors()
        self.row_basis = native.orthonormal(self.z if bases is None else bases.z.to(self.device))
        self.forget_refined()

    def forget_refined(self) -> None:
        """Empties the sums of the refining pass."""
        self.refined_y, self.refined_z = torch.zeros_like(self.q), torch.zeros_like(self.z)
        self.refined_updates = 0

    # Results.

    def svd(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (n, rank), S (rank,) descending, Vh (rank, m) of the sketched gradient, float32."""
        return next(svd_of_each([self], rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Q (n, c) orthonormal and Z (m, c) with G ≈ Q Zᵀ. After a refining pass the bases are one power iteration
        better, with the core between them from least squares (Tropp et al. 2017, algorithm 7)."""
        if not self.refined_updates:
            return self.q, self.z
        (core,) = _cores([self])
        left, right = self.bases()
        return left, (right.double() @ core.t()).float()

    def bases(self) -> tuple[Tensor, Tensor]:
        """Orthonormal bases (n, c) and (m, c) between which the sketch of G lies, float32."""
        if self.refined_updates:
            return native.orthonormal(self.refined_y), native.orthonormal(self.refined_z)
        return self.q, native.orthonormal(self.z)

    def squared_norm(self) -> float:
        """An estimate of ‖G‖_F²: what Q holds, exactly, and what it misses, from the probes."""
        held = self.refined_z if self.refined_updates else self.z
        residual = (self.probed - self.q @ (self.q.t() @ self.probed)).double()
        return float(held.double().square().sum() + residual.square().sum() / PROBES)

    def merge(self, other: StreamingSketch) -> None:
        """Adds another rank's sketch of the same layer: c columns of each, brought back to c by QR and a small SVD."""
        self.set_product(
            torch.cat((self.q, other.q.to(self.device)), dim=1), torch.cat((self.z, other.z.to(self.device)), dim=1)
        )
        self.probed = self.probed + other.probed.to(self.device)
        self.tokens += other.tokens
        self.updates += other.updates
        self.skipped += other.skipped

    def set_product(self, q: Tensor, z: Tensor) -> None:
        """Sets Q and Z from the c leading singular triplets of q zᵀ, for q (n, k) and z (m, k) of any k."""
        q_basis, q_core = torch.linalg.qr(q.double())
        z_basis, z_core = torch.linalg.qr(z.double())
        u, s, vh = torch.linalg.svd(q_core @ z_core.t())
        self.q = (q_basis @ u[:, : self.width]).float()
        self.z = (z_basis @ (vh[: self.width].t() * s[: self.width])).float()


def svd_of_each(sketches: Sequence[StreamingSketch], rank: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each sketch's U (n, rank), S (rank,) descending, Vh (rank, m), in the order of the sketches.

    The SVDs proper are of c×c cores, whatever n and m: all layers in one launch. U and Vh are made when asked for.
    """
    alike: dict[tuple[int, bool, torch.device], list[int]] = {}
    for index, sketch in enumerate(sketches):
        alike.setdefault((sketch.width, bool(sketch.refined_updates), sketch.device), []).append(index)
    small: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for indices in alike.values():
        u, s, vh = native.svd(_cores([sketches[index] for index in indices]))
        for place, index in enumerate(indices):
            small[index] = u[place, :, :rank], s[place, :rank], vh[place, :rank]
    for index, sketch in enumerate(sketches):
        left, right = sketch.bases()
        u, s, vh = small.pop(index)
        yield (left.double() @ u).float(), s.float(), (vh @ right.t().double()).float()


def _cores(sketches: Sequence[StreamingSketch]) -> Tensor:
    """C (batch, c, c) float64 with G ≈ left C rightᵀ between each sketch's bases. All refined, or none of them."""
    products, projections = [], []
    for sketch in sketches:
        left, right = sketch.bases()
        held = sketch.refined_z if sketch.refined_updates else sketch.z
        products.append(held.t().double() @ right.double())
        projections.append(sketch.q.t().double() @ left.double())
    core = torch.stack(products)  # Qᵀ G right
    if not sketches[0].refined_updates:
        return core  # left is Q
    # QᵀG = (Qᵀ left) C rightᵀ. The pseudo-inverse leaves out the directions of Q in which G has nothing.
    u, s, vh = native.svd(torch.stack(projections))
    inverse = torch.where(s > 1e-4 * s[:, :1], 1.0 / s, 0.0)
    return vh.mT @ (inverse.unsqueeze(-1) * (u.mT @ core))
