"""What a step of each contestant costs: time and peak memory, in a short pass of its own.

The trials run one after another, for an hour or more, and whatever else the machine does meanwhile slows some of them
and not others. So here all contestants are in memory at once and take their steps in turn, on the same batches: a noisy
machine hits all alike. The order is shuffled every round, because in a fixed one the rounds of a small model fall into
step with the scheduler's time slices. The time of a step is the median over the rounds; one more step, on the same
batch for all, runs under the memory profiler.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
from typing import Any

from study.contestants import CONTESTANTS
from study.learner import Learner
from study.progress import Progress
from study.tasks.task import Task
from study.training import Run

UNTIMED_ROUNDS = 3  # the first steps pay for page faults, and on a GPU for compilation


def measure(task: Task, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """By name, the median seconds of a step and the bytes at its peak; next to them the load average before it all."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    steps = UNTIMED_ROUNDS + rounds + 1
    learners = {name: Learner(task, CONTESTANTS[name], task.settings.lr, 0, steps) for name in names}
    batches = [task.shares(indices) for indices in task.order(0, steps)]
    generator = random.Random(0)
    runs = {name: Run(name, name, learner) for name, learner in learners.items()}
    with Progress(steps - 1, "timing", lines=1) as progress:
        for shares in batches[:-1]:
            for name in generator.sample(list(names), len(names)):
                runs[name].step(shares)
            progress.advance(f"{len(names)} contestants in turn")
    return {
        "contestants": {
            name: {
                "step_seconds": statistics.median(runs[name].seconds[UNTIMED_ROUNDS:]),
                "peak_bytes": learner.peak_bytes(batches[-1]),
            }
            for name, learner in learners.items()
        },
        "load average": load,
    }
