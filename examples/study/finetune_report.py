"""What a run leaves behind: one table (printed, Markdown), everything in JSON, and the loss curves."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from study.settings import Settings
from study.training import Run

SMOOTHING = 10


@dataclass(frozen=True)
class Row:
    """One method's line of the table; None is 'not measured'."""

    method: str
    title: str
    trainable: int
    steps: int
    steps_per_second: float | None
    speed_beside_peft: float | None
    peak_bytes: int | None
    final_loss: float | None
    validation_accuracy: float | None
    test_accuracy: float | None


def summarise(runs: Sequence[Run], test_accuracy: dict[str, float]) -> list[Row]:
    peft = next((run for run in runs if run.method == "peft"), None)
    return [
        Row(
            method=run.method,
            title=run.title,
            trainable=run.trainable,
            steps=len(run.losses),
            steps_per_second=1 / statistics.median(run.timed_seconds()) if run.timed_seconds() else None,
            speed_beside_peft=_speed_beside(run, peft) if peft else None,
            peak_bytes=run.peak_bytes,
            final_loss=run.final_loss(),
            validation_accuracy=run.validation[-1][1] if run.validation else None,
            test_accuracy=test_accuracy.get(run.method),
        )
        for run in runs
    ]


def _speed_beside(run: Run, other: Run) -> float | None:
    """How many times faster than `other`: the median over steps of the ratio of the two times for the same batch."""
    ratios = [theirs / ours for ours, theirs in zip(run.timed_seconds(), other.timed_seconds())]
    return statistics.median(ratios) if ratios else None


def markdown_table(rows: Sequence[Row]) -> str:
    header = ("method", "trainable", "steps/s", "× PEFT", "peak memory", "final loss", "test accuracy")
    body = [
        (
            row.title,
            f"{row.trainable:,}",
            _text(row.steps_per_second, "{:.2f}"),
            _text(row.speed_beside_peft, "{:.2f}"),
            _text(row.peak_bytes and row.peak_bytes / 2**20, "{:.0f} MiB"),
            _text(row.final_loss, "{:.3f}"),
            _text(row.test_accuracy and 100 * row.test_accuracy, "{:.1f} %"),
        )
        for row in rows
    ]
    return format_table(header, body)


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


def _text(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


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


def caption(settings: Settings, facts: dict[str, Any]) -> str:
    """One sentence or two that the table must not travel without."""
    machine, data = facts["machine"], facts["data"]
    turns = "the methods took their steps in turn" if settings.interleave else "the methods ran one after another"
    end = "" if facts["complete"] else "; interrupted, so not tested"
    return (
        f"{settings.steps} steps of {settings.batch_size} docstrings, {data['train']} to train on and {data['test']} "
        f"to test; r = {settings.r}, {settings.dtype}, seed {settings.seed}; {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, PEFT {machine['peft']}, Python {machine['python']}; "
        f"{turns}, steps/s from the median step, × PEFT from the median ratio of the same steps; "
        f"{facts['seconds']:.0f} s for everything{end}."
    )


def save_results(
    settings: Settings, rows: Sequence[Row], runs: Sequence[Run], facts: dict[str, Any], caption: str
) -> list[Path]:
    """Writes results.json and results.md under the run's directory; returns their paths."""
    results = {
        "settings": {
            key: os.fspath(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()
        },
        **facts,
        "table": [asdict(row) for row in rows],
        "history": {
            run.method: {
                "loss": run.losses,
                "step_seconds": [None if math.isnan(seconds) else seconds for seconds in run.step_seconds],
                "validation_accuracy": run.validation,
            }
            for run in runs
        },
    }
    files = [settings.out / "results.json", settings.out / "results.md"]
    files[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    files[1].write_text(f"{markdown_table(rows)}\n\n{caption}\n", encoding="utf-8")
    return files


def plot_losses(runs: Sequence[Run], path: Path) -> Path:
    """Draws the training loss over steps and over training time, a running mean of ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run, style in zip(runs, ("-", "-", "--", "-.")):
        losses = _running_mean(run.losses)
        typical = statistics.median(run.timed_seconds() or [0.0])
        seconds = torch.tensor([typical if math.isnan(s) else s for s in run.step_seconds]).cumsum(0).tolist()
        by_step.plot(range(1, len(losses) + 1), losses, style, label=run.title)
        by_time.plot(seconds, losses, style, label=run.title)
    by_step.set(xlabel="step", ylabel=f"training loss (mean of {SMOOTHING} steps)")
    by_time.set(xlabel="seconds spent in this method's steps")
    by_step.legend()
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _running_mean(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(values))]
