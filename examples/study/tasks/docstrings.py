"""Task "docstrings": MiniLM-L6 and a new linear head learn which module a docstring came from. As in finetune.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from study.data import docstrings, encoder
from study.data.batches import Batch, TokenizedExamples, training_order
from study.data.encoder import SentenceClassifier
from study.settings import Settings
from study.tasks.task import PARTS, Task, dtype_name, dtype_of

EVAL_BATCH_SIZE = 64
QUICK_SHARE = 8  # one of so many texts is validated and tested on in a quick run


class DocstringsTask(Task):
    """Adapters on the encoder's linear layers, next to a head that starts at random."""

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        assert settings.model is not None and settings.max_length is not None
        self.source = encoder.find_model(settings.model)
        self.dtype = dtype_of(settings, device)
        tokenizer = encoder.load_tokenizer(self.source)
        dataset = docstrings.load()
        self.labels = dataset.labels
        kept = {part: QUICK_SHARE if settings.quick and part != "train" else 1 for part in PARTS}
        self.parts = {
            part: TokenizedExamples(getattr(dataset, part)[::share], tokenizer, settings.max_length)
            for part, share in kept.items()
        }
        texts = "\0".join(example.text for part in PARTS for example in getattr(dataset, part))
        self.facts = {
            **{part: len(examples) for part, examples in self.parts.items()},
            "texts": hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        }

    @property
    def description(self) -> str:
        name = "MiniLM-L6" if self.settings.model == encoder.DEFAULT_MODEL else self.settings.model
        counts = {part: len(examples) for part, examples in self.parts.items()}
        return (
            f"{name} ({dtype_name(self.dtype)}) and a new head learn which of {len(self.labels)} modules a docstring "
            f"came from: {counts['train']} to train on, {counts['validation']} to validate, {counts['test']} to test, "
            f"cut at {self.settings.max_length} tokens. The head is trained by AdamW at {self.settings.head_lr:g} in "
            "all."
        )

    def fresh_model(self, seed: int) -> nn.Module:
        loaded = encoder.load_encoder(self.source, self.dtype, self.device)
        torch.manual_seed(seed)
        return SentenceClassifier(loaded, loaded.config.hidden_size, len(self.labels)).to(self.device)

    def adapted(self, model: Any) -> nn.Module:
        return model.encoder

    def head(self, model: Any) -> list[nn.Parameter]:
        return list(model.head.parameters())

    def with_adapted(self, model: Any, adapted: nn.Module) -> nn.Module:
        model.encoder = adapted
        return model

    def save_rest(self, model: Any, directory: Path) -> None:
        encoder.save_head(model, self.labels, directory)

    def load_rest(self, model: Any, directory: Path) -> None:
        encoder.load_head(model, directory)

    def order(self, seed: int, steps: int) -> Sequence[Sequence[int]]:
        return training_order(self.parts["train"], self.settings.batch_size, steps, seed)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.parts["train"].batch(indices).to(self.device)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)

    def _predictions(self, model: Any, part: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for _, batch in self.parts[part].in_order(EVAL_BATCH_SIZE):
            moved = batch.to(self.device)
            yield model(moved.input_ids, moved.attention_mask), moved.labels


def load(settings: Settings, device: torch.device) -> Task:
    return DocstringsTask(settings, device)
