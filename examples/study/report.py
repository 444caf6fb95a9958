"""A comparison's tables (Markdown), everything behind them (JSON), and its curves (PNG)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from study import alignment
from study.contestants import BASELINE, CONTESTANTS
from study.curves import running_mean, steps_to
from study.files import write_atomically
from study.settings import by_optimizer
from study.tables import format_table, machine
from study.tasks.task import Metric, Task
from study.trials import Trial, commit, plain

if TYPE_CHECKING:
    from compare import Rates

WINDOW = 20  # steps that a training loss is the mean of
NEVER = "not reached"
Finals = Mapping[str, Sequence[Trial]]


class Spread(NamedTuple):
    """Mean, smallest and largest over the seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One contestant at one rate. `steps_to_baseline`: per seed, the steps after which its training loss is first the
    baseline's final one with that seed; empty where the baseline did not take part. `beside_baseline`: its test result
    less the baseline's with the same seed, hence after the same batches. `diverged` seeds count in nothing else.
    """

    contestant: str
    lr: float
    trainable: int
    trainable_at_end: int
    optimizer_state: int
    final_loss: Spread | None
    validation_loss: Spread | None
    test: Spread | None
    beside_baseline: Spread | None
    steps_to_baseline: list[int | None]
    diverged: int


@dataclass(frozen=True)
class Results:
    """What a comparison found. `one_rate` and `best_rate` are the tested trials of the two protocols; `costs` and
    `aligned` what costs.py and alignment.py return.
    """

    task: Task
    facts: Mapping[str, Any]
    rates: Mapping[str, Rates]
    one_rate: Finals
    best_rate: Finals
    costs: Mapping[str, Any]
    aligned: dict[str, Any]


def summarise(finals: Finals, metric: Metric) -> list[Row]:
    baseline = finished(finals.get(BASELINE, ()))
    targets = {trial.seed: running_mean(trial.losses, WINDOW)[-1] for trial in baseline}
    tested = {trial.seed: metric.of(trial.test) for trial in baseline if trial.test is not None}
    rows = []
    for name, trials in finals.items():
        good = finished(trials)
        rows.append(
            Row(
                contestant=name,
                lr=trials[0].lr,
                trainable=trials[0].trainable,
                trainable_at_end=trials[0].notes.get("trainable at the end", trials[0].trainable),
                optimizer_state=trials[0].optimizer_state,
                final_loss=_spread([running_mean(trial.losses, WINDOW)[-1] for trial in good]),
                validation_loss=_spread([trial.score for trial in good]),
                test=_spread([metric.of(trial.test) for trial in good if trial.test is not None]),
                beside_baseline=_spread(
                    [metric.of(t.test) - tested[t.seed] for t in good if t.test is not None and t.seed in tested]
                ),
                steps_to_baseline=[
                    steps_to(trial.losses, targets[trial.seed], WINDOW) for trial in good if trial.seed in targets
                ],
                diverged=len(trials) - len(good),
            )
        )
    return rows


def finished(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if not trial.diverged]


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(statistics.fmean(values), min(values), max(values)) if values else None


def table(rows: Sequence[Row], metric: Metric) -> str:
    """Mean (smallest to largest) over the seeds; the steps of each seed."""
    header = (
        "",
        "learning rate",
        "final loss",
        f"steps to {CONTESTANTS[BASELINE].title}'s",
        "validation loss",
        metric.name,
        f"less {CONTESTANTS[BASELINE].title}'s, by seed",
    )
    signed = metric.form.replace(":", ":+")
    body = [
        (
            CONTESTANTS[row.contestant].title + (f" ({row.diverged} diverged)" if row.diverged else ""),
            f"{row.lr:g}",
            _text(row.final_loss, "{:.3f}"),
            ", ".join(NEVER if steps is None else str(steps) for steps in row.steps_to_baseline) or "not measured",
            _text(row.validation_loss, "{:.3f}"),
            _text(row.test, metric.form, metric.unit),
            "" if row.contestant == BASELINE else _text(row.beside_baseline, signed),
        )
        for row in rows
    ]
    return format_table(header, body)


def _text(spread: Spread | None, form: str, unit: str = "") -> str:
    if spread is None:
        return "not measured"
    mean, low, high = (form.format(value) for value in spread)
    return f"{mean}{unit} ({low} to {high})"


def cost_table(rows: Sequence[Row], costs: Mapping[str, Any]) -> str:
    """What a contestant trains and keeps, and what its step takes."""
    header = ("", "trainable", "optimiser state", "steps/s", "peak memory")
    body = []
    for row in rows:
        cost = costs["contestants"][row.contestant]
        fewer = f" to {row.trainable_at_end:,}" if row.trainable_at_end != row.trainable else ""
        body.append(
            (
                CONTESTANTS[row.contestant].title,
                f"{row.trainable:,}{fewer}",
                f"{row.optimizer_state:,}",
                f"{1 / cost['step_seconds']:.1f}",
                f"{cost['peak_bytes'] / 2**20:.1f} MiB",
            )
        )
    return format_table(header, body)


def search_table(rates: Mapping[str, Rates]) -> str:
    """The validation loss at each learning rate; the best of a line in bold."""
    columns = sorted({lr for found in rates.values() for lr in found.losses})

    def cell(found: Rates, lr: float) -> str:
        loss = found.losses.get(lr)
        text = "" if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "diverged"
        return f"**{text}**" if lr == found.best else text

    body = [(CONTESTANTS[name].title, *(cell(found, lr) for lr in columns)) for name, found in rates.items()]
    return format_table(("learning rate", *(f"{lr:g}" for lr in columns)), body)


def caption(results: Results) -> str:
    """What the tables must not travel without."""
    settings, where = results.task.settings, machine(results.task.device)
    edge = [CONTESTANTS[name].title for name, found in results.rates.items() if found.losses and not found.inside]
    _, left_out = by_optimizer(settings.optimizer)
    sentences = [
        results.task.description,
        f"{settings.steps} steps of {settings.batch_size} with {'AdamW' if settings.optimizer == 'adamw' else 'SGD'}, "
        f"r = {settings.r}, α = {settings.lora_alpha:g}, {settings.seeds} seeds.",
        "Mean (smallest to largest) over the seeds; the final loss is the mean training loss of the last "
        f"{WINDOW} steps.",
        *(f"{CONTESTANTS[name].title} is left out: {reason}." for name, reason in left_out.items()),
        *([f"At the edge of the rates tried: {', '.join(edge)}."] if edge else []),
        f"{where['device']}, {where['threads']} thread{'s' * (where['threads'] != 1)}, torch {where['torch']}, "
        f"Python {where['python']}; commit {', '.join(commits(results)) or 'unknown'}.",
    ]
    return " ".join(sentences)


def commits(results: Results) -> list[str]:
    """The commits of the trials that are reported, oldest trial first."""
    trials = [trial for finals in (results.one_rate, results.best_rate) for found in finals.values() for trial in found]
    return list(dict.fromkeys(trial.commit for trial in trials if trial.commit is not None))


def text(results: Results) -> str:
    """All of results.md."""
    metric = results.task.metric
    one, best = summarise(results.one_rate, metric), summarise(results.best_rate, metric)
    searched = any(found.losses for found in results.rates.values())
    sections = [caption(results), "One learning rate for all:", table(one, metric)]
    if searched:
        sections += [
            "Each at its own best rate, chosen by validation loss with other seeds:",
            table(best, metric),
            "Validation loss by learning rate, over the search's seeds:",
            search_table(results.rates),
        ]
    load = results.costs["load average"]
    sections += [
        f"The cost of a step: median over {results.task.settings.timed_rounds} rounds in which the contestants took "
        f"turns (load average before: {load}).",
        cost_table(best, results.costs),
        "The first step beside full fine-tuning's, at the gradient of the start: median (smallest to largest) over "
        "the layers of what is missed of its squared norm at the best scale, and of the cosine.",
        alignment.table(results.aligned),
        alignment.table_by_layer(results.aligned),
    ]
    return "\n\n".join(sections) + "\n"


def save(results: Results) -> list[Path]:
    """Writes results.md, results.json and, if it is wanted, loss.png; returns their paths."""
    settings, metric = results.task.settings, results.task.metric
    trials = {
        name: [_rounded(t) for t in {(t.lr, t.seed): t for t in (*results.one_rate[name], *found)}.values()]
        for name, found in results.best_rate.items()
    }
    content = {
        "facts": results.facts,
        "description": results.task.description,
        "machine": machine(results.task.device),
        "commits": commits(results),
        "commit of the report": commit(),
        "window": WINDOW,
        "metric": metric.name,
        "left out": by_optimizer(settings.optimizer)[1],
        "one rate": [asdict(row) for row in summarise(results.one_rate, metric)],
        "best rates": [asdict(row) for row in summarise(results.best_rate, metric)],
        "search": {
            name: {f"{lr:g}": loss if math.isfinite(loss) else None for lr, loss in found.losses.items()}
            for name, found in results.rates.items()
        },
        "costs": results.costs,
        "alignment": results.aligned,
        "trials": trials,
    }
    files = [settings.folder / "results.md", settings.folder / "results.json"]
    write_atomically(files[0], text(results))
    write_atomically(files[1], json.dumps(content, allow_nan=False) + "\n")
    if settings.plot:
        from study.plots import plot

        files.append(plot(results, settings.folder / "loss.png"))
    return files


def _rounded(trial: Trial) -> dict[str, Any]:
    return {**plain(trial), "losses": [round(loss, 5) for loss in trial.losses]}
