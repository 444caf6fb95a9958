"""The training loop of both programs: learners that see the same batches, their steps timed one by one."""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch

from study import processes
from study.curves import running_mean
from study.learner import Learner
from study.progress import Progress
from study.tasks.task import Task

SHOWN = 20  # steps that the loss next to the progress bar is the mean of


@dataclass(frozen=True)
class Validation:
    step: int
    loss: float
    accuracy: float


class Run:
    """A learner and its history. `seconds` are those of each step; one that diverged takes no more steps."""

    def __init__(self, name: str, title: str, learner: Learner):
        self.name, self.title, self.learner = name, title, learner
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[Validation] = []
        self.diverged = False

    @property
    def timed(self) -> list[float]:
        """The times that count: the first steps pay for page faults, and on a GPU for compilation."""
        return self.seconds[min(2, len(self.seconds) // 3) :]

    @property
    def history(self) -> dict[str, Any]:
        """Everything that is known of its steps, as JSON holds it."""
        scores = [asdict(found) for found in self.validation]
        return {"loss": self.losses, "step_seconds": self.seconds, "validation": scores, "diverged": self.diverged}

    @history.setter
    def history(self, known: dict[str, Any]) -> None:
        self.losses, self.seconds, self.diverged = known["loss"], known["step_seconds"], known["diverged"]
        self.validation = [Validation(**scores) for scores in known["validation"]]

    def step(self, shares: Sequence[tuple[float, Any]]) -> None:
        device = self.learner.task.device
        synchronize(device)
        start = time.perf_counter()
        loss = self.learner.step(shares)
        synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        self.diverged = not math.isfinite(loss)
        if not self.diverged:
            self.losses.append(loss)

    def validate(self, step: int) -> None:
        found = self.learner.task.scores(self.learner.model, "validation")
        self.diverged = not math.isfinite(found.loss)
        if not self.diverged:
            self.validation.append(Validation(step, *found))


def train(
    task: Task,
    runs: Sequence[Run],
    steps: int,
    seed: int,
    *,
    eval_every: int = 0,
    eval_last: bool = False,
    interleave: bool = True,
    title: str = "training",
    lines: int = 10,
    stop: CtrlC | None = None,
    done: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> bool:
    """Trains every run on the batches of `seed`; returns False where `stop` ended it early.

    Each step starts from a seed of its own, the same for all, so that dropout does not depend on whose turn came first.
    Validates every `eval_every` steps (0: never), and after the last one with `eval_last`. The first `done` steps of
    all runs together are taken as made; `after` is told how many are, after each.
    """
    order = task.order(seed, steps)
    with Progress(steps, title, lines, len(runs), done) as progress:
        for made, (step, run) in enumerate(itertools.islice(turns(runs, steps, interleave), done, None), done + 1):
            if not run.diverged:
                torch.manual_seed(seed * 1_000_003 + step + processes.RANK * 2**40)
                run.step(task.shares(order[step]))
            after(made)
            if stop is not None and processes.total(stop.pressed):
                return False
            due = (eval_every and (step + 1) % eval_every == 0) or (eval_last and step + 1 == steps)
            if due and not run.diverged:
                run.validate(step + 1)
            losses = ", ".join(f"{r.name} {_smoothed(r):.3f}" for r in runs if r.losses)
            progress.advance(f"loss {losses}")
    return True


def turns(runs: Sequence[Run], steps: int, interleave: bool) -> Iterator[tuple[int, Run]]:
    """(step, run) in the order of training: step by step over all runs, the first of them changing each time, or one
    after another.
    """
    if not interleave:
        yield from ((step, run) for run in runs for step in range(steps))
        return
    for step in range(steps):
        for turn in range(len(runs)):
            yield step, runs[(step + turn) % len(runs)]


def median_ratio(above: Run, below: Run) -> float | None:
    """The median over the timed steps of the ratio of two runs' times for the same batch."""
    ratios = [a / b for a, b in zip(above.timed, below.timed)]
    return statistics.median(ratios) if ratios else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _smoothed(run: Run) -> float:
    return running_mean(run.losses[-SHOWN:], SHOWN)[-1]


class CtrlC:
    """Turns the first Ctrl-C inside the block into a flag, so that the step under way is finished; the second one
    interrupts at once. Of several processes one flag is enough, and the next step the last of all.
    """

    pressed = False

    def __enter__(self) -> CtrlC:
        self._previous: Any = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if processes.WORLD == 1:  # torchrun sends a second one of its own
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
