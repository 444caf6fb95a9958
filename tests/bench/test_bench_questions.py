"""The questions to a GPU and the table of errors, as far as they go without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.harness.contenders import Contender, Tensors, build
from bench.harness.counting import Problem
from bench.layers import correctness

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")


def test_questions_run_interpreted(tmp_path):
    """The one of the two that takes no time in the interpreter."""
    pytest.importorskip("triton")
    out = tmp_path / "questions.json"
    command = [sys.executable, "-m", "bench", "questions", "--device", "cpu", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(
        [*command, "--only", "one_pass"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert list(record["answers"]) == ["one_pass"]
    assert record["failed"] == {}
    four = record["answers"]["one_pass"]["4"]
    assert four["rule"] == "one pass"
    assert set(four["seconds"]) == {"one pass", "two passes"}


def test_what_is_wrong_fails():
    t = Tensors.random(Problem(33, 40, 56, 4, "float32", "float32"), CPU)
    ((x, dy),) = t.inputs(1, CPU)
    builders = {
        "eager": lambda: build("eager", t),
        "wrong": lambda: Contender("", lambda x: 1.001 * build("eager", t).forward(x), (t.lora_a, t.lora_b)),
    }
    (row,) = correctness.rows("a layer", builders, build("eager", correctness.exact(t)), x, dy)
    assert row.errors == pytest.approx([1e-3] * 4, rel=1e-2)
    assert not row.passed
    assert "FAILED" in str(row)


def test_the_table_of_errors(tmp_path, capsys):
    out = tmp_path / "correctness.json"
    assert correctness.main(["--device", "cpu", "--dtype", "fp32", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["rows"]
    assert {row["name"] for row in found} >= {"torch", "group", "mlp"}
    assert all(row["passed"] for row in found)
    assert "0 failed" in capsys.readouterr().out
