"""A comparison's table (Markdown), everything behind it (JSON), and its curves (PNG)."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from contestants import BASELINE, CONTESTANTS
from curves import band, running_mean, steps_to
from report import format_table, machine
from settings import Settings
from trials import Trial, write_atomically

if TYPE_CHECKING:
    from compare import Rates

WINDOW = 20  # steps that a training loss is the mean of
NEVER = "not reached"


class Spread(NamedTuple):
    """Mean, smallest and largest over the seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One contestant at its best rate. `steps_to_baseline`: per seed, the steps after which its training loss is first
    the baseline's final one with that seed; empty where the baseline did not take part. `diverged` seeds count in
    nothing else.
    """

    contestant: str
    lr: float
    trainable: int
    final_loss: Spread | None
    validation_loss: Spread | None
    test_accuracy: Spread | None
    steps_to_baseline: list[int | None]
    diverged: int


def summarise(rates: Mapping[str, Rates], finals: Mapping[str, Sequence[Trial]]) -> list[Row]:
    targets = {trial.seed: running_mean(trial.losses, WINDOW)[-1] for trial in _finished(finals.get(BASELINE, ()))}
    rows = []
    for name, trials in finals.items():
        finished = _finished(trials)
        rows.append(
            Row(
                contestant=name,
                lr=rates[name].best,
                trainable=trials[0].trainable,
                final_loss=_spread([running_mean(trial.losses, WINDOW)[-1] for trial in finished]),
                validation_loss=_spread([trial.score for trial in finished]),
                test_accuracy=_spread([t.test_accuracy for t in finished if t.test_accuracy is not None]),
                steps_to_baseline=[
                    steps_to(trial.losses, targets[trial.seed], WINDOW) for trial in finished if trial.seed in targets
                ],
                diverged=len(trials) - len(finished),
            )
        )
    return rows


def _finished(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if not trial.diverged]


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(statistics.fmean(values), min(values), max(values)) if values else None


def table(rows: Sequence[Row]) -> str:
    """Mean (smallest to largest) over the seeds; the steps of each seed."""
    baseline = CONTESTANTS[BASELINE].title
    header = (
        "",
        "learning rate",
        "trainable",
        "final loss",
        f"steps to {baseline}'s",
        "validation loss",
        "test accuracy",
    )
    body = [
        (
            CONTESTANTS[row.contestant].title + (f" ({row.diverged} diverged)" if row.diverged else ""),
            f"{row.lr:g}",
            f"{row.trainable:,}",
            _text(row.final_loss, "{:.3f}"),
            ", ".join(NEVER if steps is None else str(steps) for steps in row.steps_to_baseline) or "not measured",
            _text(row.validation_loss, "{:.3f}"),
            _text(row.test_accuracy and Spread(*(100 * value for value in row.test_accuracy)), "{:.1f}", " %"),
        )
        for row in rows
    ]
    return format_table(header, body)


def _text(spread: Spread | None, form: str, unit: str = "") -> str:
    if spread is None:
        return "not measured"
    mean, low, high = (form.format(value) for value in spread)
    return f"{mean}{unit} ({low} to {high})"


def search_table(rates: Mapping[str, Rates]) -> str:
    """The validation loss at each learning rate; the best of a line in bold."""
    columns = sorted({lr for found in rates.values() for lr in found.losses})

    def cell(found: Rates, lr: float) -> str:
        loss = found.losses.get(lr)
        text = "" if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "diverged"
        return f"**{text}**" if lr == found.best else text

    body = [(CONTESTANTS[name].title, *(cell(found, lr) for lr in columns)) for name, found in rates.items()]
    return format_table(("learning rate", *(f"{lr:g}" for lr in columns)), body)


def caption(base: Settings, facts: Mapping[str, Any], rates: Mapping[str, Rates], seeds: int, device: Any) -> str:
    """What the table must not travel without."""
    where = machine(device)
    edge = [CONTESTANTS[name].title for name, found in rates.items() if found.losses and not found.inside]
    return (
        f"{base.steps} steps of {base.batch_size} docstrings cut at {base.max_length} tokens, r = {base.r}, "
        f"{base.dtype}; {facts['train']} texts to train on, {facts['validation']} to validate, {facts['test']} to "
        f"test. Learning rates chosen by validation loss with other seeds than the {seeds} of the table; the head's is "
        f"{base.head_lr:g} in all. Mean (smallest to largest) over the seeds; the final loss is the mean training loss "
        f"of the last {WINDOW} steps. {where['device']}, torch {where['torch']}, Python {where['python']}."
        + (f" At the edge of the rates tried: {', '.join(edge)}." if edge else "")
    )


def save(
    base: Settings,
    facts: Mapping[str, Any],
    rates: Mapping[str, Rates],
    finals: Mapping[str, Sequence[Trial]],
    rows: Sequence[Row],
    device: torch.device,
) -> list[Path]:
    """Writes results.md, results.json and, if it is wanted, loss.png; returns their paths."""
    seeds = max(map(len, finals.values()))
    text = f"{table(rows)}\n\n{caption(base, facts, rates, seeds, device)}\n"
    if any(found.losses for found in rates.values()):
        text += f"\nValidation loss by learning rate:\n\n{search_table(rates)}\n"
    results = {
        "facts": facts,
        "machine": machine(device),
        "commit": _commit(),
        "window": WINDOW,
        "table": [asdict(row) for row in rows],
        "search": {
            name: {f"{lr:g}": loss if math.isfinite(loss) else None for lr, loss in found.losses.items()}
            for name, found in rates.items()
        },
        "trials": {name: [_trial(trial) for trial in trials] for name, trials in finals.items()},
    }
    files = [base.out / "results.md", base.out / "results.json"]
    write_atomically(files[0], text)
    write_atomically(files[1], json.dumps(results, allow_nan=False) + "\n")
    if base.plot:
        files.append(plot(rates, finals, base.out / "loss.png"))
    return files


def _trial(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "losses": [round(loss, 5) for loss in trial.losses]}


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plot(rates: Mapping[str, Rates], finals: Mapping[str, Sequence[Trial]], path: Path) -> Path:
    """Draws training and validation loss over steps, mean and band (smallest to largest) over the seeds, and the
    search.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (training, validation, search) = pyplot.subplots(1, 3, figsize=(14, 4.2))
    for number, (name, trials) in enumerate(finals.items()):
        finished, color, label = _finished(trials), f"C{number}", CONTESTANTS[name].title
        if finished:
            losses = band([running_mean(trial.losses, WINDOW) for trial in finished])
            last = len(finished[0].losses)
            _draw_band(training, range(last - len(losses.mean) + 1, last + 1), losses, color, label)
            steps = [found.step for found in finished[0].validation]
            losses = band([[found.loss for found in trial.validation] for trial in finished])
            _draw_band(validation, steps, losses, color, label)
        tried = {lr: loss for lr, loss in rates[name].losses.items() if math.isfinite(loss)}
        if tried:
            search.semilogx(list(tried), list(tried.values()), "o-", color=color, label=label, markersize=4)
    training.set(xlabel="step", ylabel=f"training loss (mean of {WINDOW} steps)")
    validation.set(xlabel="step", ylabel="validation loss")
    search.set(xlabel="learning rate", ylabel="validation loss after the last step (search)")
    if training.lines:
        training.legend()
    for axes in (training, validation, search):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_band(axes: Any, x: Sequence[int], curve: Any, color: str, label: str) -> None:
    axes.plot(x, curve.mean, color=color, label=label)
    axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
