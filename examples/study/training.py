"""The training loop: several methods, the same batches, their steps timed one by one."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from study.adapting import set_training
from study.data.batches import Batch, TokenizedExamples
from study.data.encoder import SentenceClassifier
from study.memory import peak_growth, tensor_bytes
from study.methods import title
from study.progress import Progress
from study.schedule import share_of_peak
from study.settings import Settings

UNTIMED_STEPS = 3  # the first steps of a method pay for page faults, and on a GPU for compilation
EVAL_BATCH_SIZE = 64


class Run:
    """One method's model, optimizer and history."""

    def __init__(self, method: str, classifier: SentenceClassifier, settings: Settings):
        self.method, self.title = method, title(method, settings)
        self.classifier = classifier
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.peak_bytes: int | None = None
        encoder_lr = settings.full_lr if method == "full" else settings.lr
        groups = [
            {"params": list(classifier.head.parameters()), "lr": settings.head_lr},
            {"params": [p for p in classifier.encoder.parameters() if p.requires_grad], "lr": encoder_lr},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: share_of_peak(step, settings.steps)
        )

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.classifier.parameters() if parameter.requires_grad)

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.classifier(batch.input_ids, batch.attention_mask)
        loss = nn.functional.cross_entropy(logits, batch.labels)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def timed_step(self, batch: Batch, device: torch.device) -> None:
        _synchronize(device)
        start = time.perf_counter()
        loss = self.step(batch)
        _synchronize(device)
        self.step_seconds.append(time.perf_counter() - start)
        self.losses.append(loss)

    def measured_step(self, batch: Batch, device: torch.device) -> None:
        """A step like any other, under the memory profiler; its time is not counted (NaN)."""
        self.optimizer.zero_grad(set_to_none=True)  # the profiler does not see old gradients go
        owned = tensor_bytes(self._owned_tensors())
        self.peak_bytes = owned + peak_growth(lambda: self.losses.append(self.step(batch)), device)
        self.step_seconds.append(float("nan"))

    def _owned_tensors(self) -> Iterator[torch.Tensor]:
        yield from self.classifier.parameters()
        yield from self.classifier.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def timed_seconds(self) -> list[float]:
        """The step times that count: not the first few, nor the one spent under the memory profiler."""
        return [seconds for seconds in self.step_seconds[UNTIMED_STEPS:] if seconds == seconds]

    def final_loss(self, window: int = 20) -> float | None:
        """The mean training loss of the last steps."""
        return statistics.fmean(self.losses[-window:]) if self.losses else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def predict(classifier: SentenceClassifier, examples: TokenizedExamples, device: torch.device) -> torch.Tensor:
    """The logits (examples, classes) in fp32 on the CPU, in the examples' order."""
    set_training(classifier, False)
    rows: list[torch.Tensor] = []
    order: list[int] = []
    for indices, batch in examples.in_order(EVAL_BATCH_SIZE):
        moved = batch.to(device)
        rows.append(classifier(moved.input_ids, moved.attention_mask).float().cpu())
        order += indices
    return torch.cat(rows)[torch.tensor(order).argsort()]


def accuracy(logits: torch.Tensor, examples: TokenizedExamples) -> float:
    return (logits.argmax(-1) == torch.tensor(examples.labels)).double().mean().item()


class CtrlC:
    """Turns the first Ctrl-C inside the block into a flag, so that the step under way is finished; the second one
    interrupts at once.
    """

    pressed = False

    def __enter__(self) -> CtrlC:
        self._previous: Any = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


def turns(runs: Sequence[Run], steps: int, interleave: bool) -> Iterator[tuple[int, Run]]:
    """(step, run) in the order of training: step by step over all methods, the first of them changing each time, or one
    after another.
    """
    if not interleave:
        yield from ((step, run) for run in runs for step in range(steps))
        return
    for step in range(steps):
        for turn in range(len(runs)):
            yield step, runs[(step + turn) % len(runs)]


def train(
    runs: Sequence[Run],
    examples: TokenizedExamples,
    validation: TokenizedExamples,
    order: Sequence[Sequence[int]],
    settings: Settings,
    device: torch.device,
) -> bool:
    """Trains every run on the batches of `order`; returns False where Ctrl-C ended it early.

    The memory profiler watches the step with the longest texts. Each step starts from a seed of its own, the same for
    all methods, so that dropout does not depend on whose turn came first.
    """
    widest = max(range(len(order)), key=lambda step: max(len(examples.token_ids[i]) for i in order[step]))
    with CtrlC() as ctrl_c, Progress(settings.steps * len(runs), "training") as progress:
        for step, run in turns(runs, settings.steps, settings.interleave):
            batch = examples.batch(order[step]).to(device)
            torch.manual_seed(settings.seed * 1_000_003 + step)
            set_training(run.classifier, True)
            if step == widest:
                run.measured_step(batch, device)
            else:
                run.timed_step(batch, device)
            if settings.eval_every and (step + 1) % settings.eval_every == 0 and not ctrl_c.pressed:
                run.validation.append((step + 1, accuracy(predict(run.classifier, validation, device), validation)))
            progress.advance(_status(runs))
            if ctrl_c.pressed:
                return False
    return True


def _status(runs: Sequence[Run]) -> str:
    """The smoothed loss of each method so far, e.g. 'peft 1.234'."""
    return ", ".join(f"{run.method} loss {run.final_loss():.3f}" for run in runs if run.losses)
