"""What a comparison says about loss curves: running means, bands over seeds, steps to a loss, a grid's best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

SERIES = (1, 2, 5)  # learning rates: ..., 1e-4, 2e-4, 5e-4, 1e-3, ...
MOST_RATES = 12
WARMUP_SHARE = 0.1  # of a run's steps; then the learning rate falls linearly to zero


class Band(NamedTuple):
    """The mean over seeds of each point of a curve, with the smallest and the largest value there."""

    mean: list[float]
    low: list[float]
    high: list[float]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each `window` values in a row; entry i is that of values i ... i + window - 1. A curve shorter than
    the window has one entry, its mean.
    """
    window = min(window, len(values))
    return [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)] if window else []


def band(curves: Sequence[Sequence[float]]) -> Band:
    """Raises ValueError where the curves have not the same length."""
    points = list(zip(*curves, strict=True))
    return Band([statistics.fmean(p) for p in points], [min(p) for p in points], [max(p) for p in points])


def steps_to(losses: Sequence[float], target: float, window: int) -> int | None:
    """The steps after which the mean of the last `window` losses is `target` or less for the first time; None where it
    never is.
    """
    means = running_mean(losses, window)
    first = next((i for i, mean in enumerate(means) if mean <= target), None)
    return None if first is None else first + min(window, len(losses))


def rung(k: int) -> float:
    """The k-th value of the series 1, 2, 5, 10, 20, ..., for negative k below 1."""
    return float(f"{SERIES[k % 3]}e{k // 3}")


def best_rate(start: float, score: Callable[[float], float]) -> tuple[float, dict[float, float], bool]:
    """The learning rate with the lowest score: of three around `start`, and then of as many more of the series as it
    takes until the lowest is not the first or the last.

    Returns the rate, the score of every rate tried, and whether the best lies inside. It may not after `MOST_RATES`
    tries, or where no score is finite. NaN counts as infinite.
    """
    scores: dict[int, float] = {}

    def try_rate(k: int) -> None:
        value = score(rung(k))
        scores[k] = math.inf if math.isnan(value) else value

    middle = round(3 * math.log10(start))
    middle = min(range(middle - 1, middle + 2), key=lambda k: abs(math.log(rung(k) / start)))
    for k in (middle - 1, middle, middle + 1):
        try_rate(k)
    while True:
        best = min(sorted(scores), key=scores.__getitem__)
        inside = min(scores) < best < max(scores)
        if inside or len(scores) >= MOST_RATES:
            return rung(best), {rung(k): scores[k] for k in sorted(scores)}, inside
        try_rate(best - 1 if best == min(scores) else best + 1)


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`, as a fraction of the given one."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
