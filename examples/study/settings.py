"""The command lines of finetune.py and compare.py. Imports neither torch nor transformers, so that --help and mistakes
are answered at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.contestants import CONTESTANTS, OPTIMIZERS, Contestant

INTERRUPTED = 130  # a program's exit status after Ctrl-C
TASKS = ("language", "docstrings", "gpt", "digits")
DTYPES = ("float32", "bfloat16")
SHARDS = ("none", "ddp", "fsdp2")
BASES = ("full", "nf4", "fp4")
METHODS = ("frozen", "peft", "fastlora", "full")
VARIANTS = ("lora", "rslora", "dora", "lora_plus")  # of the contestants, those that PEFT trains too
ORDINARY_INITS = ("kaiming", "gaussian", "orthogonal")  # PEFT's adapters can start from the same numbers
INITS = (*ORDINARY_INITS, "pissa", "olora", "lora_ga")

# What a task does unless told otherwise, and by that which options it has.
OF_A_TASK: dict[str, dict[str, Any]] = {
    "language": {"max_length": 256, "model": "smollm2", "dtype": "auto"},
    "docstrings": {"max_length": 32, "head_lr": 3e-2, "model": "minilm", "dtype": "float32"},
    "gpt": {},
    "digits": {},
}
FINE_TUNING: dict[str, dict[str, Any]] = {
    "language": {"steps": 25, "batch_size": 4, "r": 16, "lora_alpha": 32.0, "lr": 1e-3, "full_lr": 1e-4},
    "docstrings": {"steps": 200, "batch_size": 32, "r": 8, "lora_alpha": 16.0, "lr": 1e-3, "full_lr": 2e-4,
                   "max_length": 48},
}  # fmt: skip
# `lr`: the rate of the protocol with one rate for all, by optimiser, and where the searches start: picked from trial
# runs of full fine-tuning and LoRA, between or below the best of the two.
COMPARISON: dict[str, dict[str, Any]] = {
    "docstrings": {
        "steps": 150, "batch_size": 16, "r": 8, "lora_alpha": 16.0, "dropout": 0.0, "sketch_batches": 8,
        "eval_every": 50, "search_seeds": 1, "timed_rounds": 20, "lr": {"adamw": 5e-4, "sgd": 1e-1},
    },
    "gpt": {
        "steps": 160, "batch_size": 8, "r": 4, "lora_alpha": 8.0, "dropout": 0.0, "sketch_batches": 8,
        "eval_every": 40, "search_seeds": 1, "timed_rounds": 40, "lr": {"adamw": 5e-3, "sgd": 5e-1},
    },
    "digits": {
        "steps": 100, "batch_size": 32, "r": 4, "lora_alpha": 8.0, "dropout": 0.0, "sketch_batches": 8,
        "eval_every": 10, "search_seeds": 3, "timed_rounds": 400, "lr": {"adamw": 1e-2, "sgd": 2e-2},
    },
    "language": {
        "steps": 40, "batch_size": 4, "r": 16, "lora_alpha": 32.0, "dropout": 0.0, "sketch_batches": 4,
        "eval_every": 20, "search_seeds": 1, "timed_rounds": 8, "lr": {"adamw": 5e-4, "sgd": 1e-1},
    },
}  # fmt: skip
ALONE = {"base": "full", "shard": "none", "accumulate": 1, "sketch_width": None}
QUICK = {"steps": 4, "batch_size": 4, "sketch_batches": 1, "eval_every": 2, "seeds": 2, "timed_rounds": 2}
QUICK_LENGTHS = {"docstrings": 8, "language": 192}
PACKAGES = {
    "language": ["transformers", "safetensors"],
    "docstrings": ["transformers", "safetensors"],
    "gpt": ["safetensors"],
    "digits": ["safetensors", "sklearn"],
}


class UsageError(Exception):
    """A request that cannot be met; the message says what came and what is wanted."""


@dataclass(frozen=True)
class Settings:
    """What a task and its learners need to know. `max_length`, `head_lr`, `model`, `dtype`: None for tasks without."""

    task: str
    optimizer: str
    steps: int
    batch_size: int
    r: int
    lora_alpha: float
    dropout: float
    sketch_batches: int
    sketch_width: int | None
    lr: float
    eval_every: int
    max_length: int | None
    head_lr: float | None
    model: str | None
    dtype: str | None
    base: str
    device: str
    shard: str
    accumulate: int
    plot: bool
    quick: bool
    out: Path

    @property
    def pretrained_models(self) -> Path:
        """Where the models are that comparisons pretrain and share."""
        return self.out / "pretrained"


@dataclass(frozen=True)
class FineTuning(Settings):
    """What one run of finetune.py does; docs/details/finetuning.md explains the defaults."""

    method: str
    methods: tuple[str, ...]
    init: str
    gamma: float
    group: str | None
    mlp: str | None
    full_lr: float
    seed: int
    interleave: bool
    save_every: int
    resume: bool


@dataclass(frozen=True)
class Comparison(Settings):
    """What one comparison does."""

    contestants: tuple[str, ...]
    seeds: int
    search_seeds: int
    timed_rounds: int

    @property
    def folder(self) -> Path:
        """Where this comparison's files are."""
        return self.out / (self.task if self.optimizer == "adamw" else f"{self.task}-{self.optimizer}")

    @property
    def shared_by_trials(self) -> dict[str, Any]:
        """The settings that every trial has in common."""
        names = ["task", "optimizer", "steps", "batch_size", "r", "lora_alpha", "dropout", "sketch_batches"]
        own = ["eval_every", "max_length", "head_lr", "model", "dtype", "sketch_width"]
        return {name: getattr(self, name) for name in (*names, *own) if getattr(self, name) is not None}


