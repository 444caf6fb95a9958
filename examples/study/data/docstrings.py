"""The data set: which module of Python's standard library did this docstring come from?

The text is on every machine that has Python. Every source file of the standard library is parsed with `ast` (nothing is
imported or run); each docstring of a module, class, function or method is one example, and the top-level module it was
found in is its class. Only the docstring itself is the input: no name, no signature, no code.

What is left out: test suites and installed packages; docstrings of fewer than three words; repeats, compared without
case and white space, so that no text is both trained and tested on; and a text found in two modules, which has no right
answer. A docstring that names its own module stays (docs/details/finetuning.md says how many do).

The split is decided by a hash of each text alone, so it is the same on every machine, and a Python release that adds a
docstring moves no other.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo", "__pycache__"}
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MIN_WORDS = 3
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1


@dataclass(frozen=True)
class Example:
    text: str
    label: int


@dataclass(frozen=True)
class Dataset:
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.train) + len(self.validation) + len(self.test)


def load(root: Path | None = None, *, max_classes: int = 25, max_per_class: int = 250) -> Dataset:
    """The `max_classes` top-level modules with most docstrings under `root` (default: this Python's standard library),
    split in three.

    Raises RuntimeError where the sources do not give two classes with examples in each part of the split.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    by_module = _texts_by_module(root)
    largest = sorted(by_module, key=lambda module: (-len(by_module[module]), module))[:max_classes]
    labels = tuple(sorted(largest))
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for label, module in enumerate(labels):
        for text in sorted(by_module[module], key=text_hash)[:max_per_class]:
            parts[part_of(text)].append(Example(text, label))
    if len(labels) < 2 or not all(parts.values()):
        found = sum(map(len, by_module.values()))
        raise RuntimeError(
            f"found {found} docstrings in {len(by_module)} modules under {root}: too few to train on "
            "(is Python installed with the sources of its standard library?)"
        )
    return Dataset(labels, *(tuple(parts[part]) for part in ("train", "validation", "test")))


def _texts_by_module(root: Path) -> dict[str, list[str]]:
    """The distinct docstrings of each top-level module; those of more than one module are nobody's."""
    first_spelling: dict[str, str] = {}
    modules: dict[str, set[str]] = {}
    for path in source_files(root):
        module = path.relative_to(root).parts[0].removesuffix(".py")
        for text in docstrings_of(path):
            key = normalised(text)
            first_spelling.setdefault(key, text)
            modules.setdefault(key, set()).add(module)
    by_module: dict[str, list[str]] = {}
    for key, found_in in modules.items():
        if len(found_in) == 1:
            by_module.setdefault(found_in.copy().pop(), []).append(first_spelling[key])
    return by_module


def source_files(root: Path) -> list[Path]:
    """The Python files under `root` without test suites and installed packages, in an order that is always the same."""
    return [p for p in sorted(root.rglob("*.py")) if not SKIPPED_DIRECTORIES.intersection(p.relative_to(root).parts)]


def docstrings_of(path: Path) -> list[str]:
    """Every docstring of one source file with at least three words; none where the file is not this Python's syntax."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 and idlelib ship samples of other Pythons
        return []
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [text for text in texts if text and len(text.split()) >= MIN_WORDS]


def normalised(text: str) -> str:
    """Without case and white space: what texts are compared by."""
    return " ".join(text.casefold().split())


def text_hash(text: str) -> bytes:
    return hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).digest()


def part_of(text: str) -> str:
    """The part of the split that a text belongs to."""
    # The last bytes, because the first ones decide which texts of a large class are kept: two independent choices.
    position = int.from_bytes(text_hash(text)[-8:], "big") / 2**64
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"
