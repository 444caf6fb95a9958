"""What a call costs the host, in launches and Python-level calls: the times are `python -m bench host`'s to show."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

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


BY = pytest.mark.parametrize("plans", ["python", "c++"])


@BY
def test_launches(counted, plans):
    launches = counted[plans]["launches"]
    assert {launches[name] for name in ("linear", "eager", "peft")} == {0}
    assert launches["cublas"] <= 6
    assert launches["triton"] <= 6
    assert launches["FusedLoraLinear"] == launches["cublas"]
    assert launches["group of 3"] <= 18 and launches["3 in a group"] <= 18


# 22 are torch.autograd.grad's.
@pytest.mark.parametrize(
    "plans, most",
    [
        ("python", {"cublas": 82, "triton": 125, "FusedLoraLinear": 102, "group of 3": 198, "3 in a group": 450}),
        ("c++", {"cublas": 48, "triton": 59, "FusedLoraLinear": 68, "group of 3": 81, "3 in a group": 380}),
    ],
)
def test_python_calls(counted, plans, most):
    calls, launches = counted[plans]["calls"], counted[plans]["launches"]
    if plans == "python" and triton.__version__.startswith("3.6."):  # one more a launch
        most = {name: number + launches[name] for name, number in most.items()}
    assert {name: calls[name] for name in most if calls[name] > most[name]} == {}, calls
    if plans == "c++":
        assert calls["group of 3"] <= 1.7 * calls["cublas"]


@BY
def test_a_plan_launches_what_the_launchers_do(counted, plans):
    """The driver checks each launch's alignment against what its kernel was compiled for; here it is the same one."""
    found = counted[plans]
    assert min(found["kept"]) >= 2
    assert min(found["variants"]) >= 2 if plans == "c++" else not any(found["variants"])
    for several, without in zip(found["by_plan"], counted["without"], strict=True):
        assert len(without) >= 5
        for launches in several:
            assert launches == without


@BY
@pytest.mark.parametrize("which, caller", list(enumerate(["lora_linear", "lora_group"])))
def test_calls_of_a_known_kind(counted, plans, which, caller):
    """They skip the checks and the choice, launch the same, and what is of another kind is checked as ever."""
    found = counted[plans]["functions"][which]
    first, *later = found["calls"]
    assert len(first) >= 4 and later == [first] * 3
    assert (found["known"] > 0) == (plans == "c++") and found["after reset"] == 0
    assert found["errors"] == [caller] * 4