def parse_fine_tuning(argv: list[str] | None = None) -> FineTuning:
    parser, training, lora, run = _program(
        "finetune",
        "Fine-tune a language model (or, with --task docstrings, a sentence encoder) on texts of Python's "
        "standard library, with PEFT and with fastlora, and compare speed, memory, losses and what the model writes.",
        FINE_TUNING,
    )
    training.add_argument("--full-lr", type=positive_float, help="learning rate of all weights, for --methods full")
    training.add_argument("--seed", type=seed, default=0)
    training.add_argument("--accumulate", type=positive_int, help="micro-batches of a process and step (default 1)")
    lora.add_argument("--lr", type=positive_float, help="learning rate of the adapters")
    lora.add_argument("--method", choices=VARIANTS, default="lora", help="what both libraries train (default lora)")
    lora.add_argument("--init", type=init, default="kaiming", help="how fastlora's adapters start: " + ", ".join(INITS))
    lora.add_argument("--gamma", type=positive_float, default=16.0, help="γ of --init lora_ga: larger starts smaller")
    lora.add_argument("--group", choices=["auto"], help="let fastlora's q, k, v share passes (docs/performance.md)")
    lora.add_argument("--mlp", choices=["auto"], help="let fastlora run gated MLPs as one op (docs/kernels/mlp.md)")
    lora.add_argument("--fused-loss", action="store_true", help="fastlora again, without logits (docs/head.md)")
    run.add_argument("--methods", nargs="+", choices=METHODS, default=["frozen", "peft", "fastlora"], metavar="METHOD",
                     help="of " + ", ".join(METHODS))  # fmt: skip
    run.add_argument("--base", choices=BASES, default="full", help="the frozen weights: full, or in 4 bits (QLoRA)")
    run.add_argument("--shard", choices=SHARDS, default="none", help="how torchrun's processes share a model")
    run.add_argument("--save-every", type=natural_int, default=0, help="steps between checkpoints (default 0: none)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint under --out")
    in_turn = "give the methods their steps in turn, so that a noisy machine hits all of them alike"
    run.add_argument("--interleave", action=argparse.BooleanOptionalAction, default=True, help=in_turn)
    common = {**ALONE, "dropout": 0.0, "sketch_batches": 8, "eval_every": 0, "optimizer": "adamw", "quick": False}
    values = _values(parser, argv, FINE_TUNING, common)
    values["methods"] = tuple(dict.fromkeys([*values["methods"], *["fused_loss"] * values.pop("fused_loss", False)]))
    if "fused_loss" in values["methods"] and values["task"] != "language":
        parser.error(f"--fused-loss: got --task {values['task']}, want language, whose loss is over a vocabulary")
    for option, common in (("shard", "none"), ("base", "full")):
        if values[option] != common and values["task"] != "language":
            parser.error(f"--{option} {values[option]}: got --task {values['task']}, want language")
    if values["base"] != "full":
        if values["model"] == "random" or "full" in values["methods"] or values["method"] == "dora":
            parser.error(f"--base {values['base']}: want a --model with files, no --methods full, and no --method dora")
        if values["init"] not in ("kaiming", "gaussian", "lora_ga") or {"group", "mlp"} & {*values}:
            parser.error(f"--base {values['base']}: want --init kaiming, gaussian or lora_ga, no --group and no --mlp")
    return FineTuning(**{"group": None, "mlp": None, **values})


