"""Two questions that only a GPU answers, asked of it: `python -m bench questions`. Each prints its answer.

1. cuBLAS, Triton, or Triton with S inside the GEMM: forward and backward, and how near Triton's GEMM comes to cuBLAS's.
2. One pass over dY for dS and dB, or two: from which rank on?

What a kernel, beta = 1 and a dropout mask cost by themselves, the smoke stage says. Times are medians of CUDA graph
replays in turns, over inputs larger than twice the L2. `--device cpu` with TRITON_INTERPRET=1 rehearses it on tiny
problems: those times say nothing about a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels import configs
from fastlora.kernels.expand import expand
from fastlora.kernels.gemm import forward_gemm, forward_gemm_with_s, input_grad_gemm
from fastlora.kernels.grads import ds_and_db, ds_and_db_workspace, weight_grad, weight_grad_workspace
from fastlora.kernels.shrink import shrink, shrink_workspace

from ..harness import machine
from ..harness.contenders import Tensors
from ..harness.counting import Problem
from ..harness.runner import command
from ..harness.timing import Summary, Timer, timer_for
from ..harness.turns import rotation, write_json

Answer = dict[str, Any]


@dataclass
class Asked:
    """What every question is asked with."""

    device: torch.device
    timer: Timer
    rounds: int
    shapes: list[tuple[int, int, int]]  # (M, N, K)
    ranks: list[int]
    dtype: str

    def problem(self, shape: tuple[int, int, int], r: int = 16) -> Problem:
        return Problem(*shape, r, self.dtype, self.dtype)

    def seconds(self, functions: dict[str, Callable[[int], object]], nbytes: int) -> dict[str, float]:
        """Median seconds of each function of an input's number, over enough inputs of `nbytes` to leave the L2."""
        count = self.inputs(nbytes)

        def over_all(function: Callable[[int], object]) -> Callable[[], None]:
            def run() -> None:
                for i in range(count):
                    function(i)

            return run

        samples = self.timer.interleaved({name: over_all(f) for name, f in functions.items()}, self.rounds)
        return {name: Summary.of(values, count).median for name, values in samples.items()}

    def inputs(self, nbytes: int) -> int:
        return rotation(nbytes, self.device)


@dataclass
class Buffers:
    """One layer's tensors, inputs to rotate over, and somewhere to write to."""

    t: Tensors
    pairs: list[tuple[Tensor, Tensor]]  # (x, dY)
    y: Tensor
    dx: Tensor
    s: Tensor
    ds: Tensor
    grad_b: Tensor
    workspace: Tensor

    @classmethod
    def of(cls, problem: Problem, asked: Asked) -> Buffers:
        t = Tensors.random(problem, asked.device)
        t.lora_a, t.lora_b = t.lora_a.detach(), t.lora_b.detach()
        pairs = [(x.detach(), dy) for x, dy in t.inputs(asked.inputs(problem.x + problem.y), asked.device)]
        (x, dy), m, r = pairs[0], problem.m, problem.r
        size = max(
            shrink_workspace(x, t.lora_a),
            ds_and_db_workspace(dy, t.lora_b),
            shrink_workspace(dy, t.lora_b.t()),
            weight_grad_workspace(dy, r),
            1,
        )
        ds = torch.randn(m, r, device=asked.device).to(x.dtype)
        return cls(
            t,
            pairs,
            torch.empty_like(dy),
            torch.empty_like(x),
            torch.randn_like(ds),
            ds,
            torch.empty_like(t.lora_b),
            torch.empty(size, device=asked.device),
        )

    def shrink(self, i: int) -> None:
        shrink(self.pairs[i][0], self.t.lora_a, self.s, self.workspace)

    def expand_dx(self) -> None:
        expand(self.ds, self.t.lora_a.t(), self.dx)


def which_gemm(asked: Asked) -> Answer:
    """Question 1."""
    found: Answer = {}
    for shape in asked.shapes:
        problem = asked.problem(shape)
        b = Buffers.of(problem, asked)
        t, w = b.t, b.t.weight

        def cublas(i: int, b: Buffers = b, w: Tensor = w, t: Tensors = t) -> None:
            b.shrink(i)
            expand(b.s, t.lora_b, b.y, alpha=t.scaling)
            b.y.addmm_(b.pairs[i][0], w.t())

        def triton(i: int, b: Buffers = b, w: Tensor = w, t: Tensors = t) -> None:
            b.shrink(i)
            forward_gemm(b.pairs[i][0], w, None, b.s, t.lora_b, b.y, t.scaling)

        def cublas_dx(i: int, b: Buffers = b, w: Tensor = w) -> None:
            b.expand_dx()
            b.dx.addmm_(b.pairs[i][1], w)

        functions: dict[str, Callable[[int], object]] = {
            "forward: frozen": lambda i, b=b, w=w: torch.mm(b.pairs[i][0], w.t(), out=b.y),
            "forward: cublas": cublas,
            "forward: triton": triton,
            "forward: triton's GEMM alone": lambda i, b=b, w=w, t=t: forward_gemm(
                b.pairs[i][0], w, None, b.s, t.lora_b, b.y, t.scaling
            ),
            "dX: frozen": lambda i, b=b, w=w: torch.mm(b.pairs[i][1], w, out=b.dx),
            "dX: cublas": cublas_dx,
            "dX: triton": lambda i, b=b, w=w, t=t: input_grad_gemm(b.pairs[i][1], w, b.ds, t.lora_a, b.dx),
        }
        if problem.dtype != "float32" and problem.r <= configs.MAX_RANK_INSIDE:
            functions["forward: triton, S inside"] = lambda i, b=b, w=w, t=t: forward_gemm_with_s(
                b.pairs[i][0], w, None, t.lora_a, t.lora_b, b.y, b.s, t.scaling
            )
        seconds = asked.seconds(functions, problem.x + problem.y)
        found[name_of(shape)] = seconds
        print(f"  {name_of(shape)}")
        for name, value in seconds.items():
            floor = seconds[name.partition(":")[0] + ": frozen"]
            print(f"    {name:<30}{1e6 * value:10.1f} µs   {value / floor:6.3f} x frozen")
        best = {what: best_of(seconds, what) for what in ("forward", "dX")}
        ratio = seconds["forward: frozen"] / seconds["forward: triton's GEMM alone"]
        print(
            f"    fastest: {best['forward']}; {best['dX']}. Triton's GEMM, rank-r step included: {ratio:.3f} x cuBLAS"
        )
    return found


