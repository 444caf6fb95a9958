"""The command line of compare.py. Imports neither torch nor transformers, so that --help and mistakes are answered at
once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import settings as options
from study.contestants import CONTESTANTS, OPTIMIZERS, Contestant

TASKS = ("docstrings", "gpt", "digits")
# What a task does unless told otherwise, and by that which options it has. `lr`: the rate of the protocol with one rate
# for all, by optimiser, and where the searches start: picked from trial runs of full fine-tuning and LoRA, between or
# below the best of the two.
DEFAULTS: dict[str, dict[str, Any]] = {
    "docstrings": {
        "steps": 150, "batch_size": 16, "r": 8, "lora_alpha": 16.0, "dropout": 0.0, "sketch_batches": 8,
        "eval_every": 50, "search_seeds": 1, "timed_rounds": 20, "lr": {"adamw": 5e-4, "sgd": 1e-1},
        "max_length": 32, "head_lr": 3e-2, "model": "minilm", "dtype": "float32",
    },
    "gpt": {
        "steps": 160, "batch_size": 8, "r": 4, "lora_alpha": 8.0, "dropout": 0.0, "sketch_batches": 8,
        "eval_every": 40, "search_seeds": 1, "timed_rounds": 40, "lr": {"adamw": 5e-3, "sgd": 5e-1},
    },
    "digits": {
        "steps": 100, "batch_size": 32, "r": 4, "lora_alpha": 8.0, "dropout": 0.0, "sketch_batches": 8,
        "eval_every": 10, "search_seeds": 3, "timed_rounds": 400, "lr": {"adamw": 1e-2, "sgd": 2e-2},
    },
}  # fmt: skip
QUICK = {"steps": 4, "batch_size": 4, "sketch_batches": 1, "eval_every": 2, "seeds": 2, "timed_rounds": 2}
QUICK_LENGTH = 8


@dataclass(frozen=True)
class Comparison:
    """What one comparison does. `max_length`, `head_lr`, `model` and `dtype` are None for tasks that have none."""

    task: str
    optimizer: str
    contestants: tuple[str, ...]
    steps: int
    batch_size: int
    r: int
    lora_alpha: float
    dropout: float
    sketch_batches: int
    lr: float
    seeds: int
    search_seeds: int
    eval_every: int
    timed_rounds: int
    max_length: int | None
    head_lr: float | None
    model: str | None
    dtype: str | None
    device: str
    plot: bool
    quick: bool
    out: Path

    @property
    def folder(self) -> Path:
        """Where this comparison's files are."""
        return self.out / (self.task if self.optimizer == "adamw" else f"{self.task}-{self.optimizer}")

    @property
    def pretrained_models(self) -> Path:
        """Where the models are that comparisons pretrain and share."""
        return self.out / "pretrained"

    @property
    def shared_by_trials(self) -> dict[str, Any]:
        """The settings that every trial has in common."""
        names = ["task", "optimizer", "steps", "batch_size", "r", "lora_alpha", "dropout", "sketch_batches"]
        own = ["eval_every", "max_length", "head_lr", "model", "dtype"]
        return {name: getattr(self, name) for name in (*names, *own) if getattr(self, name) is not None}


def parse(argv: list[str] | None = None) -> Comparison:
    parser = _parser()
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    task, optimizer = given["task"], given["optimizer"]
    defaults = DEFAULTS[task] | {"lr": DEFAULTS[task]["lr"][optimizer]}
    quick = given["quick"]
    own = {name: defaults.get(name) for name in ("max_length", "head_lr", "model", "dtype")}
    unknown = [name for name in own if name in given and name not in defaults]
    if unknown:
        parser.error(f"--{unknown[0].replace('_', '-')}: the task {task} has no such setting")
    if quick:
        defaults |= QUICK | ({"max_length": QUICK_LENGTH} if "max_length" in defaults else {})
        given["out"] /= "quick"
    known, left_out = by_optimizer(optimizer)
    chosen = tuple(dict.fromkeys(given.pop("contestants", known)))
    impossible = [name for name in chosen if name in left_out]
    if impossible:
        parser.error(f"--contestants {impossible[0]}: not with --optimizer {optimizer}: {left_out[impossible[0]]}")
    return Comparison(**{"seeds": 3, **own, **defaults, **given, "contestants": chosen})


def by_optimizer(optimizer: str) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants that have a meaning with an optimiser, and the others with the reason."""
    left_out = {name: entry.without[optimizer] for name, entry in CONTESTANTS.items() if optimizer in entry.without}
    return {name: entry for name, entry in CONTESTANTS.items() if name not in left_out}, left_out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Compare ways to fine-tune on one task, over several seeds: with one learning rate for all, and "
        "each at its own best. Goes on where it was interrupted.",
        epilog=_defaults(DEFAULTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    training, _, run = options.add_shared_options(parser)
    names = {name for defaults in DEFAULTS.values() for name in defaults}
    parser.set_defaults(**dict.fromkeys(names), out=Path("runs/compare"))  # None: the task's own, filled in by parse
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="what trains adapters or weights (default adamw)"
    )
    training.add_argument("--lr", type=options.positive_float, help="the one rate for all; searches start around it")
    training.add_argument("--seeds", type=options.positive_int, help="trained and tested in both protocols (default 3)")
    training.add_argument(
        "--search-seeds", type=options.positive_int, help="further seeds, for choosing each contestant's best rate"
    )
    run.add_argument("--task", choices=TASKS, default="docstrings", help="what is learnt (default docstrings)")
    run.add_argument("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS))
    run.add_argument("--timed-rounds", type=options.positive_int, help="steps of each contestant that are timed")
    run.add_argument("--quick", action="store_true", help="a few steps of each, without a search; into OUT/quick")
    return parser


def _defaults(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    def text(value: Any) -> str:
        return "/".join(f"{lr:g}" for lr in value.values()) if isinstance(value, Mapping) else str(value)

    lines = [
        f"  {task}: " + ", ".join(f"{name.replace('_', '-')} {text(value)}" for name, value in defaults.items())
        for task, defaults in tasks.items()
    ]
    return "\n".join([f"defaults by task (lr: {'/'.join(OPTIMIZERS)}):", *lines])
