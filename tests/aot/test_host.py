"""What a call costs the host, in launches and Python-level calls: the times are `python -m bench host`'s to show."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the stub driver is compiled by gcc")


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("host") / "results.json"
    # A Triton laid over the pinned one comes first.
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests" / "support")])
    command = [sys.executable, "-m", "aot.count_host_work", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return json.loads(out.read_text())


def test_launches(counted):
    assert {name: counted["launches"][name] for name in ("linear", "eager", "peft")} == {
        "linear": 0,
        "eager": 0,
        "peft": 0,
    }
    assert counted["launches"]["cublas"] <= 6
    assert counted["launches"]["triton"] <= 6
    assert counted["launches"]["FusedLoraLinear"] == counted["launches"]["cublas"]
    assert counted["launches"]["group of 3"] <= 18


def test_python_calls(counted):
    calls = counted["calls"]  # 22 are torch.autograd.grad's; Triton 3.6 takes one more a launch
    assert calls["cublas"] <= 82, calls
    assert calls["triton"] <= 125, calls
    assert calls["FusedLoraLinear"] <= calls["cublas"] + 22, calls
    assert calls["group of 3"] <= 420, calls


def test_a_plan_launches_what_the_launchers_do(counted):
    """The driver checks each launch's alignment against what its kernel was compiled for; here it is the same one."""
    assert counted["kept"] >= 8
    for several, without in zip(counted["by_plan"], counted["without"], strict=True):
        assert len(without) >= 5
        for launches in several:
            assert launches == without
