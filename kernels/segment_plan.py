"""Which row of a batch uses which adapter, sorted for the kernels: rows of one adapter are a segment.

A batch of sequences comes as x (sequences · tokens, K), with an adapter's number for each sequence, or BASE. Positions
number the adapted rows segment by segment (the sort is stable); S and dS lie in that order, so nothing of x or dY is
ever copied into it: the kernels read `rows[position]` of them.

`Segments` is worked out on the host from a Python list and sent to the device without waiting for it. Pure torch: ATen
works from the same plan where there is no Triton. `Routed` is the plan of a mixture's routed tokens, whose sizes only
the device knows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BASE = -1  # the row is left to the frozen layer


Place = tuple[torch.device, int]
_BEFORE_A_CAPTURE = -1  # in a Place, for a stream

_captured: list[Tensor] = []  # a replay of a CUDA graph copies from them, and reads the copies, again


def places_of(device: torch.device) -> tuple[Place, ...]:
    """Where to look for what was sent to the device (the first), and where to keep it: under the stream that sent it,
    since another could read too early; and for captures, which begin with everything done. What is sent during one is
    not kept: it is there only once that graph has run."""
    if device.type != "cuda":
        return ((device, 0),)
    if torch.cuda.is_current_stream_capturing():
        return ((device, _BEFORE_A_CAPTURE),)
    return (device, torch.cuda.current_stream(device).cuda_stream), (device, _BEFORE_A_CAPTURE)


def is_capturing(places: tuple[Place, ...]) -> bool:
    return places[0][1] == _BEFORE_A_CAPTURE


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor.pin_memory()
    sent = pinned.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.extend((pinned, sent))
    return sent


class Chunks(NamedTuple):
    """The positions cut into parts that lie within one segment each."""

    table: Tensor  # (count, 3) int32 on the device: segment, first position, position after the last
    count: int
    first: Tensor  # (segments + 1,) int32 on the device: the number of each segment's first chunk


class Segments:
    """The sorted batch. `adapters[i]` is the adapter of segment i, `starts[i]:starts[i + 1]` are its positions,
    `sequences[i]` its sequences in order; `tokens` rows belong to each sequence."""

    def __init__(self, adapter_ids: Sequence[int], tokens: int) -> None:
        found: dict[int, list[int]] = {}
        for sequence, adapter in enumerate(adapter_ids):
            if adapter != BASE:
                found.setdefault(adapter, []).append(sequence)
        self.batch = len(adapter_ids)
        self.tokens = tokens
        self.adapters = tuple(sorted(found))
        self.sequences = tuple(found[adapter] for adapter in self.adapters)
        starts = [0]
        for several in self.sequences:
            starts.append(starts[-1] + len(several) * tokens)
        self.starts = tuple(starts)
        self._runs: dict[int, list[slice]] = {}
        self._rows: dict[Place, Tensor] = {}
        self._indices: dict[tuple[Place, int], Tensor] = {}
        self._chunks: dict[tuple[Place, int], Chunks] = {}

    @property
    def num_positions(self) -> int:
        return self.starts[-1]

    @property
    def covers_all_rows(self) -> bool:
        return self.num_positions == self.batch * self.tokens

    @property
    def longest(self) -> int:
        return max((end - start for start, end in zip(self.starts, self.starts[1:], strict=False)), default=0)

    def runs(self, segment: int) -> list[slice]:
        """The rows of a segment as runs of neighbouring ones, in order."""
        if self.tokens == 0:
            return []
        if segment not in self._runs:
            self._runs[segment] = self._find_runs(segment)
        return self._runs[segment]

    def _find_runs(self, segment: int) -> list[slice]:
        pieces: list[slice] = []
        for sequence in self.sequences[segment]:
            first = sequence * self.tokens
            if pieces and pieces[-1].stop == first:
                pieces[-1] = slice(pieces[-1].start, first + self.tokens)
            else:
                pieces.append(slice(first, first + self.tokens))
        return pieces

    def rows(self, device: torch.device) -> Tensor:
        """(num_positions,) int32: the row of x at each position."""
        places = places_of(device)
        rows = self._rows.get(places[0])
        if rows is None:
            order = torch.tensor([sequence for several in self.sequences for sequence in several], dtype=torch.int32)
            rows = order[:, None] * self.tokens + torch.arange(self.tokens, dtype=torch.int32)
            rows = to_device(rows.reshape(-1), device)
            if not is_capturing(places):
                self._rows.update(dict.fromkeys(places, rows))
        return rows

    def index(self, segment: int, device: torch.device) -> Tensor:
        """The rows of a segment in int64, as ATen wants them."""
        key = places_of(device)[0], segment
        if key not in self._indices:
            start, end = self.starts[segment : segment + 2]
            index = self.rows(device)[start:end].long()
            if is_capturing((key[0],)):
                return index
            self._indices[key] = index
        return self._indices[key]

    def chunks(self, length: int, device: torch.device) -> Chunks:
        """Every segment cut into parts of at most `length` positions."""
        places = places_of(device)
        chunks = self._chunks.get((places[0], length))
        if chunks is None:
            table, first = [], [0]
            for segment, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
                table += [(segment, at, min(at + length, end)) for at in range(start, end, length)]
                first.append(len(table))
            flat = [number for row in table for number in row] + first
            sent = to_device(torch.tensor(flat, dtype=torch.int32), device)
            split = 3 * len(table)
            chunks = Chunks(sent[:split].view(-1, 3), len(table), sent[split:])
            if not is_capturing(places):
                self._chunks.update({(place, length): chunks for place in places})
        return chunks


class Routed:
    """P rows sorted by expert on the device: as `Segments` to the kernels, one segment an expert and one more, of rank
    0, for the rows after the last expert's. Tables have a length that no routing exceeds; what is too long is empty.

    offsets (E,): where each expert's rows end. tokens (P,): the row of x at each position; without, x is sorted too.
    """

    def __init__(self, offsets: Tensor, num_positions: int, tokens: Tensor | None = None) -> None:
        self.num_positions, self.experts = num_positions, offsets.shape[0]
        self._tokens = tokens
        self._starts = torch.cat((offsets.new_zeros(1), offsets))
        self._ends = torch.cat((offsets, offsets.new_full((1,), num_positions)))
        # Tiles of 16 rows where an expert has no more on average.
        self.longest = 16 if num_positions <= 16 * self.experts else num_positions
        self._chunks: dict[int, Chunks] = {}

    def gathering(self, tokens: Tensor) -> Routed:
        """The same plan, which shares its tables, for an x of which row `tokens[position]` is meant."""
        other = copy.copy(self)
        other._tokens = tokens
        return other

    def rows(self, device: torch.device) -> Tensor:
        """(num_positions,) int32: the row of x at each position."""
        if self._tokens is None:
            self._tokens = torch.arange(self.num_positions, dtype=torch.int32, device=device)
        return self._tokens

    def chunks(self, length: int, device: torch.device) -> Chunks:
        """Every segment cut into parts of at most `length` positions."""
        if length not in self._chunks:
            parts = (self._ends - self._starts + (length - 1)) // length
            first = torch.cat((parts.new_zeros(1), parts.cumsum(0, dtype=torch.int32)))
            count = -(-self.num_positions // length) + min(self.experts, self.num_positions)
            number = torch.arange(count, dtype=torch.int32, device=device)
            segment = torch.searchsorted(first[1:], number, right=True, out_int32=True).clamp_(max=self.experts)
            start, end = self._starts[segment], self._ends[segment]
            start = torch.minimum(start + (number - first[segment]) * length, end)
            table = torch.stack((segment, start, torch.minimum(start + length, end)), 1)
            self._chunks[length] = Chunks(table, count, first)
        return self._chunks[length]


Plan = Segments | Routed  # what the kernels take
