"""One trial: a contestant trained from the start with one learning rate and one seed. And the file that keeps them."""

from __future__ import annotations

import functools
import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study.contestants import CONTESTANTS
from study.files import write_atomically
from study.learner import Learner
from study.settings import UsageError
from study.tasks.task import Scores, Task
from study.training import Run, Validation, train

FORMAT = 2  # of the file; the first held contestants' `overrides` and a test accuracy alone


@dataclass(frozen=True)
class Trial:
    """`losses` are each step's, before it; a trial that diverged stops at its last finite one, with no validation and
    no test. `recipe` is the contestant's, and `commit` the code's, as they were then; `notes` are the learner's.
    """

    contestant: str
    lr: float
    seed: int
    recipe: dict[str, Any]
    commit: str | None
    trainable: int
    optimizer_state: int
    notes: dict[str, Any]
    losses: list[float]
    validation: list[Validation]
    test: Scores | None
    diverged: bool

    @property
    def score(self) -> float:
        """What learning rates are chosen by: the loss on the validation set after the last step."""
        return math.inf if self.diverged or not self.validation else self.validation[-1].loss


def run_trial(task: Task, contestant: str, lr: float, seed: int, *, eval_every: int, test: bool) -> Trial:
    """Trains and validates, every `eval_every` steps (0: only at the end); with `test`, tests too."""
    entry = CONTESTANTS[contestant]
    steps = task.settings.steps
    run = Run(contestant, entry.title, Learner(task, entry, lr, seed, steps))
    title = f"{entry.title}, lr {lr:g}, seed {seed}"
    train(task, [run], steps, seed, eval_every=eval_every, eval_last=True, title=title, lines=0)
    learner = run.learner
    return Trial(
        contestant=contestant,
        lr=lr,
        seed=seed,
        recipe=entry.recipe,
        commit=commit(),
        trainable=learner.trainable,
        optimizer_state=learner.optimizer_state,
        notes=learner.notes(),
        losses=run.losses,
        validation=[] if run.diverged else run.validation,
        test=task.scores(learner.model, "test") if test and not run.diverged else None,
        diverged=run.diverged,
    )


class Store:
    """The finished trials in a JSON file, rewritten whole (to a temporary file, then renamed) after each.

    `facts` say under which settings and on which data and machine trials are made. Raises UsageError where the file
    holds trials of others, or of an older format, or is not such a file.
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
        if trial is None or trial.recipe != CONTESTANTS[contestant].recipe:
            return None
        return None if tested and trial.test is None and not trial.diverged else trial

    def add(self, trial: Trial) -> None:
        self._trials[trial.contestant, trial.lr, trial.seed] = trial
        content = {"format": FORMAT, "facts": self.facts, "trials": [plain(t) for t in self._trials.values()]}
        write_atomically(self.path, json.dumps(content, allow_nan=False) + "\n")

    def _read(self) -> None:
        instead = "remove it, or give another --out"
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            facts, found = content["facts"], content.get("format", 1)
            if found != FORMAT:
                raise UsageError(
                    f"{self.path} holds trials in format {found}, want {FORMAT}: they are of another version of "
                    f"compare.py, and lack what its report needs; {instead}"
                )
            for values in content["trials"]:
                values["validation"] = [Validation(**score) for score in values["validation"]]
                values["test"] = values["test"] and Scores(**values["test"])
                trial = Trial(**values)
                self._trials[trial.contestant, trial.lr, trial.seed] = trial
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.path}: not a file of trials ({error}); {instead}") from error
        different = [key for key in {**facts, **self.facts} if facts.get(key) != self.facts.get(key)]
        if different:
            details = ", ".join(f"{key} {facts.get(key)!r}, not {self.facts.get(key)!r}" for key in different)
            raise UsageError(
                f"{self.path} holds trials made with {details}: give those settings, another --out, or remove it"
            )


def plain(trial: Trial) -> dict[str, Any]:
    """A trial as JSON holds it."""
    return {**asdict(trial), "test": trial.test and trial.test._asdict()}


@functools.cache
def commit() -> str | None:
    """The checkout's commit, "-dirty" where it has changes next to it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
