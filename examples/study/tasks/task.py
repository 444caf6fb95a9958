"""What learners and reports need to know of a task: data, a pretrained model, a loss. Each module here has one."""

from __future__ import annotations

import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from study import processes
from study.data.batches import SKETCH_SEED
from study.learner import set_training
from study.settings import Settings

PARTS = ("train", "validation", "test")


class Scores(NamedTuple):
    """Means over a part of the data."""

    loss: float
    accuracy: float


class Metric(NamedTuple):
    """What the test part is summarised by, and how it is written in a table."""

    name: str
    of: Callable[[Scores], float]
    form: str
    unit: str = ""


ACCURACY = Metric("test accuracy", lambda scores: 100 * scores.accuracy, "{:.1f}", " %")


class Task(ABC):
    """`targets` are the arguments of `fastlora.patch` that say which layers of `adapted(model)` get adapters.

    `facts` are what trials are made on: two comparisons with the same facts and settings may share their trials.
    """

    metric: Metric = ACCURACY
    targets: Mapping[str, Any] = {}
    facts: dict[str, Any]

    def __init__(self, settings: Settings, device: torch.device):
        self.settings: Any = settings
        self.device = device

    @property
    @abstractmethod
    def description(self) -> str:
        """A sentence or two for the caption: the model, the data and their sizes."""

    @abstractmethod
    def fresh_model(self, seed: int) -> nn.Module:
        """The pretrained model on the device; what of it starts at random comes from the seed."""

    def adapted(self, model: Any) -> nn.Module:
        """The part of the model that a contestant trains."""
        return model

    def head(self, model: Any) -> list[nn.Parameter]:
        """What starts at random, and is trained by the same optimiser at the same rate in every contestant."""
        return []

    def embeddings(self, adapted: Any) -> nn.Module:
        """The layer whose output is the first that depends on weights."""
        return adapted.get_input_embeddings()

    @abstractmethod
    def order(self, seed: int, steps: int) -> Sequence[Sequence[int]]:
        """The indices of each step's training examples, the same for every contestant."""

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Any:
        """Training examples on the device."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The mean loss of a batch."""

    def weight(self, batch: Any) -> int:
        """How many terms `loss` is the mean of."""
        return len(batch[0])

    def shares(self, indices: Sequence[int]) -> list[tuple[float, Any]]:
        """This process's micro-batches of a step, each with its share of the whole batch's mean loss."""
        if processes.WORLD * self.settings.accumulate == 1:
            return [(1.0, self.batch(indices))]
        batches = [self.batch(part) for part in processes.own(indices, self.settings.accumulate)]
        terms = processes.total(float(sum(map(self.weight, batches))))
        return [(self.weight(batch) / terms, batch) for batch in batches]

    def tokens(self, batch: Any) -> int | None:
        """How many tokens a batch has, where it has tokens."""
        return None

    def scores(self, model: nn.Module, part: str) -> Scores:
        """Mean loss and accuracy over all of a part, without the adapters' dropout."""
        set_training(model, False)
        losses: list[torch.Tensor] = []
        right: list[torch.Tensor] = []
        with torch.no_grad():  # inference tensors could not be gathered from shards
            for logits, labels in self._predictions(model, part):
                losses.append(nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu())
                right.append((logits.argmax(-1) == labels).double().cpu())
        return Scores(torch.cat(losses).mean().item(), torch.cat(right).mean().item())

    def samples(self, model: Any) -> list[str]:
        """What the model writes for the first few held-out examples; none where it does not write."""
        return []

    def questions(self) -> list[tuple[str, str]]:
        """(what is asked, the right answer) of `samples`."""
        return []

    def outputs(self, model: nn.Module) -> torch.Tensor:
        """Logits (n, classes) of a part of the test data, on the CPU."""
        set_training(model, False)
        with torch.no_grad():
            return next(iter(self._predictions(model, "test")))[0].float().cpu()

    def with_adapted(self, model: Any, adapted: nn.Module) -> nn.Module:
        """`model` with another module in the place of `adapted(model)`."""
        return adapted

    def save_rest(self, model: Any, directory: Path) -> None:
        """Writes what was trained apart from the adapters, next to the adapter's files."""
        return

    def load_rest(self, model: Any, directory: Path) -> None:
        """Reads what `save_rest` wrote."""
        return

    @abstractmethod
    def _predictions(self, model: Any, part: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """(logits (n, classes), labels (n,)) of a part, in pieces."""

    def gradient_batches(self, seed: int) -> list[Any]:
        """The training batches whose gradient LoRA-GA looks at, drawn apart from those of a run with this seed; each
        process's own micro-batches, as `shares` has them.
        """
        return [self.shares(indices) for indices in self.order(seed + SKETCH_SEED, self.settings.sketch_batches)]

    def backward_passes(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Backward passes of equal weight, in eval mode; their gradients add up to that of the mean over batches."""
        set_training(model, False)
        for shares in batches:
            for share, batch in shares:
                (self.loss(model, batch) * (share / len(batches))).backward()


def dtype_of(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype of a task's pretrained weights."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype or "float32")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_task(settings: Settings, device: torch.device) -> Task:
    """The task that the settings name, its data read and its model pretrained."""
    module = importlib.import_module(f"study.tasks.{settings.task}")
    return module.load(settings, device)


def shuffled_epochs(examples: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The indices of each step's batch: every example once per epoch; a short last batch is dropped."""
    if batch_size > examples:
        raise ValueError(f"--batch-size {batch_size}: the training set has only {examples} examples")
    generator = random.Random(seed)
    order: list[list[int]] = []
    while len(order) < steps:
        indices = list(range(examples))
        generator.shuffle(indices)
        order += [indices[i : i + batch_size] for i in range(0, examples - batch_size + 1, batch_size)]
    return order[:steps]
