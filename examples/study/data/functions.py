"""Pairs of text from Python's standard library: a function without its docstring, and that docstring's first line.

As in docstrings.py nothing is imported or run, and test suites are left out. A function counts where its docstring's
first paragraph has 15 to 140 characters and the rest of it at most 500; a source that occurs twice is kept once. A hash
of its module's path decides which part of the split it belongs to, so that no module is both trained and tested on.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from study.data.docstrings import part_of, source_files, text_hash

ANSWER, SOURCE = range(15, 141), 500  # characters


class Pair(NamedTuple):
    source: str
    answer: str


def load(root: Path | None = None) -> dict[str, list[Pair]]:
    """The pairs of each part, in an order that depends on the texts alone.

    Raises RuntimeError where the sources under `root` (default: this Python's standard library) do not fill each part.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    parts: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for path in source_files(root):
        part = parts[part_of(path.relative_to(root).as_posix())]
        for pair in pairs_of(path):
            if pair.source not in seen:
                seen.add(pair.source)
                part.append(pair)
    if not all(parts.values()):
        counts = ", ".join(f"{len(pairs)} for {part}" for part, pairs in parts.items())
        raise RuntimeError(
            f"found functions with docstrings under {root}: {counts}; want some for each "
            "(is Python installed with the sources of its standard library?)"
        )
    return {part: sorted(pairs, key=lambda pair: text_hash(pair.source)) for part, pairs in parts.items()}


def pairs_of(path: Path) -> Iterator[Pair]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # samples of other Pythons
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if len(answer) not in ANSWER or len(node.body) == 1:
            continue
        body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
        source = f"def {node.name}({ast.unparse(node.args)}):\n" + "\n".join(f"    {line}" for line in body.split("\n"))
        if len(source) <= SOURCE:
            yield Pair(source, answer)
