"""Where the smoothed importances of many layers' P, Λ and Q lie: one flat tensor for Ī, one for Ū.

A factor's numbers lie in its own memory order: first every λ, layer by layer, then the Q (r, K), then the P (N, r),
those of one shape in a row. So the state is two tensors whatever the number of layers, one pass of ATen may take all
layers of a shape at once, and the kernels need offsets only. The factors and their gradients are where the model and
autograd have them. Pure torch: ATen works from the same plan where there is no Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .segment_plan import to_device


class Factors(NamedTuple):
    """The factors of every layer, or their gradients, None where there is none."""

    q: Sequence[Tensor | None]  # (r, K), PEFT's lora_A
    p: Sequence[Tensor | None]  # (N, r), lora_B
    e: Sequence[Tensor | None]  # (r, 1), lora_E


class Run(NamedTuple):
    """Factors of one shape that lie in a row: of these layers, in this order, from `start` on."""

    factor: str  # "q" or "p"
    layers: list[int]
    shape: tuple[int, int]
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.layers) * self.shape[0] * self.shape[1]


class Tables(NamedTuple):
    """What the kernels look up, on the device."""

    layers: (
        Tensor  # (layers, 8) int64: r, K, N, first rank of all, first number of Q and of P, first tile of Q and of P
    )
    q_tiles: Tensor  # (tiles, 3) int32: layer, first rank, first column
    p_tiles: Tensor  # (tiles, 3) int32: layer, first rank, first row


class Layout:
    """The plan for layers of these sizes, each (r, K, N) with r at least 1.

    `numel` numbers in each of Ī and Ū; scores, one for every rank, in the layers' order, from `rank_starts[layer]` on.
    """

    def __init__(self, sizes: Sequence[tuple[int, int, int]]) -> None:
        self.sizes = list(sizes)
        assert all(r * max(k, n) < 2**31 for r, k, n in self.sizes), "the kernels count a factor's numbers in 32 bits"
        self.rank_starts = [0, *itertools.accumulate(r for r, _, _ in self.sizes)]
        self.total_rank = self.rank_starts.pop()
        self.starts: dict[str, list[int]] = {"e": self.rank_starts, "q": [0] * len(sizes), "p": [0] * len(sizes)}
        self._runs: list[Run] = []
        end = self.total_rank
        for factor in ("q", "p"):
            by_shape: dict[tuple[int, int], list[int]] = {}
            for layer, (r, k, n) in enumerate(self.sizes):
                by_shape.setdefault((r, k) if factor == "q" else (n, r), []).append(layer)
            for shape, layers in by_shape.items():
                self._runs.append(Run(factor, layers, shape, end))
                for layer in layers:
                    self.starts[factor][layer] = end
                    end += shape[0] * shape[1]
        self.numel = end
        self._orders: dict[tuple[str, torch.device], Tensor] = {}
        self._tables: dict[tuple[torch.device, int, int], Tables] = {}

    def shape(self, factor: str, layer: int) -> tuple[int, int]:
        r, k, n = self.sizes[layer]
        return {"q": (r, k), "p": (n, r), "e": (r, 1)}[factor]

    def view(self, flat: Tensor, factor: str, layer: int) -> Tensor:
        """A factor's own part of Ī or Ū, in its shape."""
        shape, start = self.shape(factor, layer), self.starts[factor][layer]
        return flat[start : start + shape[0] * shape[1]].view(shape)

    def runs(self, most: int | None = None) -> list[Run]:
        """Every Q and P; in parts of at most `most` numbers, or of one layer."""
        if most is None:
            return self._runs
        parts = []
        for run in self._runs:
            size = run.shape[0] * run.shape[1]
            step = max(1, most // size)
            for i in range(0, len(run.layers), step):
                parts.append(run._replace(layers=run.layers[i : i + step], start=run.start + i * size))
        return parts

    def rank_order(self, factor: str, device: torch.device) -> Tensor:
        """(total_rank,) int64: where each rank, in the layers' order, is found in the order of the factor's runs."""
        key = (factor, device)
        if key not in self._orders:
            order = [
                self.rank_starts[layer] + i
                for run in self._runs
                if run.factor == factor
                for layer in run.layers
                for i in range(self.sizes[layer][0])
            ]
            places = torch.empty(self.total_rank, dtype=torch.int64)
            places[torch.tensor(order)] = torch.arange(self.total_rank)
            self._orders[key] = to_device(places, device)
        return self._orders[key]

    def tables(self, device: torch.device, block_r: int, block_l: int) -> Tables:
        """What the kernels look up for tiles of block_r ranks by block_l columns of Q or rows of P. Sent once."""
        key = (device, block_r, block_l)
        if key not in self._tables:
            tiles: dict[str, list[tuple[int, int, int]]] = {"q": [], "p": []}
            rows = []
            for layer, (r, k, n) in enumerate(self.sizes):
                firsts = len(tiles["q"]), len(tiles["p"])
                rows.append([r, k, n, self.rank_starts[layer], *(self.starts[f][layer] for f in "qp"), *firsts])
                for factor, length in (("q", k), ("p", n)):
                    blocks = itertools.product(range(0, r, block_r), range(0, length, block_l))
                    tiles[factor] += [(layer, rank, position) for rank, position in blocks]
            self._tables[key] = Tables(
                to_device(torch.tensor(rows), device),
                *(to_device(torch.tensor(tiles[f], dtype=torch.int32), device) for f in "qp"),
            )
        return self._tables[key]


class Averages(NamedTuple):
    """Ī and Ū, flat (layout.numel,), and what they are averaged with."""

    layout: Layout
    sensitivity: Tensor
    uncertainty: Tensor
    beta1: float
    beta2: float


def addresses(weights: Factors, gradients: Factors) -> tuple[Tensor, bool]:
    """((layers, 6) int64: where Q, its gradient, P, its gradient, Λ and its gradient begin, 0 for a gradient that is
    not there; whether all are multiples of 16 bytes). On the host."""
    columns = [tensors for pair in zip(weights, gradients, strict=True) for tensors in pair]
    rows = [[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in zip(*columns, strict=True)]
    return torch.tensor(rows), all(address % 16 == 0 for row in rows for address in row)
