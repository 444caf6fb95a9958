"""The one reader of the ``FASTLORA_*`` environment variables.

Every variable is a row of :data:`VARIABLES`: its meaning, its default and the parser of its value. The rest of the
project calls the functions at the end, which read the environment at each call, so that a test or a notebook can
change a variable and see the effect. A value that makes no sense raises ``ValueError`` with the variable's name, what
came and what is wanted.

It imports nothing but the standard library: ``setup.py`` uses it where torch may be absent.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "FASTLORA_"
BACKENDS = ("auto", "torch", "cublas", "triton")
LINALG = ("auto", "torch", "native")
MEASURE = ("auto", "off", "always")
PROGRESS = ("auto", "on", "off")


@dataclass(frozen=True)
class Variable:
    """One environment variable: ``parse`` turns its text into a value, or raises ``ValueError(what is wanted)``."""

    name: str
    meaning: str
    default: str  # in words, for people
    default_value: Callable[[], Any]
    parse: Callable[[str], Any]


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.strip().lower()
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return parse


def _flag(text: str) -> bool:
    value = text.strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError("1 or 0")


def _directory(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise ValueError("an absolute path, or one that starts with ~")
    if path.exists() and not path.is_dir():
        raise ValueError("a directory, and this is a file")
    return path


def _cuda_archs(text: str) -> tuple[str, ...]:
    archs = tuple(part for part in re.split(r"[\s,;]+", text.strip()) if part)
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise ValueError("compute capabilities without the dot, separated by commas, such as 80,90a,100")
    return archs


def _default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError as error:  # no HOME and no passwd entry, as in some containers
        raise ValueError(
            f"{PREFIX}CACHE_DIR is not set and there is no home directory: set it to a directory"
        ) from error
    return base / "fastlora"


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable(
            "FASTLORA_BACKEND",
            "the backend of calls that leave it to fastlora (backend='auto'): auto, torch, cublas or triton",
            "auto",
            lambda: "auto",
            _choice(*BACKENDS),
        ),
        Variable(
            "FASTLORA_BUILD_CUDA",
            "1: `pip install --no-build-isolation .` compiles csrc/ into the package, instead of at first use",
            "0",
            lambda: False,
            _flag,
        ),
        Variable(
            "FASTLORA_CACHE_DIR",
            "where what is made once per machine is kept: the compiled csrc/, and measured times",
            "$XDG_CACHE_HOME/fastlora, or ~/.cache/fastlora",
            _default_cache_dir,
            _directory,
        ),
        Variable(
            "FASTLORA_CUDA_ARCHS",
            "the GPUs that csrc/ is compiled for, as compute capabilities: 80,90a,100",
            "80,90a,100",
            lambda: ("80", "90a", "100"),
            _cuda_archs,
        ),
        Variable(
            "FASTLORA_LINALG",
            "which small linear algebra runs (gradient sketches, SVDs): auto, torch or native, that of csrc/",
            "auto",
            lambda: "auto",
            _choice(*LINALG),
        ),
        Variable(
            "FASTLORA_MEASURE",
            "whether a GPU's backends are timed at first use: auto, off, always (profilers, distributed runs too)",
            "auto",
            lambda: "auto",
            _choice(*MEASURE),
        ),
        Variable(
            "FASTLORA_PROGRESS",
            "progress bars on long work: auto (where stderr is a terminal, after two seconds), on, off",
            "auto",
            lambda: "auto",
            _choice(*PROGRESS),
        ),
    )
}


def get(name: str) -> Any:
    """The parsed value of a variable of :data:`VARIABLES`, or its default where it is unset or empty."""
    variable = VARIABLES[name]
    text = os.environ.get(name, "")
    if not text.strip():
        return variable.default_value()
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: wanted {error}") from None


def unknown(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Names in the environment that start with ``FASTLORA_`` and mean nothing, each with the closest known name."""
    names = os.environ if environ is None else environ
    found = {}
    for name in sorted(names):
        if name.startswith(PREFIX) and name not in VARIABLES:
            # Compared without the prefix, which would make every pair look alike.
            known = [known[len(PREFIX) :] for known in VARIABLES]
            close = difflib.get_close_matches(name[len(PREFIX) :], known, n=1)
            found[name] = PREFIX + close[0] if close else None
    return found


def backend() -> str:
    """Which backend runs where a call says ``backend="auto"``; ``"auto"`` lets the dispatcher choose."""
    return get("FASTLORA_BACKEND")


def backend_text() -> str:
    """What ``FASTLORA_BACKEND`` says, unparsed and quickly: what is kept from call to call is kept under this."""
    # Not `get`, which raises and catches KeyError inside where the variable is unset: twice the time.
    return os.environ["FASTLORA_BACKEND"] if "FASTLORA_BACKEND" in os.environ else ""  # noqa: SIM401


def build_cuda() -> bool:
    """Whether installing the package compiles ``csrc/``."""
    return get("FASTLORA_BUILD_CUDA")


def cache_dir() -> Path:
    """The directory for everything fastlora keeps between processes. It may not exist yet."""
    return get("FASTLORA_CACHE_DIR")


def cuda_archs() -> tuple[str, ...]:
    """Compute capabilities that ``csrc/`` is compiled for, such as ``("80", "90a", "100")``."""
    return get("FASTLORA_CUDA_ARCHS")


def linalg() -> str:
    """Which implementation :mod:`fastlora.linalg.native` takes; ``"auto"`` lets it choose."""
    return get("FASTLORA_LINALG")


def measure() -> str:
    """Whether the dispatcher may time backends at first use."""
    return get("FASTLORA_MEASURE")


def progress() -> str:
    """Whether long work shows a progress bar."""
    return get("FASTLORA_PROGRESS")
