"""Every launch passes the driver's checks: Triton's own launcher against a stub that checks and runs nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from aot import families

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ["shrink", "expand", "weight_grad", "ds_and_db", "gemm", *families.FAMILIES]

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the stub driver is compiled by gcc")


@pytest.fixture(scope="module", params=["usual", pytest.param("all", marks=pytest.mark.slow)])
def results(request, tmp_path_factory) -> dict[str, tuple[int, int, str | None]]:
    """Of each case: launches, tensor maps, and what was refused."""
    out = tmp_path_factory.mktemp("launches") / "results.json"
    # A Triton laid over the pinned one comes first.
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests" / "support")])
    command = [sys.executable, "-m", "aot.launch_everything", str(out), f"--{request.param}"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return json.loads(out.read_text())


FAULTS = {
    "grid": "copy_rows: grid 1 x 70000 x 1",
    "pointer": "compiled as a multiple of 16",
    "stride": "parameter 3 is 17, and compiled as a multiple of 16",
    "tensor map": "no multiple of 16",
}


def test_every_launch_of_every_family_is_accepted(results):
    cases = {name: result for name, result in results.items() if name not in FAULTS}
    refused = [f"{name}: {why}" for name, (_, _, why) in cases.items() if why is not None]
    assert not refused, "\n".join(refused)
    for family in FAMILIES:
        assert sum(result[0] for name, result in cases.items() if family in name.partition(" ")[0]) > 1, family
    assert sum(tensor_maps for _, tensor_maps, _ in cases.values()) > 30


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_driver_refuses_is_refused(results, fault):
    assert FAULTS[fault] in results[fault][2]
