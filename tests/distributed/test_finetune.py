"""examples/finetune.py under torchrun: the losses of one process, checkpoints for any number, nothing half written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import finetune
import pytest
from study.data import functions
from tiny_examples import save_tiny_language_model, write_functions

HERE = Path(__file__).resolve().parent
STEPS = 6


class Launcher:
    """Runs finetune.py here, or finetune_script.py in several processes; the results are under `root`."""

    def __init__(self, root: Path):
        self.root, self.model = root, save_tiny_language_model(root / "model", hidden=128)
        self.functions = write_functions(root / "functions")
        self.pairs = functions.load(self.functions)

    def run(self, processes: int, runs: dict[str, str], fault: str = "") -> tuple[int, str, str]:
        """The exit status, stdout and stderr. `runs`: the options of each by the name of its folder."""
        common = (
            f"--model {self.model} --steps {STEPS} --lr 2e-2 --seq-len 200 --batch 4 --rank 4 --device cpu --no-plot"
        )
        given = [[*common.split(), "--out", str(self.root / name), *options.split()] for name, options in runs.items()]
        if processes == 1:
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(out):
                patch.setattr(functions, "load", lambda: self.pairs)
                status = max([finetune.main(arguments) for arguments in given])
            return status, out.getvalue(), out.getvalue()
        paths = [
            HERE.parents[1],
            HERE.parents[1] / "examples",
            HERE.parent / "support",
            os.environ.get("PYTHONPATH", ""),
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(HERE / "finetune_script.py"), str(self.functions)]
        command += [word for arguments in given for word in ("+", *arguments)][1:]
        done = subprocess.run(
            command, env=environment | {"FAULT": fault}, capture_output=True, text=True, timeout=300, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def losses(self, name: str) -> dict[str, list[float]]:
        results = json.loads((self.root / name / "results.json").read_text())
        assert results["complete"] and all(found["same_text"] for found in results["adapter_in_peft"].values())
        return {method: history["loss"] for method, history in results["history"].items()}

    def files(self, name: str) -> set[str]:
        folder = self.root / name
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("torchrun"))


def assert_same(got: dict[str, list[float]], want: dict[str, list[float]]) -> None:
    assert got.keys() == want.keys()
    for method, losses in want.items():
        assert len(losses) == STEPS and got[method] == pytest.approx(losses, rel=1e-5), method
        assert method == "frozen" or losses[-1] < losses[0] - 0.5, method


def test_any_number_of_processes_trains_and_resumes_with_the_same_losses(launcher):
    # Narrower sketches of other parts of the batches are other approximations.
    runs = {"all": "", "started": "--methods fastlora --init lora_ga --sketch-batches 2 --sketch-width 512"}
    if importlib.util.find_spec("bitsandbytes"):
        runs["packed"] = "--methods peft fastlora --base nf4 --dtype float32"
    assert launcher.run(1, {f"{name}-alone": options for name, options in runs.items()})[0] == 0
    want = {name: launcher.losses(f"{name}-alone") for name in runs}
    # The batch of four in two processes: two each.
    sharded = {name: f"{options} --shard fsdp2 --save-every 4" for name, options in runs.items()}
    status, out, err = launcher.run(2, sharded)
    assert status == 0 and out.count("Before training") == len(runs), err[-3000:]
    for name in runs:
        assert_same(launcher.losses(name), want[name])
        assert not [file for file in launcher.files(name) if "tmp" in file or "partial" in file]
    # From the fourth step of six on in three: one, one and two.
    replicated = {name: f"{options} --shard ddp --resume" for name, options in runs.items()}
    status, _, err = launcher.run(3, replicated)
    assert status == 0 and "1/6 steps" not in err and "1/18 steps" not in err, err[-3000:]
    for name in runs:
        assert_same(launcher.losses(name), want[name])
    # And in one, with micro-batches.
    assert launcher.run(1, {"all": "--resume --accumulate 2"})[0] == 0
    assert_same(launcher.losses("all"), want["all"])
    refused = {"all": "--resume --seed 1", "nowhere": "--resume", "few": "--shard ddp --accumulate 5"}
    status, _, err = launcher.run(1, refused)
    assert status == 1
    for message in ("is of a run with seed 0, not 1", "--resume: no checkpoint under", "want an example at least"):
        assert message in err


@pytest.mark.slow
def test_ctrl_c_and_a_killed_process_leave_whole_files(launcher):
    options = "--methods fastlora --shard fsdp2 --save-every 2"
    status, out, _ = launcher.run(2, {"interrupted": options}, fault="interrupt")
    assert status != 0 and "Interrupted (fastlora 3 of 6 steps)" in out
    assert {"results.json", "adapter/adapter_model.safetensors"} <= launcher.files("interrupted")
    status, _, err = launcher.run(2, {"killed": options}, fault="kill")
    assert status != 0 and "SIGKILL" in err
    kept = {file.split("/")[1] for file in launcher.files("killed") if file.startswith("checkpoint/")}
    assert kept in ({"2"}, {"2", "partial"})
    assert not [file for file in launcher.files("killed") if file.startswith(("results", "adapter"))]
    assert launcher.run(1, {"alone": "--methods fastlora"})[0] == 0
    status, _, err = launcher.run(2, {name: f"{options} --resume" for name in ("interrupted", "killed")})
    assert status == 0, err[-3000:]
    for name in ("interrupted", "killed"):
        assert_same(launcher.losses(name), launcher.losses("alone"))
        assert not [file for file in launcher.files(name) if "partial" in file]
