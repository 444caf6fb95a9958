"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from study.processes import FIRST

LINES = 10
FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar:4}| {elapsed}<{remaining}{postfix}"  # short: losses fit into 80 columns


class Progress:
    """tqdm where standard error is a terminal and tqdm is installed; otherwise about ten plain lines (or `lines`) over
    the whole run. A step is done when each of its `parts` is.
    """

    def __init__(self, total: int, title: str, lines: int = LINES, parts: int = 1, done: int = 0):
        self.total, self.title, self.lines, self.parts, self.done = total * parts, title, lines, parts, done
        self.start = time.perf_counter()
        self.bar: Any = None
        if not FIRST:
            self.lines = 0
        elif sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            columns, rows = shutil.get_terminal_size()  # a pseudo-terminal may claim 0 × 0, and tqdm would believe it
            size: dict[str, Any] = {"ncols": columns, "nrows": rows, "initial": done // parts}
            self.bar = tqdm(total=total, desc=title, leave=lines > 0, bar_format=FORMAT, **size)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, status: str) -> None:
        """One more part of a step done; `status` is what to say about it."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update(self.done % self.parts == 0)
        elif self.done * self.lines // self.total > (self.done - 1) * self.lines // self.total:
            seconds = time.perf_counter() - self.start
            print(
                f"{self.title}: {self.done // self.parts}/{self.total // self.parts} steps, {seconds:.0f} s; {status}",
                file=sys.stderr,
                flush=True,
            )
