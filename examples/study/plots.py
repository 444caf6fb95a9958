"""A comparison's curves: losses over steps in both protocols, the searches, the test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study.contestants import CONTESTANTS
from study.curves import Band, band, running_mean
from study.files import replacing
from study.report import WINDOW, Finals, Results, finished, summarise
from study.tasks.task import Metric
from study.training import Run

COLORS = (*(f"C{i}" for i in range(10)), "black", "gold")
STYLES = ("-", "--")  # past twelve contestants colours repeat


def plot(results: Results, path: Path) -> Path:
    """Training and validation loss over steps, mean and band (smallest to largest) over the seeds, one row a protocol;
    next to them the search, and the test's mean and range.
    """
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(2, 3, figsize=(16, 9))
    for row, (finals, what) in enumerate(((results.one_rate, "one rate for all"), (results.best_rate, "best rates"))):
        _draw_curves(grid[row][0], grid[row][1], finals)
        grid[row][0].set(xlabel="step", ylabel=f"training loss (mean of {WINDOW} steps)", title=what)
        grid[row][1].set(xlabel="step", ylabel="validation loss", title=what)
    _draw_search(grid[0][2], results)
    _draw_test(grid[1][2], results)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return _saved(figure, path, 90)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(figure: Any, path: Path, dpi: int) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    _pyplot().close(figure)
    return path


def _look(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]


def _draw_curves(training: Any, validation: Any, finals: Finals) -> None:
    for number, (name, trials) in enumerate(finals.items()):
        good, label = finished(trials), CONTESTANTS[name].title
        if good:
            losses = band([running_mean(trial.losses, WINDOW) for trial in good])
            last = len(good[0].losses)
            _draw_band(training, range(last - len(losses.mean) + 1, last + 1), losses, _look(number), label)
            steps = [found.step for found in good[0].validation]
            losses = band([[found.loss for found in trial.validation] for trial in good])
            _draw_band(validation, steps, losses, _look(number), label)
    _zoom(training)
    _zoom(validation)


def _zoom(axes: Any) -> None:
    """Shows the last two thirds of the curves, and no more than four times the lowest: the first steps, or one run that
    went wrong, would flatten all the others.
    """
    late = [y for line in axes.lines for y in list(line.get_ydata())[len(line.get_ydata()) // 3 :]]
    if late:
        top = min(max(late), 4 * min(late))
        margin = 0.05 * (top - min(late))
        axes.set_ylim(min(late) - margin, top + margin)


def _draw_band(axes: Any, x: Sequence[int], curve: Band, look: tuple[str, str], label: str) -> None:
    axes.plot(x, curve.mean, color=look[0], linestyle=look[1], label=label)
    axes.fill_between(x, curve.low, curve.high, color=look[0], alpha=0.1, linewidth=0)


def _draw_search(axes: Any, results: Results) -> None:
    for number, (name, found) in enumerate(results.rates.items()):
        tried = {lr: loss for lr, loss in found.losses.items() if math.isfinite(loss)}
        if tried:
            color, style = _look(number)
            label = CONTESTANTS[name].title
            axes.semilogx(list(tried), list(tried.values()), "o", ls=style, color=color, label=label, markersize=4)
    tried = [loss for found in results.rates.values() for loss in found.losses.values() if math.isfinite(loss)]
    if tried:  # a rate at which training collapsed would flatten the rest
        low, middle = min(tried), sorted(tried)[len(tried) // 2]
        axes.set_ylim(top=max(loss for loss in tried if loss <= low + 4 * (middle - low)) + 0.1 * (middle - low))
    axes.set(xlabel="learning rate", ylabel="validation loss after the last step", title="search")


def _draw_test(axes: Any, results: Results) -> None:
    """A line per contestant, the two protocols above one another in it."""
    metric: Metric = results.task.metric
    for finals, marker, shift in ((results.one_rate, "s", 0.15), (results.best_rate, "o", -0.15)):
        for number, row in enumerate(summarise(finals, metric)):
            if row.test is not None:
                bars = [[row.test.mean - row.test.low], [row.test.high - row.test.mean]]
                color = _look(number)[0]
                axes.errorbar([row.test.mean], [-number + shift], xerr=bars, fmt=marker, color=color, markersize=5)
    names = list(results.best_rate)
    axes.set_yticks([-number for number in range(len(names))], [CONTESTANTS[name].title for name in names])
    axes.set(xlabel=f"{metric.name}{metric.unit}", title="test: □ one rate, ○ best rates")


def plot_runs(runs: Sequence[Run], path: Path) -> Path:
    """The training loss of finetune.py's methods over steps, and over the seconds that each spent in its own."""
    pyplot = _pyplot()
    window = max(1, min(10, max(len(run.losses) for run in runs) // 5))
    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run, style in zip(runs, (":", "-", "--", "-.")):
        losses = running_mean(run.losses, window)
        skipped = len(run.losses) - len(losses)
        by_step.plot(range(skipped + 1, len(run.losses) + 1), losses, style, label=run.title)
        by_time.plot(list(itertools.accumulate(run.seconds))[skipped : len(run.losses)], losses, style, label=run.title)
    by_step.set(xlabel="step", ylabel=f"training loss (mean of {window} step{'s' * (window > 1)})")
    by_time.set(xlabel="seconds spent in this method's steps")
    by_step.legend()
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    return _saved(figure, path, 120)
