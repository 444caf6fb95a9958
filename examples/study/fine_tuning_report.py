"""What a run of finetune.py leaves behind: one table and what the model writes (printed, Markdown), everything in JSON,
and the loss curves."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from study.files import write_atomically
from study.learner import lora_layers
from study.settings import ORDINARY_INITS, FineTuning
from study.tables import format_table, machine
from study.tasks.task import Task
from study.training import Run, median_ratio

NOT_MEASURED = "not measured"


@dataclass
class Results:
    """What is known of a run so far. `written`: the model's answers before and after, by method."""

    task: Task
    settings: FineTuning
    runs: list[Run]
    complete: bool = False
    before: float = float("nan")
    after: dict[str, float] = field(default_factory=dict)
    written: dict[str, list[str]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    agreement: dict[str, Any] | None = None
    seconds: float = 0.0

    def run(self, name: str) -> Run | None:
        return next((run for run in self.runs if run.name == name), None)

    @property
    def loss_difference(self) -> float | None:
        """The largest relative difference between PEFT's and fastlora's loss of one step; None where they start from
        different numbers, or one did not take part.
        """
        theirs, ours = self.run("peft"), [run for run in self.runs if run.name in ("fastlora", "fused_loss")]
        if theirs is None or self.settings.init not in ORDINARY_INITS:
            return None
        pairs = [pair for run in ours for pair in zip(theirs.losses, run.losses)]
        return max((abs(a - b) / abs(a) for a, b in pairs), default=None)


def rows(results: Results) -> list[dict[str, Any]]:
    """One method's numbers each; None is 'not measured'."""
    task, settings = results.task, results.settings
    order = task.order(settings.seed, settings.steps)
    tokens = [task.tokens(task.batch(indices)) for indices in order]
    peft, frozen = results.run("peft"), results.run("frozen")
    found = []
    for run in results.runs:
        seconds = run.timed
        seen = tokens[len(run.seconds) - len(seconds) : len(run.seconds)]
        layers = len(lora_layers(run.learner.adapted))
        added = None
        if frozen and seconds and layers:
            added = 1e6 * statistics.median(a - b for a, b in zip(seconds, frozen.timed)) / layers
        found.append(
            {
                "method": run.name,
                "title": run.title,
                "trainable": run.learner.trainable,
                "steps": len(run.losses),
                "steps_per_second": 1 / statistics.median(seconds) if seconds else None,
                "tokens_per_second": sum(filter(None, seen)) / sum(seconds) if seconds and all(seen) else None,
                "speed_beside_peft": median_ratio(peft, run) if peft else None,
                "time_over_frozen": median_ratio(run, frozen) if frozen else None,
                "added_us_per_layer": added,
                "adapted_layers": layers,
                "peak_bytes": results.peaks.get(run.name),
                "last_loss": statistics.fmean(run.losses[-20:]) if run.losses else None,
                "held_out_before": results.before,
                "held_out_after": results.after.get(run.name),
            }
        )
    return found


def table(results: Results) -> str:
    """A column for what was measured of some method."""
    metric, body = results.task.metric, rows(results)
    number = metric.form + metric.unit
    columns = [
        ("steps/s", "{:.2f}", "steps_per_second"),
        ("tokens/s", "{:.0f}", "tokens_per_second"),
        ("× PEFT", "{:.2f}", "speed_beside_peft"),
        ("time / frozen", "{:.2f}", "time_over_frozen"),
        ("peak memory", "{:.0f} MiB", "peak_bytes"),
        (f"{metric.name}, before → after", number, "held_out_before", "held_out_after"),
    ]
    columns = [column for column in columns if any(row[column[2]] is not None for row in body)]

    def cell(row: dict[str, Any], form: str, *keys: str) -> str:
        values = [row[key] and (row[key] / 2**20 if key == "peak_bytes" else row[key]) for key in keys]
        return " → ".join(NOT_MEASURED if value is None else form.format(value) for value in values)

    lines = [[row["title"], *(cell(row, *column[1:]) for column in columns)] for row in body]
    return format_table(["method", *(name for name, *_ in columns)], lines)


def caption(results: Results) -> str:
    """What the table must not travel without."""
    settings, where = results.settings, machine(results.task.device)
    by_name = {row["method"]: row for row in rows(results)}
    turns = "the methods took their steps in turn" if settings.interleave else "the methods ran one after another"
    sentences = [
        results.task.description,
        f"{settings.steps} steps of {settings.batch_size}, r = {settings.r}, α = {settings.lora_alpha:g}, learning "
        f"rate {settings.lr:g}, seed {settings.seed}; {turns}, steps/s from the median step, the ratios from the "
        "medians over the same batches.",
    ]
    if (difference := results.loss_difference) is not None:
        sentences.append(f"PEFT's and fastlora's losses differ by at most {difference:.1e} of their size at any step.")
    added = [
        f"{name} {row['added_us_per_layer']:.0f}"
        for name, row in by_name.items()
        if row["added_us_per_layer"] is not None
    ]
    if added:
        layers = max(row["adapted_layers"] for row in by_name.values())
        sentences.append(f"What each of {layers} adapted layers adds to a frozen step, in µs: {', '.join(added)}.")
    load = where.get("load average at the end")
    sentences.append(
        f"{where['device']}, {where['threads']} thread{'s' * (where['threads'] != 1)}, torch {where['torch']}, PEFT "
        f"{where['peft']}, Python {where['python']}, load average {load}; {results.seconds:.0f} s for everything"
        f"{'' if results.complete else '; interrupted, so not tested'}."
    )
    return " ".join(sentences)


def agreement(results: Results) -> str:
    """How PEFT's reading of the files compares with the trained model."""
    lines = []
    for how, found in (results.agreement or {}).items():
        text = ""
        if results.written.get("before"):
            text = ", and it writes the same text" if found["same_text"] else ", and IT WRITES OTHER TEXT"
        lines.append(
            f"The adapter's files, {how} by PEFT in a fresh model: {100 * found['same_class']:.1f} % of the "
            f"predictions are the same, logits differ by at most {found['max_logit_difference']:.1e} (the largest is "
            f"{found['largest_logit']:.1f}){text}."
        )
    return "\n".join(lines)


def samples(results: Results) -> str:
    """What the model writes for the first held-out examples, before and after."""
    sections = []
    for i, (question, answer) in enumerate(results.task.questions()):
        name = question.partition("\n")[0]
        lines = [f"held-out example {i}: `{name}`", f"- the library's author: {answer}"]
        titles = {run.name: run.title for run in results.runs} | {"before": "before"}
        shown = {key: texts for key, texts in results.written.items() if key not in ("frozen", "full")}
        lines += [f"- {titles[key]}: {' '.join(texts[i].split()) or '(nothing)'}" for key, texts in shown.items()]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def text(results: Results) -> str:
    """All of results.md."""
    sections = [table(results), caption(results), agreement(results), samples(results)]
    return "\n\n".join(section for section in sections if section) + "\n"


def save(results: Results) -> list[Path]:
    """Writes results.json, results.md and, if it is wanted, loss.png; returns what the run has written."""
    settings = results.settings
    content = {
        "settings": {key: os.fspath(v) if isinstance(v, Path) else v for key, v in asdict(settings).items()},
        "description": results.task.description,
        "data": results.task.facts,
        "complete": results.complete,
        "seconds": round(results.seconds, 1),
        "machine": machine(results.task.device),
        "table": rows(results),
        "loss_difference": results.loss_difference,
        "adapter_in_peft": results.agreement,
        "samples": [
            {"source": question, "answer": answer, **{name: texts[i] for name, texts in results.written.items()}}
            for i, (question, answer) in enumerate(results.task.questions())
        ],
        "history": {run.name: run.history for run in results.runs},
    }
    files = [settings.out / "results.json", settings.out / "results.md"]
    write_atomically(files[0], json.dumps(content, indent=1) + "\n")
    write_atomically(files[1], text(results))
    if settings.plot:
        from study.plots import plot_runs

        files.append(plot_runs(results.runs, settings.out / "loss.png"))
    return [*files, *([settings.out / "adapter"] if results.run("fastlora") else [])]
