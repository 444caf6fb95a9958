"""The byte-level GPT's data: Python's standard library to pretrain on, and the texts that `help()` shows to adapt to.

`pydoc_data.topics` holds the chapters of the language reference that the interpreter's `help("topic")` prints. Chapters
contain sections that are topics of their own, so the same paragraph may occur in several: each paragraph, compared
without case and white space, is kept in the first topic that has it, in alphabetical order, and nowhere else.
Which part of the split a topic belongs to is decided by a hash of what is kept of it: no paragraph is in two parts.

The pretraining text is every source file of the standard library but test suites, installed packages and pydoc_data.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path

from study.data.docstrings import normalised, part_of, source_files


def sources(root: Path | None = None) -> bytes:
    """The source files under `root` (default: this Python's standard library), one after another."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    files = [path for path in source_files(root) if "pydoc_data" not in path.relative_to(root).parts]
    return b"\n".join(path.read_bytes() for path in files)


def load(topics: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """The text of each part of the split, topics separated by blank lines."""
    if topics is None:
        import pydoc_data.topics as installed

        topics = installed.topics
    seen: set[str] = set()
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            key = normalised(paragraph)
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if kept:
            text = "\n\n".join(kept)
            parts[part_of(text)].append(text)
    return {part: "\n\n\n".join(texts).encode("utf-8") for part, texts in parts.items()}
