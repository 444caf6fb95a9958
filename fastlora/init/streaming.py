"""Sketches of G = Σ wᵢ dYᵢᵀ Xᵢ from one pass over the micro-batches, G never formed.

`StreamingSketch`: Q (n, c) orthonormal and Z = GᵀQ (m, c), so that G ≈ Q Zᵀ. A micro-batch multiplies five times with
the running sum

    G⁺ V = Q (Zᵀ V) + w dYᵀ (X V)        G⁺ᵀ U = Z (Qᵀ U) + w Xᵀ (dY U)

starting from G⁺ᵀ Q (Halko, Martinsson and Tropp 2011); the sum is compressed again after each micro-batch, as frequent
directions does with rows (Ghashami et al. 2016). What is cut off is lost: where micro-batches cancel, it is what stays.
`SignedSketch` therefore keeps a linear sketch next to it, and `ComponentSketch` sums Gᵢ Gᵢᵀ, which cannot cancel.
docs/details/lora_ga_measured.md has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import native
from ..linalg.lowrank import product_svd
from ..linalg.operators import outside_autocast

PROBES = 8  # random directions that measure what the sketch misses
# Columns of Z smaller than this share of the largest are rounding: random directions take their place.
NEGLIGIBLE = 1e-6


@lru_cache(maxsize=64)
def gaussian(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Drawn on the host: one for all layers of a size, the same on every device and every rank."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(device)


class Held(NamedTuple):
    """What a sketch knows of G: bases left (n, c) and right (m, k), and product = projection·C, float64, for the core C
    between them (projection None: the core itself), of whose directions those count that the projection leaves more of
    than `cut` times the largest."""

    left: Tensor
    right: Tensor
    product: Tensor
    projection: Tensor | None = None
    cut: float = 0.0


class Measured(NamedTuple):
    """‖G‖² and the share of it in the left singular vectors found, as random probes measure both, whatever the basis;
    `drift`: how far G is there from what the sketch takes it for, as a share of it: near 0, or micro-batches cancelled.
    """

    squared_norm: float
    captured: float
    drift: float


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

    # What is linear in G, or makes it up, and travels between processes and files.
    STATE: tuple[str, ...] = ("q", "z", "probed")

    @property
    def _probes(self) -> Tensor:
        return gaussian(self.m, PROBES, 1, self.device)

    @property
    def nbytes(self) -> int:
        """What the sketch occupies between updates."""
        tensors = [getattr(self, name) for name in (*self.STATE, "refined_y", "refined_z", "row_basis")]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def has_gradient(self) -> bool:
        """Whether anything but zeros was added."""
        return bool(self.z.any())

    @outside_autocast
    def update(self, x: Tensor, dy: Tensor, weight: float = 1.0, number: int = 0) -> bool:
        """Adds weight·dYᵀX for x (T, m), dy (T, n) of any float dtype, without forming it; False where it did not.
        `number`: of the backward pass."""
        if x.shape[0] == 0:
            return False
        probed = native.factored_product(x, dy, self._probes, weight)
        if not bool(torch.isfinite(probed).all()):
            self.skipped += 1
            return False
        if self.row_basis is not None:
            self.refined_y += native.factored_product(x, dy, self.row_basis, weight)
            self.refined_z += native.factored_product(dy, x, self.q, weight)
            self.refined_updates += 1
            return True
        if not native.sketch_update(self.q, self.z, self._start(), x, dy, weight):
            self.skipped += 1
            return False
        self.probed += probed
        self.tokens += x.shape[0]
        self.updates += 1
        return True

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
        for name in ("refined_y", "refined_z") if self.refining else self.STATE:
            if name != "q":
                getattr(self, name).mul_(factor)

    # Refining: a second pass with fixed bases. It is linear in G, so ranks simply add.

    @property
    def refining(self) -> bool:
        return self.row_basis is not None

    @outside_autocast
    def start_refining(self, bases: StreamingSketch | None = None) -> None:
        """From here on `update` accumulates G P and GᵀQ for the bases found so far, or for another sketch's."""
        if bases is not None:
            self.z = self.z @ (self.q.t() @ bases.q.to(self.device))  # what Q Zᵀ holds of G, in the other's columns
            self.q, self.width = bases.q.to(self.device, copy=True), bases.width
        else:  # a further round starts from what the last one found
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
        """Q (n, c) orthonormal and Z (m, c) with G ≈ Q Zᵀ."""
        held = self.held()
        if held.left is self.q:
            return self.q, self.z
        (core,) = _cores([held])
        return held.left, (held.right.double() @ core.t()).float()

    def held(self) -> Held:
        """After a refining pass the bases are one power iteration better, with the core between them from least
        squares (Tropp et al. 2017, algorithm 7): QᵀG = (Qᵀ left) C rightᵀ."""
        if not self.refined_updates:
            right = native.orthonormal(self.z)
            return Held(self.q, right, self.z.t().double() @ right.double())
        left, right = native.orthonormal(self.refined_y), native.orthonormal(self.refined_z)
        product, cosines = self.refined_z.t().double() @ right.double(), self.q.t().double() @ left.double()
        return Held(left, right, product, cosines, cut=0.5)  # Q of what cancelled has little of G

    def squared_norm(self) -> float:
        """An estimate of ‖G‖_F²."""
        return self._squared_norm(*self.factors())

    def _squared_norm(self, q: Tensor, z: Tensor) -> float:
        told = q.double() @ (z.t().double() @ self._probes.double())
        squares = z.double().square().sum()
        return float(_estimate(self.probed.double().reshape(1, -1), told.reshape(1, -1), squares))

    def measure(self, u: Tensor, s: Tensor, vh: Tensor) -> Measured:
        """How much of G the triplets of `svd` hold, from the probes, which know nothing of any basis."""
        told = s.double()[:, None] * (vh.double() @ self._probes.double())
        seen = u.t().double() @ self.probed.double()
        squared = self.squared_norm()
        captured = float(_estimate(seen, told, s.double().square())) / squared
        drift = float((seen - told).square().sum() / seen.square().sum().clamp_min(1e-300))
        return Measured(squared, min(1.0, captured), drift)

    def state(self) -> dict[str, Tensor]:
        """All that a file or another process needs."""
        q, z = self.factors()
        return {"q": q, "z": z} | {key: getattr(self, key) for key in self.STATE[2:]}

    def merge(self, other: StreamingSketch) -> None:
        """Adds another rank's sketch of the same layer: c columns of each, brought back to c by QR and a small SVD."""
        self.set_product(
            torch.cat((self.q, other.q.to(self.device)), dim=1), torch.cat((self.z, other.z.to(self.device)), dim=1)
        )
        for name in self.STATE[2:]:
            setattr(self, name, getattr(self, name) + getattr(other, name).to(self.device))
        self.tokens += other.tokens
        self.updates += other.updates
        self.skipped += other.skipped

    def set_product(self, q: Tensor, z: Tensor) -> None:
        """Sets Q and Z from the c leading singular triplets of q zᵀ, for q (n, k) and z (m, k) of any k."""
        u, s, vh = product_svd(q, z.t())
        self.q, self.z = u[:, : self.width].float(), (vh[: self.width].t() * s[: self.width]).float()


