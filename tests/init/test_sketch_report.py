"""The sketch's report as a figure."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest

from fastlora.init import LayerReport, SketchReport

EMPTY = LayerReport("idle", 6, 4, 0, 0, 3, 0.0, math.nan, math.nan, ())


def report(layers: int = 3) -> SketchReport:
    lines = [
        LayerReport(f"layer.{i}", 8, 6, 10, 2, 0, 3.0, 0.5 + 0.1 * i, math.sqrt(0.5 - 0.1 * i), (4.0, 2.0, 1.0, 0.0))
        for i in range(layers)
    ]
    return SketchReport(2, [*lines, EMPTY])


def open_figures() -> list[int]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return [] if pyplot is None else pyplot.get_fignums()


@pytest.fixture
def figures(monkeypatch) -> list[Any]:
    """The figures that are written, as matplotlib has them."""
    figure = pytest.importorskip("matplotlib.figure")
    seen: list[Any] = []
    write = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *args, **kw: (seen.append(self), write(self, *args, **kw))
    )
    return seen


def test_the_figure_has_every_layer_with_a_gradient(tmp_path, figures):
    before = open_figures()  # other tests' may be
    report().plot(tmp_path / "sketch.png")
    assert (tmp_path / "sketch.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    shares, spectra = figure.axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ["layer.0", "layer.1", "layer.2"]
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([0.5, 0.6, 0.7])
    assert list(shares.lines[0].get_xdata()) == pytest.approx([math.sqrt(0.5), math.sqrt(0.4), math.sqrt(0.3)])
    curves = [list(line.get_ydata()) for line in spectra.lines[:3]]
    assert curves[0][:3] == [1.0, 0.5, 0.25] and math.isnan(curves[0][3])
    assert open_figures() == before


def test_many_layers_are_a_curve_for_each_kind(tmp_path, figures):
    layers = [replace(report().layers[0], name=f"{i // 2}.{'qk'[i % 2]}_proj", captured=i / 210) for i in range(210)]
    SketchReport(2, layers).plot(tmp_path / "sketch.png")
    (figure,) = figures
    shares = figure.axes[0]
    assert tuple(figure.get_size_inches()) == (10, 6)
    assert {line.get_label(): list(line.get_xdata())[:2] for line in shares.lines} == {
        "q_proj": [0, 2],
        "k_proj": [1, 3],
    }
    assert list(shares.lines[1].get_ydata())[-1] == pytest.approx(209 / 210)


def test_other_formats_and_one_layer(tmp_path, figures):
    report(1).plot(str(tmp_path / "sketch.svg"))
    assert b"<svg" in (tmp_path / "sketch.svg").read_bytes()


def test_nothing_to_draw_and_nothing_to_draw_with(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"SketchReport\.plot: no layer has a gradient"):
        SketchReport(2, [EMPTY]).plot(tmp_path / "none.png")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"SketchReport\.plot wants matplotlib: pip install matplotlib"):
        report().plot(tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
