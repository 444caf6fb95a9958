"""Compare ways to fine-tune on one task: with one learning rate for all, and each at its own best, over several seeds.

    python examples/compare.py --task digits     # a few minutes; docs/details/variants.md has all results
    python examples/compare.py --task gpt
    python examples/compare.py --task docstrings # a sentence encoder
    python examples/compare.py --task language   # finetune.py's model and data: hours
    python examples/compare.py --task digits --quick  # every contestant for a few steps, to see that it works
    python examples/compare.py --contestants lora lora_ga

Each contestant (contestants.py) is trained and tested with the task's learning rate and some seeds. Then it is trained
with several rates and other seeds; the rate with the lowest loss on the validation set is kept, more rates are tried
while that is the smallest or the largest, and with it the contestant is trained and tested again, with the first seeds,
which the choice has not seen. Time and memory of a step are measured apart (costs.py), and so is how near each
start's first step comes to full fine-tuning's (alignment.py).

Every finished trial is kept in trials.json under --out, and the same command again goes on from there: Ctrl-C loses
what is under way (a trial, a pretraining, the first steps, the timing) and nothing else. results.md, results.json and
loss.png are written at the end, for the contestants that were named; trials of others that are there stay.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study.contestants import CONTESTANTS
from study.settings import (
    PACKAGES,
    Comparison,
    choose_device,
    parse_comparison,
    run_program,
)

if TYPE_CHECKING:
    from study.tasks.task import Task
    from study.trials import Store, Trial

SEARCH_SEED = 1000  # the first seed for choosing learning rates; the others are 0, 1, ...


def main(argv: list[str] | None = None) -> int:
    settings = parse_comparison(argv)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        print(f"compare.py: error: torchrun started {processes} processes, want one: its trials are small; "
              "finetune.py --shard trains a model in several", file=sys.stderr)  # fmt: skip
        return 1
    packages = ["fastlora", *PACKAGES[settings.task]]
    kept = f"what was finished is kept in {settings.out}, and the same command goes on from there"
    return run_program("compare.py", lambda: compare(settings), packages, settings.plot, settings.folder, kept)


def compare(settings: Comparison) -> int:
    """The whole comparison, from where an earlier one stopped."""
    from study import alignment, costs
    from study import report as comparison_report
    from study.files import kept
    from study.tasks.task import load_task
    from study.trials import Store

    task = load_task(settings, choose_device(settings.device))
    print(task.description, flush=True)
    facts = shared_facts(task)
    trainer = Trainer(settings, task, Store(settings.folder / "trials.json", facts))
    aligned = kept(settings.folder / "alignment.json", facts, lambda: alignment.measure(task))
    one_rate = trainer.finals(dict.fromkeys(settings.contestants, settings.lr))
    rates = {name: trainer.search(name) for name in settings.contestants}
    best_rate = trainer.finals({name: found.best for name, found in rates.items()})
    timed = kept(
        settings.folder / "costs.json",
        {**facts, "rounds": settings.timed_rounds, **{name: CONTESTANTS[name].recipe for name in settings.contestants}},
        lambda: costs.measure(task, settings.contestants, settings.timed_rounds),
    )
    results = comparison_report.Results(task, facts, rates, one_rate, best_rate, timed, aligned)
    for path in comparison_report.save(results):
        print("Wrote", path)
    print("\n" + (settings.folder / "results.md").read_text(encoding="utf-8"))
    return 0


def shared_facts(task: Task) -> dict[str, Any]:
    """What every trial of a comparison has in common: settings, data, machine."""
    import torch
    from study.tables import machine

    where = {"device": machine(task.device)["device"], "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**task.settings.shared_by_trials, **task.facts, **where}


@dataclass(frozen=True)
class Rates:
    """The learning rates tried, each with its mean validation loss over the search's seeds (infinite where one
    diverged); `inside`: the best is neither the smallest nor the largest of them.
    """

    best: float
    losses: dict[float, float]
    inside: bool


class Trainer:
    """Makes trials, or takes them from the store; says how far it is."""

    def __init__(self, settings: Comparison, task: Task, store: Store):
        self.settings, self.task, self.store = settings, task, store
        each = settings.seeds if settings.quick else 3 * settings.search_seeds + 2 * settings.seeds
        self.expected = len(settings.contestants) * each
        self.done: set[tuple[str, float, int, bool]] = set()

    def finals(self, rates: Mapping[str, float]) -> dict[str, list[Trial]]:
        """The trials that are reported, by contestant: its rate, every seed."""
        seeds = range(self.settings.seeds)
        by_seed = [{name: self.trial(name, lr, seed, test=True) for name, lr in rates.items()} for seed in seeds]
        return {name: [trials[name] for trials in by_seed] for name in rates}

    def search(self, name: str) -> Rates:
        from study.curves import best_rate

        if self.settings.quick:
            return Rates(self.settings.lr, {}, False)
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.settings.search_seeds)

        def score(lr: float) -> float:
            return statistics.fmean(self.trial(name, lr, seed, test=False).score for seed in seeds)

        rates = Rates(*best_rate(self.settings.lr, score))
        self.expected += max(0, len(rates.losses) - 3) * self.settings.search_seeds
        return rates

    def trial(self, name: str, lr: float, seed: int, *, test: bool) -> Trial:
        from study.trials import run_trial

        trial = self.store.get(name, lr, seed, tested=test)
        made = trial is None
        start = time.perf_counter()
        if trial is None:
            eval_every = self.settings.eval_every if test else 0
            trial = run_trial(self.task, name, lr, seed, eval_every=eval_every, test=test)
            self.store.add(trial)
        if (name, lr, seed, test) in self.done:  # the one rate was the best one too
            return trial
        self.done.add((name, lr, seed, test))
        took = f"{time.perf_counter() - start:.0f} s" if made else "kept"
        outcome = "diverged" if trial.diverged else f"validation loss {trial.score:.4f}"
        if trial.test is not None:
            metric = self.task.metric
            outcome += f", {metric.name} {metric.form.format(metric.of(trial.test))}{metric.unit}"
        done = len(self.done)
        print(f"[{done} of about {max(done, self.expected)}] {CONTESTANTS[name].title}, lr {lr:g}, seed {seed}: "
              f"{outcome} ({took})", file=sys.stderr, flush=True)  # fmt: skip
        return trial


if __name__ == "__main__":
    sys.exit(main())