class SignedSketch(StreamingSketch):
    """For micro-batches that cancel: a linear sketch Y = GΩ (n, c) and W = GᵀΨ (m, 2c) next to the streaming one, from
    which no sum is ever cut (Tropp et al. 2017). Of the two the one that the probes find nearer to G counts."""

    STATE = (*StreamingSketch.STATE, "sum_y", "sum_w")

    def __init__(self, n: int, m: int, width: int, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__(n, m, width, seed, device)
        self.sum_y, self.sum_w = self.q.new_zeros(n, self.width), self.q.new_zeros(m, min(2 * self.width, n))

    @property
    def _left_tests(self) -> Tensor:
        return gaussian(self.n, self.sum_w.shape[1], 3, self.device)

    def update(self, x: Tensor, dy: Tensor, weight: float = 1.0, number: int = 0) -> bool:
        added = super().update(x, dy, weight, number)
        if added and not self.refining:
            self.sum_y += native.factored_product(x, dy, gaussian(self.m, self.width, 2, self.device), weight)
            self.sum_w += native.factored_product(dy, x, self._left_tests, weight)
        return added

    def held(self) -> Held:
        streamed = super().held()
        if self.refined_updates or not self.sum_y.any():
            return streamed
        left = native.orthonormal(self.sum_y)
        right = _leading_rows(self.sum_w, self.width)
        projection = self._left_tests.t().double() @ left.double()
        linear = Held(left, right, self.sum_w.t().double() @ right.double(), projection, cut=1e-3)
        return min(streamed, linear, key=self._residual)

    def _residual(self, held: Held) -> float:
        (core,) = _cores([held])
        told = held.left.double() @ (core @ (held.right.t().double() @ self._probes.double()))
        return float((self.probed - told).norm())


class ComponentSketch(StreamingSketch):
    """The principal components of several gradients Gᵢ, one a backward pass: the leading eigenvectors of Σ GᵢGᵢᵀ and
    Σ GᵢᵀGᵢ, which cannot cancel. `left` L (n, c) and `right` R (m, c) with L Lᵀ and R Rᵀ near these sums; Q and Z hold
    the gradient of the pass that runs. `size`: √Σ‖Gᵢ‖²."""

    STATE = (*StreamingSketch.STATE, "left", "right", "size")

    def __init__(self, n: int, m: int, width: int, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__(n, m, width, seed, device)
        self.left, self.right = torch.zeros_like(self.q), torch.zeros_like(self.z)
        self.size = self.q.new_zeros(1)
        self._number = 0

    @property
    def has_gradient(self) -> bool:
        return super().has_gradient or bool(self.left.any())

    def update(self, x: Tensor, dy: Tensor, weight: float = 1.0, number: int = 0) -> bool:
        if number != self._number:
            self.fold()
            self._number = number
        return super().update(x, dy, weight, number)

    @outside_autocast
    def fold(self) -> None:
        """Ends a pass: G Gᵀ = Q(ZᵀZ)Qᵀ and GᵀG = Z Zᵀ go to the sums."""
        if not self.z.any():
            return
        self.size = torch.hypot(self.size, self.size.new_tensor(math.sqrt(self._squared_norm(self.q, self.z))))
        _, s, vh = native.svd(self.z.double())
        self.left = _leading_columns(torch.cat((self.left, self.q @ (vh.mT * s).float()), dim=1), self.width)
        self.right = _leading_columns(torch.cat((self.right, self.z), dim=1), self.width)
        for part in (self.q, self.z, self.probed):
            part.zero_()

    def scale_by(self, factor: float) -> None:
        self.fold()
        self.left, self.right, self.size = self.left * factor, self.right * factor, self.size * factor

    def merge(self, other: StreamingSketch) -> None:
        assert isinstance(other, ComponentSketch)
        for sketch in (self, other):
            sketch.fold()
        self.left, self.right = (
            _leading_columns(torch.cat((mine, theirs.to(self.device)), dim=1), self.width)
            for mine, theirs in ((self.left, other.left), (self.right, other.right))
        )
        self.size = torch.hypot(self.size, other.size.to(self.device))

    def state(self) -> dict[str, Tensor]:
        self.fold()
        return {key: getattr(self, key) for key in self.STATE}

    def held(self) -> Held:
        self.fold()
        left, right = native.orthonormal(self.left), native.orthonormal(self.right)
        return Held(left, right, (left.t() @ self.left).double().diagonal().abs().diag())

    def squared_norm(self) -> float:
        """Σ‖Gᵢ‖²."""
        self.fold()
        return float(self.size.double().square())

    def measure(self, u: Tensor, s: Tensor, vh: Tensor) -> Measured:
        squared = self.squared_norm()
        return Measured(squared, min(1.0, float(s.double().square().sum()) / squared), 0.0)

    def start_refining(self, bases: StreamingSketch | None = None) -> None:
        raise ValueError('GradientSketch.refine: accumulate: got "components", which has no refining pass; want "sum"')


SKETCHES = {"sum": StreamingSketch, "signed": SignedSketch, "components": ComponentSketch}


def _estimate(seen: Tensor, told: Tensor, squares: Tensor) -> Tensor:
    """An estimate of ‖M‖² from M's rows times random probes, for a matrix near H, whose rows' squares are known, times
    the same: α²‖H‖² + ‖(M − αH)P‖²/PROBES a row, with the α of least squares: exact where M is H, and without H's part
    where M has nothing of it."""
    scale = (seen * told).sum(1) / told.square().sum(1).clamp_min(1e-300)
    rest = (seen - scale[:, None] * told).square().sum(1) / PROBES
    return (scale.square() * squares + rest).sum()


def _leading_columns(matrix: Tensor, width: int) -> Tensor:
    """M′ (n, width), its columns orthogonal and the longest first, with M′M′ᵀ nearest to M Mᵀ."""
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide.t() @ wide)
    return (wide @ vectors.flip(1)[:, :width]).float()


def _leading_rows(matrix: Tensor, width: int) -> Tensor:
    return native.orthonormal(_leading_columns(matrix, width))


def svd_of_each(sketches: Sequence[StreamingSketch], rank: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each sketch's U (n, rank), S (rank,) descending, Vh (rank, m), in the order of the sketches.

    The SVDs proper are of c×c cores, whatever n and m: all layers in one launch. U and Vh are made when asked for.
    """
    alike: dict[tuple, list[int]] = {}
    held = [sketch.held() for sketch in sketches]
    for index, one in enumerate(held):
        alike.setdefault((one.product.shape, one.cut, one.left.device), []).append(index)
    small: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for indices in alike.values():
        u, s, vh = native.svd(_cores([held[index] for index in indices]))
        for place, index in enumerate(indices):
            small[index] = u[place, :, :rank], s[place, :rank], vh[place, :rank]
    for index, one in enumerate(held):
        u, s, vh = small.pop(index)
        yield (one.left.double() @ u).float(), s.float(), (vh @ one.right.t().double()).float()


def _cores(held: Sequence[Held]) -> Tensor:
    """C (batch, c, k) float64 with G ≈ left C rightᵀ; all of one cut."""
    product = torch.stack([one.product for one in held])
    projections = [one.projection for one in held if one.projection is not None]
    if not projections:
        return product
    u, s, vh = native.svd(torch.stack(projections))
    inverse = torch.where(s > held[0].cut * s[:, :1], 1.0 / s, 0.0)
    return vh.mT @ (inverse.unsqueeze(-1) * (u.mT @ product))
