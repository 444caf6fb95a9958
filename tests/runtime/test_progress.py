"""What a user is shown: progress bars where somebody looks and nothing anywhere else, log messages, reprs, hints."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from torch import nn

import fastlora
from fastlora.runtime import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def model(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


@pytest.fixture
def stderr(monkeypatch):
    """Replaces stderr by a terminal (or what is asked for), and returns it."""

    def replace(stream: io.StringIO) -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    monkeypatch.delenv("FASTLORA_PROGRESS", raising=False)
    return replace


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_nothing_where_nobody_looks(choice, stderr, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setenv("FASTLORA_PROGRESS", choice)
    shown = stderr(io.StringIO() if choice == "auto" else Terminal())
    assert list(progress.bar("abc", "letters", 3)) == ["a", "b", "c"]
    assert shown.getvalue() == ""


def test_a_bar_on_a_terminal(stderr, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(progress, "DELAY", 0.0)
    shown = stderr(Terminal())
    assert list(progress.bar(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert "fastlora: letters" in shown.getvalue() and "3" in shown.getvalue()


def test_short_work_shows_none(stderr):
    shown = stderr(Terminal())
    assert list(progress.bar("abc", "letters", 3)) == ["a", "b", "c"]
    assert "letters" not in shown.getvalue()


def test_on_without_a_terminal_and_for_each_long_job(stderr, monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    monkeypatch.setenv("FASTLORA_PROGRESS", "on")
    shown = stderr(io.StringIO())
    net = model()
    with fastlora.GradientSketch(net, r=2) as sketch:
        net(torch.randn(16, 8)).square().sum().backward()
    sketch.report()
    fastlora.init_lora_ga(net, sketch)
    fastlora.merge(net)
    fastlora.unmerge(net)
    for words in ("sketch, pass 1", "sketch report", "patch", "LoRA-GA", "merge", "unmerge"):
        assert f"fastlora: {words}" in shown.getvalue(), words


def test_a_sketch_counts_layers_and_passes(monkeypatch):
    class Counter:
        updates, closed, words = 0, 0, ""

        def update(self) -> None:
            self.updates += 1

        def close(self) -> None:
            self.closed += 1

        def set_description_str(self, words: str, refresh: bool) -> None:
            self.words = words

    shown = Counter()
    monkeypatch.setattr(progress, "counter", lambda *_: shown)
    net = model()
    with fastlora.GradientSketch(net, r=2):
        for _ in range(2):
            net(torch.randn(16, 8)).square().sum().backward()
    assert (shown.updates, shown.closed, shown.words) == (6, 1, "fastlora: sketch, pass 2")


def test_without_tqdm(stderr, monkeypatch):
    monkeypatch.setenv("FASTLORA_PROGRESS", "on")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    shown = stderr(Terminal())
    assert list(progress.bar("abc", "letters", 3)) == ["a", "b", "c"]
    assert shown.getvalue() == ""


@pytest.mark.parametrize("stream", [None, object()])
def test_a_stderr_that_is_no_file(stream, stderr):
    stderr(stream)
    assert list(progress.bar("ab", "letters", 2)) == ["a", "b"]


def test_a_choice_that_makes_no_sense(monkeypatch):
    monkeypatch.setenv("FASTLORA_PROGRESS", "perhaps")
    with pytest.raises(ValueError, match="FASTLORA_PROGRESS='perhaps': wanted one of auto, on, off"):
        list(progress.bar("ab", "letters", 2))


def test_patch_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="fastlora"):
        fastlora.patch(model(), r=2)
    assert "patch: Sequential: 3 modules patched, 0 left alone" in caplog.messages
    assert "patch: 1: patched: adapter 'default', r=2" in caplog.messages
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("fastlora").handlers)


def test_the_report_of_many_layers_fits_a_prompt():
    report = fastlora.patch(model(50), r=2, target_modules=[str(i) for i in range(49)])
    assert repr(report).splitlines() == [
        "fastlora: 49 modules patched, 1 left alone",
        "  patched     0, 1, 2 and 46 more: adapter 'default', r=2",
        "  left alone  49: " + report.left_alone["49"],
    ]
    assert len(report.table().splitlines()) == 51


def test_the_repr_of_a_sketch():
    net = model()
    sketch = fastlora.GradientSketch(net, r=2)
    start = "GradientSketch(3 layers, r=2, width=32: "
    assert repr(sketch).startswith(start + "0 layers have seen backward passes, of up to 0 tokens")
    with sketch:
        net(torch.randn(16, 8)).square().sum().backward()
    assert repr(sketch).startswith(start + "3 layers have seen backward passes, of up to 16 tokens")


def test_settings_that_peft_s_layers_ignore_are_named():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="init_lora_weights='pissa', adapter_name='other' had no effect. What PEFT"):
        fastlora.patch(adapted, init_lora_weights="pissa", adapter_name="other")
