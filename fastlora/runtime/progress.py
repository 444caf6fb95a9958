"""Progress bars for what can take long: SVDs over many layers, a search for each, a model's layers one by one.

Quiet by default where nobody looks: a bar appears only where stderr is a terminal, and only once the work has taken two
seconds. `FASTLORA_PROGRESS` forces it on (a notebook) or off. tqdm draws it; it is not a dependency (peft and
transformers bring it), and without it there is no bar. In a distributed run the first process alone has one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from . import env

T = TypeVar("T")
DELAY = 2.0  # seconds of work before a bar appears


def bar(items: Iterable[T], description: str, total: int, unit: str = "layer") -> Iterator[T]:
    """`items`, one by one, with a bar that counts them up to `total` where one is wanted."""
    if total < 2 or not wanted():
        yield from items
        return
    from tqdm.auto import tqdm

    delay = 0.0 if env.progress() == "on" else DELAY
    # leave=False: a bar that is done says nothing any more, and the caller's own output stays as it was.
    yield from tqdm(items, desc=f"fastlora: {description}", total=total, unit=unit, delay=delay, leave=False)


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
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
