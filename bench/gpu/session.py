"""The steps of bench/gpu.sh: `python -m bench gpu OUT`. All that is timed runs in this process, the rest in its own.

After every step OUT holds three files: results.tar.gz (JSON, drawings and logs), steps.txt (a verdict a step) and
summary.txt. Each step has a share of the time; what it leaves over goes to those after it. One that fails does not stop
the rest, but for the smoke stage where no kernel is right: then there is time left for a second run. Exit status: 0
where all that ran passed; 1; 75 where a step has left this process's GPU broken: run again, it goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..harness.machine import ROOT

AGAIN, NOTHING_WORKS = 75, 3
RESERVE_S = 10  # to pack at the end


class Step(NamedTuple):
    """ "{out}" in `arguments` is the folder of results, "{left}" the step's seconds. Without a module: a command."""

    name: str
    share: int  # seconds
    module: str
    arguments: str
    shown: int = 12  # lines in summary.txt


class OutOfTime(BaseException):
    """No Exception: a benchmark that guards its cases must not take it for one of their failures."""


PYTEST = f"{sys.executable} -m pytest -v --tb=short -p no:cacheprovider -m gpu"
SMOKE_BY_NCU = f"{sys.executable} -m bench smoke --only shrinks,gradients,activations,experts"
SANITISED = f"{sys.executable} -m bench smoke --only shrinks,expands,gradients,gemms"
LAYER = "bench lora_linear"
GPU = (
    Step("smoke", 180, "bench smoke", "--jobs {jobs} --time-limit {left} --out {out}/smoke.json", 150),
    Step("correctness", 30, "bench correctness", "--out {out}/correctness.json"),
    Step("questions", 30, "bench questions", "--out {out}/questions.json", 60),
    Step("tune", 40, "fastlora.tune", "--model-shapes llama-3-8b --tokens 8192 --r 16 --adapter-dtype bf16 "
         "--dropout both --json {out}/tuned.json"),
    Step("table", 50, LAYER, "--device cuda --dtype bf16 --dtype mixed --time-limit {left} "
         "--out {out}/lora_linear.json --contenders frozen,eager,peft,addmm,auto,cublas,triton,triton_s_inside"),
    Step("ncu", 40, "", "ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis "
         f"--launch-count 20 --kernel-name regex:_kernel {SMOKE_BY_NCU}", 40),
    Step("gpu_tests", 60, "", f"{PYTEST} tests/gpu {{workers}}", 20),
    Step("engine", 15, "", f"{PYTEST} tests/runtime/test_csrc.py tests/linalg/test_native.py"),
    Step("sanitizer", 20, "", f"compute-sanitizer --error-exitcode 9 --kernel-regex kns=_kernel {SANITISED}"),
    Step("suite", 40, "bench suite", "--device cuda --time-limit {left} --out {out}/suite.json"),
    Step("experts", 20, "bench experts", "--device cuda --rounds 10 --time-limit {left} --out {out}/experts.json"),
    Step("lora_ga", 25, "bench lora_ga", "--shapes llama-2-7b --device cuda --whole --layers 2 "
         "--out {out}/lora_ga.json"),
    Step("dora", 10, "bench dora", "--dtype bf16 --dtype mixed --rounds 10 --out {out}/dora.json"),
    Step("peers", 20, LAYER, "--device cuda --shapes peers --rounds 15 --time-limit {left} --out {out}/peers.json "
         "--contenders frozen,eager,peft,addmm,auto,cublas,triton"),
    Step("compiled", 20, LAYER, "--device cuda --shape 8192x4096x4096 --rounds 20 --time-limit {left} "
         "--contenders frozen,eager,compile,auto --out {out}/lora_linear_compiled.json"),
    Step("adalora", 8, "bench adalora", "--width 4096 --rounds 10 --out {out}/adalora.json"),
)  # fmt: skip
TINY = "--device cpu --rounds 2"
REHEARSAL = (  # the same ways through the same code, tiny
    Step("smoke", 240, "bench smoke", "--device cpu --time-limit {left} --out {out}/smoke.json", 150),
    Step("questions", 60, "bench questions", f"{TINY} --only one_pass --out {{out}}/questions.json", 60),
    Step("tune", 60, "fastlora.tune", "--device cpu --shape 24x40 --tokens 16 --r 4 --dtype fp32 "
         "--json {out}/tuned.json"),
    Step("table", 60, LAYER, f"{TINY} --shapes tiny --dtype fp32 --time-limit {{left}} "
         "--contenders frozen,eager,peft,addmm,torch --out {out}/lora_linear.json"),
    Step("ncu", 20, "", f"ncu {SMOKE_BY_NCU}"),
    Step("gpu_tests", 60, "", f"{PYTEST} tests/gpu"),
    Step("suite", 80, "bench suite", "--device cpu --size tiny --forms group --forms mlp --time-limit {left} "
         "--out {out}/suite.json"),
)  # fmt: skip


