"""Which sequence of a batch uses which adapter, for a whole model's forward: what `adapter_names` sets and layers ask.

Recomputing a checkpoint happens in the backward pass, when the block that said the names is long over. Autograd numbers
its nodes as they are made; a block remembers the numbers that were given within it, and a layer that is called during a
backward pass takes the names of the block in which the node that is running was made. A node made by a recomputation
(a reentrant checkpoint within a reentrant one) has a number of its own: there, the backward pass must run within the
block too.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.segment_plan import BASE, Segments

BASE_NAME = "__base__"  # PEFT's word for no adapter
_MOST_SORTED = 64  # shapes of one batch: prompts, then single tokens
_REMEMBERED = 1024  # blocks of a layer whose backward pass may still come


class MixedBatch:
    """The adapters' names, one for each sequence; `num_beams` of them follow each other for a name where the model has
    repeated its input."""

    def __init__(self, names: Sequence[str], num_beams: int = 1) -> None:
        self.names = tuple(names)
        self.num_beams = num_beams
        self._segments: dict[tuple[int, int, tuple[str, ...]], tuple[tuple[str, ...], Segments]] = {}

    def repeated(self, size: int) -> list[str]:
        """A name for each of `size` sequences. Raises ValueError where they are neither the batch nor its beams."""
        if size == len(self.names):
            return list(self.names)
        if size == len(self.names) * self.num_beams:
            return [name for name in self.names for _ in range(self.num_beams)]
        beams = f" or, with beams, {len(self.names) * self.num_beams}" if self.num_beams > 1 else ""
        raise ValueError(
            f"fastlora: adapter_names: a layer was given an input of {size} sequences, want {len(self.names)}{beams}: "
            "one for each name"
        )

    def segments(self, x: Tensor, known: Container[str]) -> tuple[tuple[str, ...], Segments]:
        """(names, segments) of x (batch, ..., K) for a layer that knows these adapters, one name for each segment; the
        rest of the batch runs the layer's base."""
        tokens = math.prod(x.shape[1:-1])
        order = tuple(name for name in dict.fromkeys(self.names) if name in known)
        key = len(x), tokens, order
        if key not in self._segments:
            if len(self._segments) >= _MOST_SORTED:
                self._segments.clear()
            numbers = {name: number for number, name in enumerate(order)}
            segments = Segments([numbers.get(name, BASE) for name in self.repeated(len(x))], tokens)
            self._segments[key] = tuple(order[number] for number in segments.adapters), segments
        return self._segments[key]

    def forget(self) -> None:
        """Lets go of what was sorted, tensors on the device among it. Asking again sorts again."""
        self._segments.clear()


@lru_cache(maxsize=64)
def of_names(names: tuple[str, ...]) -> MixedBatch:
    """One batch for equal names: PEFT passes them to every layer again."""
    return MixedBatch(names)


class _Block:
    """A `with` block: the numbers of the autograd nodes made in it, and its batch."""

    def __init__(self, batch: MixedBatch) -> None:
        self.batch = batch
        self.start = torch.autograd._get_sequence_nr()
        self.end: int | None = None  # while it lasts

    def made(self, number: int) -> bool:
        return self.start <= number and (self.end is None or number < self.end)


_blocks: weakref.WeakKeyDictionary[nn.Module, deque[_Block]] = weakref.WeakKeyDictionary()


def current(layer: Any) -> MixedBatch | None:
    """The batch that this call of the layer belongs to, if any."""
    if torch.compiler.is_compiling() or not _blocks:
        return layer.mixed_batch
    node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
    if node is None:
        return layer.mixed_batch
    number = node._sequence_nr()
    for block in reversed(_blocks.get(layer, ())):
        if block.made(number):
            return block.batch
    return None


@contextmanager
def running(layers: Iterable[Any], batch: MixedBatch) -> Iterator[None]:
    """Within it these layers run the batch's adapters. Blocks may be nested; the inner one counts."""
    layers = list(layers)
    before = [layer.mixed_batch for layer in layers]
    block = _Block(batch)
    for layer in layers:
        remembered = _blocks.setdefault(layer, deque(maxlen=_REMEMBERED))
        for old in remembered:
            old.batch.forget()
        remembered.append(block)
        layer.mixed_batch = batch
    try:
        yield
    finally:
        block.end = torch.autograd._get_sequence_nr()
        for layer, former in zip(layers, before, strict=True):
            if former is None:
                del layer.mixed_batch
            else:
                layer.mixed_batch = former
            if block.end == block.start:  # no node was made: there is no backward pass
                _blocks[layer].remove(block)
                if not _blocks[layer]:
                    del _blocks[layer]
