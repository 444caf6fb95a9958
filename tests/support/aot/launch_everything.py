"""Every launcher of every kernel family with CPU tensors on the stub driver: `python -m aot.launch_everything OUT`.

Run by test_launcher.py in a process of its own, since the stub takes Triton over. Writes JSON: of each case how many
launches and tensor maps it made, and what was refused; then of launches that are wrong. `--all`: every problem.
"""

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from aot import pretend, sample_kernels, stub, sweep
from aot.families import FAMILIES
from triton.tools.tensor_descriptor import TensorDescriptor

Cases = Iterator[tuple[str, Callable[[], object]]]

# (M, N, K): a usual layer; sizes that divide nothing, so that no row is aligned; one token; many rows, for the grids.
SHAPES = [(2048, 4096, 4096), (1000, 1001, 1003), (1, 4096, 4096), (1 << 20, 128, 64)]


def cases(all_of_them: bool) -> Cases:
    """Families by name. A launcher passes None for what a variant lacks: bias, seed, A, magnitude, workspace."""
    sweep.META = torch.device("cpu")  # where the problems put their tensors
    for shape in SHAPES:
        for dtypes in sweep.DTYPES if all_of_them else sweep.DTYPES[:3]:
            for dropout in (False, True):
                problem = sweep.Problem(*shape, 16, *dtypes, dropout)
                for launcher in sweep.LAUNCHERS:
                    yield f"{launcher.__name__} {problem}", lambda f=launcher, p=problem: f(p)
    for name, family in FAMILIES.items():
        problems = family.problems
        for problem in problems if all_of_them else [*problems[:2], *problems[-1:]]:
            yield f"{name} {problem}", lambda f=family.launch, p=problem: f(*p)


def faults() -> Cases:
    """Launches that no driver takes, or that break what their kernel was compiled for."""
    x = torch.zeros(4096)
    compiled: Any = sample_kernels.copy_rows[(1,)](x, x, 64, 16, 64)
    yield "grid", lambda: sample_kernels.copy_rows[(1, 70_000)](x, x, 64, 16, 64)
    yield "pointer", lambda: compiled[(1, 1, 1)](x[1:], x, 64, 16, 64)
    yield "stride", lambda: compiled[(1, 1, 1)](x, x, 64, 17, 64)
    half = torch.zeros(64 * 65, dtype=torch.bfloat16)
    descriptor = TensorDescriptor.from_tensor(half[: 64 * 64].view(64, 64), [64, 64])
    moved = TensorDescriptor.from_tensor(half[: 64 * 64].view(64, 64), [64, 64])
    moved.base = half[1 : 64 * 64 + 1].view(64, 64)
    yield "tensor map", lambda: sample_kernels.matmul[(1, 1)](moved, descriptor, x, 64, 64, 64, 64, 64)


def compile_one(index: int) -> None:
    _launches[index].compile()


_launches: list[pretend.Launch] = []  # inherited by the workers, since a JITFunction cannot be pickled


def compile_on_every_core(several: list[Callable[[], object]]) -> None:
    """Fills Triton's cache: the launches themselves compile one after the other."""
    with pretend.pretend(90) as launches:
        for case in several:
            case()
    _launches[:] = {launch.key: launch for launch in launches}.values()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(compile_one, range(len(_launches))))


def main(out: str, *options: str) -> None:
    every = list(cases("--all" in options))
    compile_on_every_core([case for _, case in every])
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        driver = stub.install(Path(folder))
        for name, case in [*every, *faults()]:
            launches, tensor_maps, refused = driver.launches, driver.tensor_maps, None
            try:
                case()
            except RuntimeError as error:
                refused = str(error)
            results[name] = (driver.launches - launches, driver.tensor_maps - tensor_maps, refused)
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