class Session:
    def __init__(self, out: Path, work: Path, deadline: float, rehearse: bool) -> None:
        self.out, self.work, self.deadline = out, work, deadline
        self.steps = REHEARSAL if rehearse else GPU
        self.cores = len(os.sched_getaffinity(0))
        (work / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def verdicts(self) -> dict[str, str]:
        file = self.work / "steps.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return dict(line.split(": ", 1) for line in lines)

    def run(self) -> int:
        for i, step in enumerate(self.steps):
            if step.name in self.verdicts:
                continue
            later = sum(other.share for other in self.steps[i + 1 :])
            left = self.deadline - time.time() - RESERVE_S
            limit = int(min(left, max(step.share, left - later)))
            status = self.one(step, limit)
            if step.name == "smoke" and status == NOTHING_WORKS:
                self.note("stopped", "no kernel is right; the time that is left is for a second run")
                return 1
            if status == AGAIN:
                return AGAIN
        return int(any("passed" not in verdict and "left out" not in verdict for verdict in self.verdicts.values()))

    def one(self, step: Step, limit: int) -> int:
        """Runs a step; its status, or AGAIN where the GPU does not answer afterwards."""
        command = step.arguments.split()[0]
        if limit < 2:
            self.note(step.name, "left out: the time is over")
            return 0
        if not step.module and shutil.which(command) is None:
            self.note(step.name, f"left out: {command} is not on the PATH")
            return 0
        print(f"== {step.name} (at most {limit} s)", flush=True)
        self.note(step.name, "DIED", pack=False)  # what stands there if this process does not come back
        workers = "-n 8" if importlib.util.find_spec("xdist") else ""
        words = step.arguments.format(out=self.work, left=limit - 5, jobs=min(12, self.cores), workers=workers).split()
        begun = time.monotonic()
        with (self.work / "logs" / f"{step.name}.log").open("w") as log:
            status = self.inside(step, words, log, limit) if step.module else self.outside(words, log, limit)
        seconds = f"({time.monotonic() - begun:.0f} s)"
        stopped = {124: f"STOPPED at its limit of {limit} s"}
        self.note(step.name, f"{'passed' if status == 0 else stopped.get(status, f'FAILED with {status}')} {seconds}")
        return status if self.answers() else AGAIN

    def inside(self, step: Step, words: list[str], log: Any, limit: int) -> int:
        module, *first = step.module.split()
        main = import_module("bench.__main__" if module == "bench" else module).main
        with contextlib.redirect_stdout(Tee(log, sys.stdout)), interrupted(limit):
            try:
                return main([*first, *words]) or 0
            except OutOfTime:
                return 124
            except SystemExit as error:
                return error.code if isinstance(error.code, int) else 1
            except Exception:
                print(traceback.format_exc())
                return 1

    @staticmethod
    def outside(words: list[str], log: Any, limit: int) -> int:
        with subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True) as process:
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return 124
        return 0 if status == 5 and "pytest" in words else status  # 5: all are deselected

    @staticmethod
    def answers() -> bool:
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def note(self, name: str, verdict: str, pack: bool = True) -> None:
        found = self.verdicts | {name: verdict}
        (self.work / "steps.txt").write_text("".join(f"{key}: {value}\n" for key, value in found.items()))
        if pack:
            print(f"{name}: {verdict}", flush=True)
            self.pack()

    def pack(self) -> None:
        """OUT's three files, each replaced whole."""
        parts = [(self.work / "steps.txt").read_text()]
        for step in self.steps:
            log = self.work / "logs" / f"{step.name}.log"
            if log.exists():
                parts.append(
                    "\n".join([f"== {step.name}", *log.read_text(errors="replace").splitlines()[-step.shown :]])
                )
        if (failures := self.work / "failures.txt").exists():
            parts.append(f"== failures\n{failures.read_text(errors='replace')[-20_000:]}")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            tar.add(self.work, "results")
        files = {"results.tar.gz": archive.getvalue(), "summary.txt": "\n".join(parts).encode()}
        for name, content in (files | {"steps.txt": parts[0].encode()}).items():
            (self.out / f".{name}").write_bytes(content)
            (self.out / f".{name}").replace(self.out / name)


class Tee(io.TextIOBase):
    def __init__(self, *files: Any) -> None:
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


@contextlib.contextmanager
def interrupted(seconds: int) -> Iterator[None]:
    """Raises OutOfTime after so many seconds, between two instructions of Python. What hangs in one ends this process,
    and gpu.sh goes on with the next step."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    hangs = threading.Timer(seconds + 10, os._exit, (AGAIN,))
    hangs.daemon = True
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    hangs.start()
    try:
        yield
    finally:
        signal.alarm(0)
        hangs.cancel()
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="receives three files")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what goes into the archive")
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu.sh: torch sees no GPU here; --rehearse runs the same ways on a CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.rehearse:
        build = Path(os.environ["FASTLORA_CACHE_DIR"]) / "building"
        if not build.exists():  # csrc/, in the background: no step waits for it
            build.mkdir(parents=True)
            a, b = torch.cuda.get_device_capability()
            os.environ["FASTLORA_CUDA_ARCHS"] = f"{a}{b}{'a' if a == 9 else ''}"
            log = (options.work / "csrc.log").open("w")
            subprocess.Popen([sys.executable, "-m", "fastlora.doctor", "--build"], stdout=log, stderr=log, cwd=ROOT)
    os.environ["GPU_FAILURES"] = str(options.work / "failures.txt")
    return Session(options.out, options.work, options.deadline, options.rehearse).run()