def parse_comparison(argv: list[str] | None = None) -> Comparison:
    parser, training, _, run = _program(
        "compare",
        "Compare ways to fine-tune on one task, over several seeds: with one learning rate for all, and "
        "each at its own best. Goes on where it was interrupted.",
        COMPARISON,
    )
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="what trains adapters or weights (default adamw)"
    )
    training.add_argument("--lr", type=positive_float, help="the one rate for all; searches start around it")
    training.add_argument("--seeds", type=positive_int, help="trained and tested in both protocols (default 3)")
    training.add_argument(
        "--search-seeds", type=positive_int, help="further seeds, for choosing each contestant's best rate"
    )
    run.add_argument("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS))
    run.add_argument("--timed-rounds", type=positive_int, help="steps of each contestant that are timed")
    run.add_argument("--quick", action="store_true", help="a few steps of each, without a search; into OUT/quick")
    values = _values(parser, argv, COMPARISON, {**ALONE, "seeds": 3})
    known, left_out = by_optimizer(values["optimizer"])
    chosen = tuple(dict.fromkeys(values.pop("contestants", known)))
    impossible = [name for name in chosen if name in left_out]
    if impossible:
        name = impossible[0]
        parser.error(f"--contestants {name}: not with --optimizer {values['optimizer']}: {left_out[name]}")
    return Comparison(**values, contestants=chosen)


def by_optimizer(optimizer: str) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants that have a meaning with an optimiser, and the others with the reason."""
    left_out = {name: entry.without[optimizer] for name, entry in CONTESTANTS.items() if optimizer in entry.without}
    return {name: entry for name, entry in CONTESTANTS.items() if name not in left_out}, left_out


def _program(name: str, description: str, by_task: Mapping[str, Mapping[str, Any]]) -> tuple[Any, Any, Any, Any]:
    """A parser with the options of both programs, and its groups for training, LoRA and the run. What a task has a
    default for is None until `_values`.
    """
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        epilog=_defaults(by_task),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks, out = list(by_task), Path("runs", name)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive_int, help="optimizer steps per method")
    training.add_argument("--batch-size", "--batch", type=positive_int)
    training.add_argument("--max-length", "--seq-len", type=positive_int, help="tokens of an example at most")
    training.add_argument("--head-lr", type=positive_float, help="learning rate of a new linear head")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--r", "--rank", type=positive_int, help="rank of the adapters (torchrun takes --r for its own)")
    lora.add_argument("--lora-alpha", type=positive_float)
    lora.add_argument("--dropout", type=probability, help="dropout on the adapters' input")
    lora.add_argument("--sketch-batches", type=positive_int, help="batches whose gradient LoRA-GA looks at")
    lora.add_argument("--sketch-width", type=positive_int, help="columns it keeps of a gradient (default fastlora's)")
    run = parser.add_argument_group("run")
    run.add_argument("--task", choices=tasks, default=tasks[0], help=f"what is learnt (default {tasks[0]})")
    run.add_argument("--model", help="smollm2 or minilm (the task's), random, a directory, or a hub id")
    run.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    run.add_argument(
        "--dtype", choices=("auto", *DTYPES), help="of the model; adapters are float32. auto: bfloat16 on a GPU"
    )
    run.add_argument("--eval-every", type=natural_int, help="steps between validations; 0: none but the last")
    run.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the loss curves")
    run.add_argument("--out", type=Path, default=out, help=f"directory for the results (default {out})")
    return parser, training, lora, run


def _values(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    programs: Mapping[str, Mapping[str, Any]],
    common: Mapping[str, Any],
) -> dict[str, Any]:
    """What was given, over the program's defaults for the task, over the task's own."""
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    task = given["task"]
    defaults = {**common, **OF_A_TASK[task], **programs[task]}
    if isinstance(defaults["lr"], Mapping):
        defaults["lr"] = defaults["lr"][given["optimizer"]]
    own = dict.fromkeys(("max_length", "head_lr", "model", "dtype"))
    unknown = [name for name in own if name in given and name not in defaults]
    if unknown:
        parser.error(f"--{unknown[0].replace('_', '-')}: the task {task} has no such setting")
    if given.get("quick"):
        defaults |= QUICK | ({"max_length": QUICK_LENGTHS[task]} if task in QUICK_LENGTHS else {})
        given["out"] /= "quick"
    return {**own, **defaults, **given}


def _defaults(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    def text(value: Any) -> str:
        return "/".join(f"{lr:g}" for lr in value.values()) if isinstance(value, Mapping) else str(value)

    lines = [
        f"  {task}: "
        + ", ".join(f"{name.replace('_', '-')} {text(value)}" for name, value in {**OF_A_TASK[task], **values}.items())
        for task, values in tasks.items()
    ]
    return "\n".join([f"defaults by task (two rates: {'/'.join(OPTIMIZERS)}):", *lines])


def _number(kind: Callable[[str], float], accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def parse_number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"want {wanted}, got {text!r}") from None
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"want {wanted}, got {text}")
        return value

    return parse_number


positive_int = _number(int, lambda value: value > 0, "a positive integer")
natural_int = _number(int, lambda value: value >= 0, "an integer, 0 or more")
seed = _number(int, lambda value: 0 <= value < 2**32, "an integer from 0 to 2**32 - 1")
positive_float = _number(float, lambda value: 0 < value < float("inf"), "a positive number")
probability = _number(float, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def init(text: str) -> str:
    if text not in INITS and not re.fullmatch(r"pissa_niter_\d+", text):
        raise argparse.ArgumentTypeError(f"want one of {', '.join(INITS)}, pissa_niter_<N>, got {text!r}")
    return text


def run_program(
    name: str, action: Callable[[], int], packages: Iterable[str], plot: bool, folder: Path, interrupted: str
) -> int:
    """The exit status of `action`, once what it needs is there; errors and Ctrl-C are a line. Of several processes the
    first one prints; the others say what went wrong in them alone.
    """
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os.environ["FASTLORA_PROGRESS"] = "off"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler would announce itself
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        require_installed(["torch", *packages], plot)
        require_writable(folder)
        return action()
    except (UsageError, OSError, RuntimeError, ValueError) as error:
        if first or not isinstance(error, UsageError):
            print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        written = folder.is_dir() and any(folder.iterdir())
        print(f"\n{name}: interrupted; {interrupted if written else 'nothing was written yet'}", file=sys.stderr)
        return INTERRUPTED


def require_installed(packages: Iterable[str], plot: bool) -> None:
    """Raises UsageError that names the packages this run needs (and, with `plot`, what draws) and does not find."""
    needed = [*packages, *(["matplotlib"] if plot else [])]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        hint = " (or pass --no-plot)" if missing == ["matplotlib"] else ""
        raise UsageError(
            f"not installed: {', '.join(missing)}{hint}. "
            "In fastlora's checkout: pip install -c constraints.txt '.[examples]'"
        )


def require_writable(directory: Path) -> None:
    """Makes `directory`; raises UsageError where it cannot be made or written to, before anything is trained."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(f"--out {os.fspath(directory)}: cannot write there ({error.strerror or error})") from error


def choose_device(name: str) -> Any:
    """The torch device called `name`; raises UsageError where there is none such."""
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if local := os.environ.get("LOCAL_RANK"):  # one process of torchrun's a GPU
            torch.cuda.set_device(int(local))
            name = f"cuda:{local}"
        else:
            name = "cuda"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them for some device
        available = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UsageError(
            f"--device {name}: not a device of this machine; want one of {', '.join(available)}"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda can be measured here")
    return device
