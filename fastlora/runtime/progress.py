"""Progress bars for what can take long: SVDs over many layers, a search for each, a model's layers one by one.

Quiet by default where nobody looks: a bar appears only where stderr is a terminal, and only once the work has taken two
seconds. `FASTLORA_PROGRESS` forces it on (a notebook) or off. tqdm draws it; it is not a dependency (peft and
transformers bring it), and without it there is no bar. In a distributed run the first process alone has one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from . import env, processes

T = TypeVar("T")
DELAY = 2.0  # seconds of work before a bar appears


def bar(items: Iterable[T], description: str, total: int, unit: str = "layer") -> Iterator[T]:
    """`items`, one by one, with a bar that counts them up to `total` where one is wanted."""
    shown = counter(description, total, unit) if total > 1 else None
    try:
        for item in items:
            yield item
            if shown is not None:
                shown.update()
    finally:
        if shown is not None:
            shown.close()


def counter(description: str, total: int | None = None, unit: str = "layer") -> Any:
    """A tqdm bar for the caller to `update` and to `close`, or None where none is wanted."""
    if not wanted():
        return None
    from tqdm.auto import tqdm

    delay = 0.0 if env.progress() == "on" else DELAY
    # leave=False: a bar that is done says nothing any more, and the caller's own output stays as it was.
    return tqdm(desc=f"fastlora: {description}", total=total, unit=unit, delay=delay, leave=False)


def wanted() -> bool:
    """Whether a bar may be drawn now."""
    choice = env.progress()
    if choice == "off" or (choice == "auto" and not _is_terminal()) or not _is_first_process():
        return False
    try:
        import tqdm.auto  # noqa: F401
    except ImportError:
        return False
    return True


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None under pythonw, closed, or an object of somebody's own
        return False


def _is_first_process() -> bool:
    return not processes.running() or torch.distributed.get_rank() == 0
