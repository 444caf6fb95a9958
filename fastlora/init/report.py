"""What a gradient sketch holds, as a table and as a plot."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from ..runtime import messages

DRIFT = 0.1
MANY = 40  # layers whose names still fit one page


@dataclass(frozen=True)
class LayerReport:
    """One layer: G is its weight's gradient (n, m), summed over the passes with their weights.

    `captured`: the share of ‖G‖² in the 2r leading triplets found; `error`: what they miss, √(1 − captured); `sigma`:
    their singular values. ‖G‖ and `captured` are measured with random probes, whatever the sketch takes G for; `drift`
    is how far that is from G in these triplets: above DRIFT, micro-batches have cancelled and the sketch has not kept
    what is left of them.
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
    drift: float = 0.0


@dataclass(frozen=True)
class SketchReport:
    """A line per layer, in the model's order; `str` of it is a summary."""

    r: int
    layers: list[LayerReport]

    def __str__(self) -> str:
        known = sorted((line for line in self.layers if line.sigma), key=lambda line: line.captured)
        lines = [f"{len(self.layers)} layers sketched, {len(known)} with a gradient"]
        if known:
            least, middle, most = known[0], known[len(known) // 2], known[-1]
            lines[0] += (
                f": 2r = {2 * self.r} triplets hold {_percent(middle.captured)} of ‖G‖² (median), from "
                f"{_percent(least.captured)} in {least.name} to {_percent(most.captured)} in {most.name}"
            )
        what = {
            "no gradient": [line.name for line in self.layers if not line.sigma],
            "micro-batches that were not finite were left out": [line.name for line in self.layers if line.skipped],
            "micro-batches cancelled, refine() the sketch": self.cancelled,
        }
        lines += messages.by_reason((name, reason) for reason, names in what.items() for name in names)
        return "\n".join(lines)

    @property
    def cancelled(self) -> list[str]:
        """The layers whose micro-batches have cancelled, and whose sketch is not to be trusted."""
        return [line.name for line in self.layers if line.drift > DRIFT]

    def table(self) -> str:
        """Every layer: size, tokens, ‖G‖, what 2r triplets hold of it and miss, σ."""
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
        return messages.table(rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a figure (the path's ending says the format: png, pdf, svg) of the captured share and the alignment
        error by layer, and of every layer's spectrum σᵢ/σ₁, coloured by the layer's place in the model. More than 40
        layers are drawn as a curve for each kind of them (q_proj, ...), along the model.

        Raises ImportError without matplotlib, ValueError where no layer has a gradient.
        """
        lines = [line for line in self.layers if line.sigma]
        if not lines:
            raise ValueError("SketchReport.plot: no layer has a gradient; run backward passes inside the sketch first")
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure  # not pyplot: no window, no global state
        except ImportError as error:
            raise ImportError("SketchReport.plot wants matplotlib: pip install matplotlib") from error
        many = len(lines) > MANY
        figure = Figure(figsize=(10, 6 if many else 3.6 + 0.16 * len(lines)), layout="constrained")
        shares, spectra = figure.subplots(1, 2, width_ratios=(3, 2))
        colors = [colormaps["viridis"](i / max(1, len(lines) - 1)) for i in range(len(lines))]
        (_plot_kinds if many else _plot_shares)(shares, lines, self.r, colors)
        for line, color in zip(lines, colors):
            spectra.plot(range(1, len(line.sigma) + 1), _relative(line.sigma), color=color, linewidth=1)
        spectra.set(xlabel="i", ylabel="σᵢ/σ₁", yscale="log", title="spectra (first layer dark)")
        spectra.axvline(self.r + 0.5, color="grey", linestyle=":")
        spectra.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


def _plot_kinds(axes: Any, lines: list[LayerReport], r: int, colors: list[Any]) -> None:
    """A curve for each last name of the layers; a dot has the colour of the layer's spectrum."""
    kinds: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        kinds.setdefault(line.name.rsplit(".", 1)[-1], []).append(place)
    for kind, places in kinds.items():
        axes.plot(places, [lines[place].captured for place in places], linewidth=1, label=kind)
        axes.scatter(places, [lines[place].captured for place in places], s=12, c=[colors[place] for place in places])
    axes.set(xlabel="layer, in the model's order", ylabel=f"share of ‖G‖² in 2r = {2 * r} triplets", ylim=(0, 1.02))
    axes.legend(fontsize=7, ncols=4, loc="lower left")
    axes.grid(alpha=0.3)


def _plot_shares(axes: Any, lines: list[LayerReport], r: int, colors: list[Any]) -> None:
    places = range(len(lines))
    axes.barh(places, [line.captured for line in lines], color=colors)
    axes.plot([line.error for line in lines], places, "o", color="crimson", markersize=4, label="‖G − G_2r‖/‖G‖")
    axes.set_yticks(places, [line.name for line in lines], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share, error", title=f"share of ‖G‖² in 2r = {2 * r} triplets (bars), error (dots)")
    axes.grid(axis="x", alpha=0.3)


def _relative(sigma: tuple[float, ...]) -> list[float]:
    """σᵢ/σ₁, with nan (a gap in the line) for zeros, which a logarithm has no place for."""
    return [value / sigma[0] if value > 0 else math.nan for value in sigma]


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"
