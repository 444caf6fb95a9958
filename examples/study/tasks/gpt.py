"""Task "gpt": a byte-level GPT, pretrained on the standard library's sources, adapted to the texts of `help()`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from study.data import byte_gpt, topics
from study.data.byte_gpt import ByteGPT, Shape
from study.data.pretraining import fit, pretrained, weights_hash
from study.settings import Settings
from study.tasks.task import PARTS, Metric, Task, shuffled_epochs

PRETRAINING = {"steps": 1200, "batch_size": 16, "lr": 3e-3, "seed": 0}
QUICK_PRETRAINING = PRETRAINING | {"steps": 2, "batch_size": 2}
QUICK_WINDOWS = 8  # validated and tested on in a quick run
EVAL_BATCH_SIZE = 32


class GptTask(Task):
    """Windows of context + 1 bytes, each predicted from its second byte on; adapters on the blocks' linear layers."""

    metric = Metric("test nats/byte", lambda scores: scores.loss, "{:.3f}")
    targets: Mapping[str, Any] = {"exclude_modules": ["head"]}

    def __init__(self, settings: Settings, device: torch.device):
        super().__init__(settings, device)
        self.shape = Shape()
        texts = topics.load()
        self.windows = {part: windows(texts[part], self.shape.context + 1).to(device) for part in PARTS}
        if settings.quick:
            for part in ("validation", "test"):
                self.windows[part] = self.windows[part][:QUICK_WINDOWS]
        self.weights = pretrain(settings, self.shape, device)
        self.facts = {
            **{part: len(found) for part, found in self.windows.items()},
            "texts": hashlib.sha256(b"\0".join(texts[part] for part in PARTS)).hexdigest()[:16],
            "weights": weights_hash(self.weights),
        }

    @property
    def description(self) -> str:
        kilobytes = {part: f"{found.numel() / 1000:.0f} kB" for part, found in self.windows.items()}
        count = sum(tensor.numel() for tensor in self.weights.values())
        return (
            f"A byte-level GPT ({count / 1e6:.2f}M parameters) pretrained on the standard library's sources, adapted "
            f"to the texts of pydoc_data.topics: {kilobytes['train']} to train on, {kilobytes['validation']} to "
            f"validate, {kilobytes['test']} to test, in windows of {self.shape.context + 1} bytes."
        )

    def fresh_model(self, seed: int) -> nn.Module:
        model = ByteGPT(self.shape)
        model.load_state_dict(self.weights)
        return model.to(self.device).eval()

    def order(self, seed: int, steps: int) -> Sequence[Sequence[int]]:
        return shuffled_epochs(len(self.windows["train"]), self.settings.batch_size, steps, seed)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return self.windows["train"][torch.tensor(indices, device=self.device)]

    def loss(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(*byte_gpt.next_byte(model, batch))

    def _predictions(self, model: Any, part: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.windows[part].split(EVAL_BATCH_SIZE):
            yield byte_gpt.next_byte(model, batch)


def load(settings: Settings, device: torch.device) -> Task:
    return GptTask(settings, device)


def windows(text: bytes, length: int) -> torch.Tensor:
    """(n, length): the text cut in pieces, one byte of overlap, so that every byte but the first is predicted once; a
    short last piece is dropped.
    """
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, length, length - 1).contiguous()


def pretrain(settings: Settings, shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
    """The pretrained weights, from the file under --out or by pretraining."""
    options: dict[str, Any] = QUICK_PRETRAINING if settings.quick else PRETRAINING
    corpus = topics.sources()
    facts = {**options, **vars(shape), "device": device.type, "corpus": hashlib.sha256(corpus).hexdigest()}

    def train() -> nn.Module:
        torch.manual_seed(options["seed"])
        model = ByteGPT(shape).to(device)
        text = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
        generator = torch.Generator().manual_seed(options["seed"])

        def losses() -> Iterator[torch.Tensor]:
            while True:
                starts = torch.randint(len(text) - shape.context, (options["batch_size"], 1), generator=generator)
                batch = text[starts + torch.arange(shape.context + 1)].long().to(device)
                yield nn.functional.cross_entropy(*byte_gpt.next_byte(model, batch))

        return fit(model, losses(), options["steps"], options["lr"], "pretraining the byte-level GPT")

    return pretrained(settings.pretrained_models / "byte_gpt.safetensors", facts, train)
