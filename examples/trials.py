"""One trial: a contestant trained from the start with one learning rate and one seed. And the file that keeps them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import methods
import torch
from batches import TokenizedExamples, sketch_batches, training_order
from contestants import CONTESTANTS
from progress import Progress
from settings import Settings, UsageError
from torch import nn
from training import Run, accuracy, predict


@dataclass(frozen=True)
class Task:
    """What every trial shares."""

    source: str
    classes: int
    parts: Mapping[str, TokenizedExamples]
    settings: Settings
    device: torch.device


@dataclass(frozen=True)
class Validation:
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Trial:
    """`losses` are each step's, before it; a trial that diverged stops at its last finite one, with no validation and
    no test. `overrides` are the contestant's as they were then.
    """

    contestant: str
    lr: float
    seed: int
    overrides: dict[str, Any]
    trainable: int
    losses: list[float]
    validation: list[Validation]
    test_accuracy: float | None
    diverged: bool

    @property
    def score(self) -> float:
        """What learning rates are chosen by: the loss on the validation set after the last step."""
        return math.inf if self.diverged or not self.validation else self.validation[-1].loss


def run_trial(task: Task, contestant: str, lr: float, seed: int, *, eval_every: int, test: bool) -> Trial:
    """Trains and validates, every `eval_every` steps (0: only at the end); with `test`, tests too."""
    entry = CONTESTANTS[contestant]
    settings = replace(task.settings, lr=lr, full_lr=lr, seed=seed, **entry.overrides)
    train = task.parts["train"]
    order = training_order(train, settings.batch_size, settings.steps, seed)
    sketch = sketch_batches(train, settings.batch_size, settings.sketch_batches, seed)
    classifier = methods.build(
        entry.method, task.source, task.classes, settings, task.device, [batch.to(task.device) for batch in sketch]
    )
    run = Run(entry.method, classifier, settings)
    validation: list[Validation] = []
    diverged = False
    with Progress(settings.steps, f"{entry.title}, lr {lr:g}, seed {seed}", lines=0) as progress:
        for step, indices in enumerate(order):
            torch.manual_seed(seed * 1_000_003 + step)
            methods.set_training(classifier, True)
            loss = run.step(train.batch(indices).to(task.device))
            diverged = not math.isfinite(loss)
            if diverged:
                break
            run.losses.append(loss)
            progress.advance(f"loss {run.final_loss():.3f}")
            if step + 1 == settings.steps or (eval_every and (step + 1) % eval_every == 0):
                found = _validate(classifier, task)
                diverged = not math.isfinite(found[0])
                if diverged:
                    break
                validation.append(Validation(step + 1, *found))
    tested = test and not diverged
    return Trial(
        contestant=contestant,
        lr=lr,
        seed=seed,
        overrides=dict(entry.overrides),
        trainable=run.trainable,
        losses=run.losses,
        validation=[] if diverged else validation,
        test_accuracy=accuracy(predict(classifier, task.parts["test"], task.device), task.parts["test"])
        if tested
        else None,
        diverged=diverged,
    )


def _validate(classifier: Any, task: Task) -> tuple[float, float]:
    examples = task.parts["validation"]
    logits = predict(classifier, examples, task.device)
    return nn.functional.cross_entropy(logits, torch.tensor(examples.labels)).item(), accuracy(logits, examples)


class Store:
    """The finished trials in a JSON file, rewritten whole (to a temporary file, then renamed) after each.

    `facts` say under which settings and on which data trials are made. Raises UsageError where the file holds trials
    of other settings, or is not such a file.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self.path = path
        self.facts = json.loads(json.dumps(facts))
        self._trials: dict[tuple[str, float, int], Trial] = {}
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._trials)

    def get(self, contestant: str, lr: float, seed: int, *, tested: bool) -> Trial | None:
        """A trial made before; None where there is none, where its contestant was defined otherwise, or where it was
        not tested and is wanted so.
        """
        trial = self._trials.get((contestant, lr, seed))
        if trial is None or trial.overrides != dict(CONTESTANTS[contestant].overrides):
            return None
        return None if tested and trial.test_accuracy is None and not trial.diverged else trial

    def add(self, trial: Trial) -> None:
        self._trials[trial.contestant, trial.lr, trial.seed] = trial
        text = json.dumps({"facts": self.facts, "trials": [asdict(t) for t in self._trials.values()]}, allow_nan=False)
        write_atomically(self.path, text + "\n")

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            facts = content["facts"]
            for values in content["trials"]:
                values["validation"] = [Validation(**found) for found in values["validation"]]
                trial = Trial(**values)
                self._trials[trial.contestant, trial.lr, trial.seed] = trial
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path}: not a file of trials ({error}); remove it, or give another --out"
            ) from error
        different = [key for key in {**facts, **self.facts} if facts.get(key) != self.facts.get(key)]
        if different:
            details = ", ".join(f"{key} {facts.get(key)!r}, not {self.facts.get(key)!r}" for key in different)
            raise UsageError(
                f"{self.path} holds trials made with {details}: give those settings, another --out, or remove it"
            )


def write_atomically(path: Path, text: str) -> None:
    """So that `path` holds the old text or the new one, whenever the process ends."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
