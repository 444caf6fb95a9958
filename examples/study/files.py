"""Files that are whole whenever the process ends, and results kept in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """So that `path` holds the old text or the new one, whenever the process ends."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` if that succeeds, and goes away if not (a full disk)."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def kept(path: Path, facts: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What `make()` returned (of JSON's types) when it was last called with the same `facts`; else it is called now,
    and `path` keeps that.
    """
    facts = json.loads(json.dumps(facts))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["facts"] == facts:
            return content["result"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = json.loads(json.dumps(make()))
    write_atomically(path, json.dumps({"facts": facts, "result": result}, allow_nan=False) + "\n")
    return result