def best_of(seconds: dict[str, float], what: str) -> str:
    complete = [name for name in seconds if name.startswith(what) and not name.endswith(("frozen", "alone"))]
    return min(complete, key=seconds.__getitem__)


def one_pass(asked: Asked) -> Answer:
    """Question 2."""
    found: Answer = {}
    m, n, k = asked.shapes[0]
    for r in asked.ranks:
        problem = Problem(m, n, k, r, asked.dtype, asked.dtype)
        b = Buffers.of(problem, asked)
        dy = b.pairs[0][1]
        rule = configs.ds_db(m, n, r, dy.dtype, b.t.lora_b.dtype, dy.device)
        config = rule or forced(m, n, r, dy, b.t.lora_b)
        size = ds_and_db_workspace(dy, b.t.lora_b, config=config)
        workspace = torch.empty(max(size, b.workspace.numel()), device=asked.device)

        def one(i: int, b: Buffers = b, w: Tensor = workspace, c: configs.DsDbConfig = config) -> None:
            ds_and_db(b.pairs[i][1], b.t.lora_b, b.s, b.ds, b.grad_b, w, scaling=b.t.scaling, config=c)

        def two(i: int, b: Buffers = b, w: Tensor = workspace) -> None:
            shrink(b.pairs[i][1], b.t.lora_b.t(), b.ds, w, scale=b.t.scaling)
            weight_grad(b.pairs[i][1], b.s, b.grad_b, w, scale=b.t.scaling)

        functions: dict[str, Callable[[int], object]] = {"two passes": two}
        try:
            one(0)
            functions["one pass"] = one
        except Exception as error:  # more shared memory or registers than there are
            print(f"  r={r}: one pass cannot run: {type(error).__name__}")
        seconds = asked.seconds(functions, problem.y)
        found[str(r)] = {"rule": "one pass" if rule else "two passes", "seconds": seconds}
        if "one pass" in seconds:
            fastest = min(seconds, key=seconds.__getitem__)
            right = "as" if (fastest == "one pass") == (rule is not None) else "NOT as"
            both = ", ".join(f"{name} {1e6 * value:.1f} µs" for name, value in sorted(seconds.items()))
            print(f"  r={r}: {both}: {fastest}, {right} configs.ds_db chooses")
    return found


def forced(m: int, n: int, r: int, dy: Tensor, lora_b: Tensor) -> configs.DsDbConfig:
    """One pass where the rule would take two: the shape that it has at the largest rank with one pass."""
    for smaller in range(r, 0, -1):
        known = configs.ds_db(m, n, smaller, dy.dtype, lora_b.dtype, dy.device)
        if known is not None:
            return replace(known, block_r=max(16, configs.power_of_two_at_least(r)), num_warps=8)
    raise ValueError(f"no rank up to {r} has one pass at N={n}")


QUESTIONS: dict[str, tuple[str, Callable[[Asked], Answer]]] = {
    "gemm": ("cuBLAS, Triton or Triton with S inside?", which_gemm),
    "one_pass": ("One pass or two for dS and dB?", one_pass),
}


def name_of(shape: tuple[int, int, int]) -> str:
    m, n, k = shape
    return f"M={m} {k}->{n}"


def main(arguments: list[str] | None = None) -> int:
    parser = command("questions", __doc__, 20)
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1: a rehearsal on tiny problems")
    parser.add_argument("--only", help="comma-separated, of: " + ", ".join(QUESTIONS))
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(QUESTIONS)
    if unknown := sorted(set(names) - set(QUESTIONS)):
        parser.error(f"--only: got {', '.join(unknown)}, want some of {', '.join(QUESTIONS)}")
    device = torch.device(options.device)
    timer, gpu = timer_for(device), device.type == "cuda"
    dtype = "bfloat16" if gpu else "float32"
    roof = machine.measure_roof(device, dtype, timer)
    shapes = [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336)] if gpu else [(32, 48, 40), (32, 40, 48)]
    ranks = [4, 8, 16, 32, 48, 64, 96, 128] if gpu else [4, 64]
    asked = Asked(device, timer, options.rounds, shapes, ranks, dtype)
    record: dict[str, Any] = {"machine": machine.describe(device), "roof": asdict(roof), "answers": {}, "failed": {}}
    for name in names:
        title, ask = QUESTIONS[name]
        print(f"{name}: {title}", flush=True)
        begun = time.monotonic()
        try:
            record["answers"][name] = ask(asked)
        except Exception as error:  # the other questions are still to be asked
            record["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"  FAILED: {record['failed'][name]}", flush=True)
        print(f"  ({time.monotonic() - begun:.1f} s)", flush=True)
        if options.out:
            write_json(options.out, record)
        if gpu:
            torch.cuda.empty_cache()
    return 1 if record["failed"] else 0
