"""Tokenised batches, padded to their own longest text, in an order that every method shares."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fastlora.runtime import progress
from study.data.docstrings import Example

BUCKET_BATCHES = 8
SKETCH_SEED = 2**32  # beyond every seed of a run


class Batch(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class TokenBatches:
    """Batches of `token_ids`, padded to their own longest text. A subclass says what the labels are."""

    token_ids: list[list[int]]
    pad_id: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def label_rows(self, indices: Sequence[int], width: int) -> torch.Tensor:
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> Batch:
        width = max(len(self.token_ids[i]) for i in indices)
        input_ids = torch.full((len(indices), width), self.pad_id)
        mask = torch.zeros((len(indices), width), dtype=torch.long)
        for row, i in enumerate(indices):
            length = len(self.token_ids[i])
            input_ids[row, :length] = torch.tensor(self.token_ids[i])
            mask[row, :length] = 1
        return Batch(input_ids, mask, self.label_rows(indices, width))

    def in_order(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every example once, shortest first (the least padding), with its indices."""
        order = sorted(range(len(self)), key=lambda i: len(self.token_ids[i]))
        starts = range(0, len(order), batch_size)
        for start in progress.bar(starts, "examples, in order", len(starts), "batch"):
            indices = order[start : start + batch_size]
            yield indices, self.batch(indices)


class TokenizedExamples(TokenBatches):
    """Token ids and one label of each text, tokenised once."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any, max_length: int):
        encoded = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)
        self.token_ids = encoded["input_ids"]
        self.labels = [example.label for example in examples]
        self.pad_id = tokenizer.pad_token_id or 0

    def label_rows(self, indices: Sequence[int], width: int) -> torch.Tensor:
        return torch.tensor([self.labels[i] for i in indices])


def training_order(examples: TokenBatches, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The indices of each step's batch: shuffled epochs, with texts of like length together.

    Within a pool of a few batches the examples are sorted by length before they are dealt out, which halves the
    padding; the order of the batches is then shuffled again, so that length says nothing about the step. A short last
    batch is dropped.
    """
    generator = random.Random(seed)
    order: list[list[int]] = []
    while len(order) < steps:
        indices = list(range(len(examples)))
        generator.shuffle(indices)
        epoch: list[list[int]] = []
        pool = batch_size * BUCKET_BATCHES
        for start in range(0, len(indices), pool):
            bucket = sorted(indices[start : start + pool], key=lambda i: len(examples.token_ids[i]))
            epoch += [bucket[i : i + batch_size] for i in range(0, len(bucket) - batch_size + 1, batch_size)]
        if not epoch:
            raise ValueError(f"--batch-size {batch_size}: the training set has only {len(examples)} examples")
        generator.shuffle(epoch)
        order += epoch
    return order[:steps]
