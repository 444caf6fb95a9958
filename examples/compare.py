"""Compare ways to fine-tune on one task, each at its own best learning rate, over several seeds.

    python examples/compare.py                   # docs/finetuning.md
    python examples/compare.py --quick           # every contestant for a few steps, to see that it works
    python examples/compare.py --contestants lora lora_ga

The model and the task are finetune.py's. Each contestant (contestants.py) is first trained with several learning rates
and one seed; the rate with the lowest loss on the validation set is kept, and more rates are tried while that is the
smallest or the largest. Then it is trained with that rate and other seeds, which the choice has not seen, and tested.

Every finished trial is kept in trials.json under --out, and the same command again goes on from there: Ctrl-C loses the
trial under way and nothing else. results.md, results.json and loss.png are written at the end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import settings as options
from contestants import CONTESTANTS
from settings import Settings, UsageError

if TYPE_CHECKING:
    from trials import Store, Task, Trial

INTERRUPTED = 130
SEARCH_SEED = 1000  # the first seed for choosing learning rates; the others are 0, 1, ...
SET_BY_TRIALS: dict[str, Any] = {
    "seed": 0, "lr": 0.0, "full_lr": 0.0, "init": "kaiming", "gamma": 16.0, "interleave": False
}  # fmt: skip
QUICK = {"steps": 4, "batch_size": 4, "max_length": 8, "sketch_batches": 1, "eval_every": 2, "seeds": 2}
QUICK_SHARE = 8  # one of so many texts is validated and tested on in a quick run


@dataclass(frozen=True)
class Comparison:
    """`base` is what all trials have in common."""

    base: Settings
    contestants: tuple[str, ...]
    seeds: int
    search_seeds: int
    quick: bool


def parse(argv: list[str] | None = None) -> Comparison:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Compare ways to fine-tune a sentence encoder, each at its own best learning rate, over several "
        "seeds. Goes on where it was interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    training, _, run = options.add_shared_options(parser)
    training.add_argument("--seeds", type=options.positive_int, default=3, help="trained and tested at the best rate")
    training.add_argument(
        "--search-seeds", type=options.positive_int, default=1, help="further seeds, for choosing the rate"
    )
    run.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        metavar="NAME",
        help=", ".join(CONTESTANTS),
    )
    run.add_argument("--quick", action="store_true", help="a few steps of each, without a search; into OUT/quick")
    parser.set_defaults(steps=150, batch_size=16, max_length=32, eval_every=25, out=Path("runs/compare"))
    values = vars(parser.parse_args(argv))
    if values["quick"]:
        values |= QUICK
        values["out"] /= "quick"
    contestants = tuple(dict.fromkeys(values.pop("contestants")))
    seeds, search_seeds, quick = (values.pop(name) for name in ("seeds", "search_seeds", "quick"))
    methods = tuple(dict.fromkeys(CONTESTANTS[name].method for name in contestants))
    base = Settings(**values, methods=methods, **SET_BY_TRIALS)
    return Comparison(base, contestants, seeds, search_seeds, quick)


def main(argv: list[str] | None = None) -> int:
    comparison = parse(argv)
    out = comparison.base.out
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        options.require_installed(["torch", "transformers", "safetensors", "fastlora"], comparison.base.plot)
        options.require_writable(out)
        compare(comparison)
        return 0
    except (UsageError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ncompare.py: interrupted; the finished trials are in {out / 'trials.json'}, and the same command goes "
              "on from there", file=sys.stderr)  # fmt: skip
        return INTERRUPTED


def compare(comparison: Comparison) -> None:
    """The whole comparison, from where an earlier one stopped."""
    import comparison_report
    from trials import Store

    task, facts = prepare(comparison)
    store = Store(comparison.base.out / "trials.json", facts)
    trainer = Trainer(comparison, task, store)
    rates = {name: trainer.search(name) for name in comparison.contestants}
    seeds = range(comparison.seeds)
    by_seed = [{name: trainer.trial(name, rates[name].best, seed, test=True) for name in rates} for seed in seeds]
    finals = {name: [trials[name] for trials in by_seed] for name in rates}
    rows = comparison_report.summarise(rates, finals)
    for path in comparison_report.save(comparison.base, facts, rates, finals, rows, task.device):
        print("Wrote", path)
    print("\n" + (comparison.base.out / "results.md").read_text(encoding="utf-8"))


def prepare(comparison: Comparison) -> tuple[Task, dict[str, object]]:
    """The task, and the facts that every trial of it shares."""
    import docstrings
    import encoder
    import torch
    from batches import TokenizedExamples
    from finetune import choose_device, describe
    from trials import Task

    base = comparison.base
    device = choose_device(base.device)
    source = encoder.find_model(base.model)
    tokenizer = encoder.load_tokenizer(source)
    dataset = docstrings.load()
    describe(dataset)
    kept = {"train": 1, "validation": 1, "test": 1}
    if comparison.quick:
        kept |= {"validation": QUICK_SHARE, "test": QUICK_SHARE}
    parts = {
        part: TokenizedExamples(getattr(dataset, part)[::share], tokenizer, base.max_length)
        for part, share in kept.items()
    }
    shared = ("steps", "batch_size", "max_length", "head_lr", "r", "lora_alpha", "dropout", "sketch_batches")
    facts: dict[str, object] = {name: getattr(base, name) for name in (*shared, "eval_every", "model", "dtype")}
    facts |= {"device": device.type, "torch": torch.__version__, "classes": len(dataset.labels)}
    facts |= {part: len(examples) for part, examples in parts.items()}
    return Task(source, len(dataset.labels), parts, base, device), facts


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

    def __init__(self, comparison: Comparison, task: Task, store: Store):
        self.comparison, self.task, self.store = comparison, task, store
        searched = 0 if comparison.quick else 3 * comparison.search_seeds
        self.expected = len(comparison.contestants) * (searched + comparison.seeds)
        self.done = 0

    def search(self, name: str) -> Rates:
        from curves import best_rate

        start = CONTESTANTS[name].lr
        if self.comparison.quick:
            return Rates(start, {}, False)
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.comparison.search_seeds)

        def score(lr: float) -> float:
            return statistics.fmean(self.trial(name, lr, seed, test=False).score for seed in seeds)

        rates = Rates(*best_rate(start, score))
        self.expected += max(0, len(rates.losses) - 3) * self.comparison.search_seeds
        return rates

    def trial(self, name: str, lr: float, seed: int, *, test: bool) -> Trial:
        from trials import run_trial

        self.done += 1
        trial = self.store.get(name, lr, seed, tested=test)
        start = time.perf_counter()
        if trial is None:
            eval_every = self.comparison.base.eval_every if test else 0
            trial = run_trial(self.task, name, lr, seed, eval_every=eval_every, test=test)
            self.store.add(trial)
        took = f"{time.perf_counter() - start:.0f} s"
        outcome = "diverged" if trial.diverged else f"validation loss {trial.score:.4f}"
        if trial.test_accuracy is not None:
            outcome += f", test accuracy {100 * trial.test_accuracy:.1f} %"
        print(f"[{self.done} of about {max(self.done, self.expected)}] {CONTESTANTS[name].title}, lr {lr:g}, "
              f"seed {seed}: {outcome} ({took})", file=sys.stderr, flush=True)  # fmt: skip
        return trial


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
