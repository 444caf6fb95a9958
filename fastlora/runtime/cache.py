"""The file that keeps what was measured: how long each backend takes on this GPU, for each kind of call.

One JSON file per environment (GPU, torch, triton, the kernels' own source), under `FASTLORA_CACHE_DIR`/measured: a
second GPU of the same kind shares it, another torch does not. It holds times and not choices, so that a better rule for
choosing needs no new measurement.

Writing merges with what other processes have written meanwhile, under a lock where the file system has one, into a
temporary file that is renamed: readers see the old file or the new one. Nothing here may stop a training run: a file
that cannot be read is ignored, with one warning; one that cannot be written leaves the times in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import env
from .build import locked

VERSION = 1
DIRECTIONS = ("forward", "backward")
LOCK_WAIT_S = 2.0  # a stale lock (of a hung machine on a network file system) must not hold up training

logger = logging.getLogger("fastlora")

Entry = dict[str, Any]  # {"forward": {candidate: seconds}, "backward": ..., "left_out": {candidate: why}}


class TuningCache:
    """Entries by key, in memory and in `path` (None: in memory only). A process reads the file once, and again before
    it measures or writes."""

    def __init__(self, path: Path | None, environment: dict[str, str]) -> None:
        self.path = path
        self.environment = environment
        self.entries: dict[str, Entry] = {}
        self.unwritable: str | None = None  # why the latest write failed
        self._seen: tuple[int, int] | None = None
        self._warned = False

    def refresh(self) -> None:
        """Takes in what the file has gained since it was last read; what this process measured itself stays."""
        if self.path is None:
            return
        try:
            found = os.stat(self.path)
        except OSError:
            return
        if (found.st_mtime_ns, found.st_size) != self._seen:
            self._seen = (found.st_mtime_ns, found.st_size)
            self.entries = self._read() | self.entries

    def forget(self, key: str) -> None:
        """Drops an entry, in this process only, so that it is measured again."""
        self.refresh()
        self.entries.pop(key, None)

    def put(self, key: str, entry: Entry) -> None:
        """Keeps an entry, in the file too where that can be written."""
        self.entries[key] = entry
        if self.path is None:
            return
        try:
            self._write({key: entry})
            self.unwritable = None
        except OSError as error:
            if self.unwritable is None:
                logger.warning(
                    "measured times are kept for this process only: %s cannot be written (%s). Set FASTLORA_CACHE_DIR "
                    "to a place that can.",
                    self.path,
                    error.strerror or error,
                )
            self.unwritable = str(error.strerror or error)

    def _read(self) -> dict[str, Entry]:
        assert self.path is not None
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["version"] != VERSION or found["environment"] != self.environment:
                return {}  # another version of this format, or a file that was copied here
            entries = found["entries"]
            for entry in entries.values():
                _check(entry)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"fastlora: measured times in {self.path} cannot be read and are ignored "
                    f"({type(error).__name__}: {error}); what is measured now replaces them",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return {}
        return entries

    def _write(self, new: dict[str, Entry]) -> None:
        """The file's entries with the new ones, whatever else this process has read or measured meanwhile."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_suffix(".lock"), LOCK_WAIT_S):
            entries = self._read() | new
            text = json.dumps(
                {"version": VERSION, "environment": self.environment, "entries": dict(sorted(entries.items()))},
                indent=1,
            )
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.replace(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise


def _check(entry: Any) -> None:
    """Raises ValueError, KeyError or the like for what is no entry."""
    for direction in DIRECTIONS:
        for name, seconds in entry[direction].items():
            if type(seconds) is not float or not math.isfinite(seconds) or seconds <= 0.0:
                raise ValueError(f"{direction} of {name}: got {seconds!r}, want positive seconds")


@functools.cache
def for_device(device: torch.device) -> TuningCache:
    """The cache of a device, read from its file. One object per device and process."""
    environment = environment_of(device)
    try:
        folder = env.cache_dir()
    except ValueError as error:  # no home directory
        logger.warning("measured times are kept for this process only: %s", error)
        return TuningCache(None, environment)
    cache = TuningCache(folder / "measured" / file_name(environment), environment)
    cache.refresh()
    return cache


def file_name(environment: dict[str, str]) -> str:
    """The GPU's name, for people, and a digest of everything."""
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(letter if letter.isalnum() else "-" for letter in environment["device"].lower())
    return f"{name}-{digest}.json"


def environment_of(device: torch.device) -> dict[str, str]:
    """What measured times are good for."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        # The multiprocessors tell a slice of a GPU (MIG) from the whole.
        name = f"{found.name}, {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"
    else:
        name = device.type
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "kernels": kernels_version(),
    }


def _triton_version() -> str:
    for package in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "none"


@functools.cache
def kernels_version() -> str:
    """A digest of the kernels' and the backends' source: a changed kernel is measured again."""
    here = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("kernels", "ops"):
        for path in sorted((here / folder).glob("**/*.py")):
            with contextlib.suppress(OSError):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
