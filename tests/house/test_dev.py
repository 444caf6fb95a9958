"""dev.py's steps: wide ones with a process per core, the others next to them; a failure of any is a failure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dev():
    spec = importlib.util.spec_from_file_location("dev_script", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step(name: str, program: str, packages=None):
    return name, [sys.executable, "-c", program], packages, {}


def test_every_step_has_one_place(dev):
    names = [one[0] for one in dev.steps(SimpleNamespace(python="python"), quick=False)]
    assert len(names) == len(set(names)) and set(dev.WIDE) <= set(names) and dev.EXTRAS_STEP in names


def test_steps_run_next_to_the_wide_ones(dev, tmp_path, capfdbinary, monkeypatch):
    """Each of the two waits for a file that the other writes; what runs aside is shown in one piece."""
    wait = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)\n"
    begin = "open({!r}, 'w').close()\nprint({!r}, flush=True)\n"
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    aside = begin.format(first, "aside begins") + wait.format(second) + "print('3 passed in 0.10s')"
    wide = (
        wait.format(first) + begin.format(second, "wide") + "print('1 failed, 2 passed in 0.10s'); raise SystemExit(1)"
    )
    monkeypatch.setattr(dev, "WIDE", ("wide",))
    rows, totals = dev.run_steps(SimpleNamespace(), [step("aside", aside), step("wide", wide)])
    assert [rows[name][1] for name in ("aside", "wide")] == ["ok", "FAILED (exit status 1)"]
    assert totals == {"failed": 1, "passed": 5}
    assert b"== [1/2] aside\naside begins\n3 passed in 0.10s\n" in capfdbinary.readouterr().out


def test_what_counts_as_a_failure(dev, monkeypatch):
    def overlay(packages):
        raise dev.Problem("no such package")

    skipped = "print('1 passed, 1 skipped in 0.10s')"
    chosen = [
        step("skips", skipped),
        step(dev.EXTRAS_STEP, skipped),
        step("stops", "raise SystemExit(3)"),
        step("needs", "print(1)", ("nothing==1",)),
    ]
    rows, totals = dev.run_steps(SimpleNamespace(overlay=overlay), chosen)
    verdicts = [rows[one[0]][1] for one in chosen]
    assert verdicts == ["ok", *(f"FAILED (exit status {status})" for status in (1, 3, 1))]
    assert totals == {"passed": 2, "skipped": 2, "error": 3}
