"""What every report has: tables in Markdown, and what a number was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def format_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns lined up, the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    lines = [
        _line(header, widths),
        "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|",
    ]
    return "\n".join(lines + [_line(cells, widths) for cells in body])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths)))
    return "| " + " | ".join([first, *rest]) + " |"


def machine(device: torch.device) -> dict[str, Any]:
    """Where a number was measured: processor or GPU, and the versions that matter."""
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("fastlora", "peft", "transformers")},
    }
    if hasattr(os, "getloadavg"):
        facts["load average at the end"] = round(os.getloadavg()[0], 1)
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
