"""What a gradient sketch holds, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer: G is its weight's gradient (n, m), summed over the passes with their weights.

    `captured`: the share of ‖G‖² in its 2r leading triplets. `error`: what the best update of rank 2r misses,
    ‖G − G_2r‖/‖G‖. `sigma`: the 2r singular values. ‖G‖ is an estimate from random probes.
    """

    name: str
    n: int
    m: int
    tokens: int
    updates: int
    skipped: int
    norm: float
    captured: float
    error: float
    sigma: tuple[float, ...]


@dataclass(frozen=True)
class SketchReport:
    """A line per layer, in the model's order."""

    r: int
    layers: list[LayerReport]

    def __str__(self) -> str:
        rows = [("layer", "n×m", "tokens", "skipped", "‖G‖", "captured", "error", f"σ1 … σ{2 * self.r}")]
        rows += [
            (
                line.name,
                f"{line.n}×{line.m}",
                str(line.tokens),
                str(line.skipped),
                f"{line.norm:.3g}",
                _percent(line.captured),
                _percent(line.error),
                f"{line.sigma[0]:.3g} … {line.sigma[-1]:.3g}" if line.sigma else "no gradient",
            )
            for line in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"
