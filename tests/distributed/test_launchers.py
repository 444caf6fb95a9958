"""The recipes of docs/distributed.md, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_torchrun_and_accelerate(tmp_path, wrapper):
    paths = [HERE.parents[1], HERE.parent / "support", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "accelerate_script.py"), str(tmp_path), wrapper]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() and (tmp_path / "state").is_dir()
