"""What a call costs next to its kernels: `python -m bench overhead`. The target is 10 µs over F.linear.

Forward + backward: the host's time per call, of many calls of a tiny layer, in turns with `F.linear`. On a GPU nothing
is waited for while the clock runs, so the launches count and the kernels do not. "python" is `lora_linear` with a
backend that computes nothing: what fastlora's own code costs, without launches, on any machine. "select" is the
dispatcher's share of it.
"""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from fastlora.functional import lora_linear
from fastlora.ops.lora import choice

from ..harness import machine
from ..harness.runner import command
from ..harness.timing import Summary
from ..harness.turns import write_json

M, N, K, R = 16, 64, 64, 8
CALLS = 50  # per sample: few enough that a GPU's launch queue never fills
TARGET_US = 10.0

Function = Callable[[], object]


def idle_backend(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> types.ModuleType:
    """A backend whose forward pass allocates the output; nothing else is done."""
    module: Any = types.ModuleType("idle_backend")
    s, dx, grad_a, grad_b = x.new_zeros(M, R), torch.zeros_like(x), torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    module.unsupported = lambda *_: None
    module.forward = lambda x, weight, *_: (x.new_empty(x.shape[0], weight.shape[0]), s, None)
    module.backward = lambda *_: (dx, grad_a, grad_b)
    return module


@contextlib.contextmanager
def as_cublas(module: types.ModuleType):
    """Within it `module` is the cublas backend, and trusted."""
    with (
        mock.patch.dict(choice._modules, {"cublas": module}),
        mock.patch.object(choice, "_choices", {}),
        mock.patch.object(choice._trusted["cublas"], "verdicts", {}),
        mock.patch.object(choice, "self_check", return_value=None),
    ):
        yield


def functions(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Function, bool]]:
    """One call of each, and whether it wants the idle backend in cublas's place."""
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    weight, dy = torch.randn(N, K, device=device, dtype=dtype), torch.randn(M, N, device=device, dtype=dtype)
    lora_A = torch.randn(R, K, device=device, dtype=dtype, requires_grad=True)
    lora_B = torch.randn(N, R, device=device, dtype=dtype, requires_grad=True)
    leaves = (x, lora_A, lora_B)

    def fused(backend: str) -> Function:
        return lambda: torch.autograd.grad(lora_linear(x, weight, lora_A, lora_B, 2.0, backend=backend), leaves, dy)

    def eager() -> object:
        y = F.linear(x, weight) + 2.0 * F.linear(F.linear(x, lora_A), lora_B)
        return torch.autograd.grad(y, leaves, dy)

    return {
        "F.linear": (lambda: torch.autograd.grad(F.linear(x, weight), (x,), dy), False),
        "eager": (eager, False),
        "fastlora": (fused("auto"), False),
        "python": (fused("cublas"), True),
        "select": (lambda: choice.select(x, weight, None, lora_A, lora_B, 0.0, "cublas"), True),
    }


def measure(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Summary]:
    """Seconds of the host per call."""
    timed = functions(device, dtype)
    idle = idle_backend(torch.zeros(M, K, device=device, dtype=dtype), *_adapters(device, dtype))
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        for name, (function, wants_idle) in timed.items():
            with as_cublas(idle) if wants_idle else contextlib.nullcontext():
                function()  # whatever a first call does
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                begun = time.perf_counter()
                for _ in range(CALLS):
                    function()
                seconds = time.perf_counter() - begun
            if turn:
                samples[name].append(seconds)
    return {name: Summary.of(values, CALLS) for name, values in samples.items()}


def _adapters(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(R, K, device=device, dtype=dtype), torch.zeros(N, R, device=device, dtype=dtype)


def main(arguments: list[str] | None = None) -> int:
    options = command("overhead", __doc__, 30, "device").parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = measure(device, dtype, options.rounds)
    floor = found["F.linear"].median
    print(
        f"{device}, M={M} N={N} K={K} r={R} {dtype}: the host's time per call, forward + backward".replace("torch.", "")
    )
    for name, summary in found.items():
        over = "" if name == "select" else f"{1e6 * (summary.median - floor):+8.1f} µs   x {summary.median / floor:.2f}"
        print(f"{name:<10}{1e6 * summary.median:8.1f} µs   {over}")
    if device.type == "cuda":
        over_us = 1e6 * (found["fastlora"].median - floor)
        verdict = "met" if over_us <= TARGET_US else "MISSED"
        print(f"target: at most {TARGET_US:.0f} µs over F.linear: {verdict} ({over_us:.1f} µs)")
    if options.out is not None:
        results = {name: asdict(summary) for name, summary in found.items()}
        write_json(options.out, {"machine": machine.describe(device), "calls": CALLS, "seconds": results})
    return 0
