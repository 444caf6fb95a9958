"""The command line of finetune.py and its checks. Imports neither torch nor transformers, so that --help and mistakes
are answered at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = ("head", "peft", "fastlora", "full")
DEFAULT_METHODS = ("head", "peft", "fastlora")
DTYPES = ("float32", "bfloat16")
ORDINARY_INITS = ("kaiming", "gaussian", "orthogonal")  # BA is zero: PEFT's adapters can start from the same numbers
INITS = (*ORDINARY_INITS, "pissa", "olora", "lora_ga")


class UsageError(Exception):
    """A request that cannot be met; the message says what came and what is wanted."""


@dataclass(frozen=True)
class Settings:
    """What one run of the example does; docs/finetuning.md explains the defaults."""

    steps: int
    batch_size: int
    max_length: int
    r: int
    lora_alpha: float
    dropout: float
    init: str
    gamma: float
    sketch_batches: int
    lr: float
    head_lr: float
    full_lr: float
    methods: tuple[str, ...]
    model: str
    device: str
    dtype: str
    seed: int
    eval_every: int
    interleave: bool
    plot: bool
    out: Path


def parse(argv: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune a sentence encoder to tell which module of Python's standard library a docstring came "
        "from, by several methods, and compare their speed, memory and accuracy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    training, lora, run = add_shared_options(parser)
    training.add_argument("--full-lr", type=positive_float, default=2e-4, help="the encoder's, for --methods full")
    training.add_argument("--seed", type=seed, default=0)
    lora.add_argument("--lr", type=positive_float, default=1e-3, help="learning rate of the adapters")
    lora.add_argument("--init", type=init, default="kaiming", help="how fastlora's adapters start: " + ", ".join(INITS))
    lora.add_argument("--gamma", type=positive_float, default=16.0, help="γ of --init lora_ga: larger starts smaller")
    run.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(DEFAULT_METHODS),
        metavar="METHOD",
        help=", ".join(METHODS),
    )
    run.add_argument(
        "--interleave",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="give the methods their steps in turn, so that a noisy machine hits all of them alike",
    )
    values = vars(parser.parse_args(argv))
    values["methods"] = tuple(dict.fromkeys(values["methods"]))
    return Settings(**values)


def add_shared_options(parser: argparse.ArgumentParser) -> tuple[Any, Any, Any]:
    """Adds the options that compare.py has too, with finetune.py's defaults; returns the parser's three groups."""
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive_int, default=200, help="optimizer steps per method")
    training.add_argument("--batch-size", type=positive_int, default=32)
    training.add_argument("--max-length", type=positive_int, default=48, help="tokens kept of each docstring")
    training.add_argument("--head-lr", type=positive_float, default=3e-2, help="learning rate of the linear head")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--r", type=positive_int, default=8, help="rank of the adapters")
    lora.add_argument("--lora-alpha", type=positive_float, default=16.0)
    lora.add_argument("--dropout", type=probability, default=0.0, help="dropout on the adapters' input")
    lora.add_argument(
        "--sketch-batches",
        type=positive_int,
        default=8,
        help="batches whose gradient LoRA-GA looks at before it starts",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--model", default="minilm", help="minilm, or a directory or cached name of another encoder")
    run.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    run.add_argument("--dtype", choices=DTYPES, default="float32", help="of the encoder; adapters and head are float32")
    run.add_argument("--eval-every", type=natural_int, default=100, help="steps between validations; 0: none")
    run.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the loss curves")
    run.add_argument("--out", type=Path, default=Path("runs/finetune"), help="directory for the results")
    return training, lora, run


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


def require_packages(settings: Settings) -> None:
    """Raises UsageError that names the packages this run needs and does not find, and how to install them."""
    needed = ["torch", "transformers", "safetensors"]
    if "peft" in settings.methods or "fastlora" in settings.methods:
        needed.append("peft")
    if "fastlora" in settings.methods:
        needed.append("fastlora")
    require_installed(needed, settings.plot)


def require_installed(packages: Iterable[str], plot: bool) -> None:
    """As `require_packages`, for `packages` and, with `plot`, what draws."""
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
