"""The host's time per eager call, without a GPU: `python -m bench host`.

Triton's real launcher runs against the driver of tests/support/aot/stub_driver.c, which checks launches and runs
nothing, so every launch of M = 2048, 4096 x 4096, r = 16 counts as on a GPU, but for the driver's own 2 µs each.
Frozen products are replaced by tiny ones, and the contenders that launch nothing run on tiny layers: what is left of
either is the host's work. Times are 20th percentiles of single calls, in turns: a longer sample would count what else
the machine does.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import fastlora
from fastlora.functional import GroupLayer, lora_group, lora_linear
from fastlora.layers import group as grouping
from fastlora.ops.call import Adapter
from fastlora.runtime import build

from ..harness import contenders, machine
from ..harness.counting import Problem
from ..harness.runner import command
from ..harness.timing import Summary
from ..harness.turns import write_json

CPU = torch.device("cpu")
LAYER = Problem(2048, 4096, 4096, 16)
TINY = Problem(16, 64, 64, 8, "float32", "float32")
CALLS = 20  # in a row
TARGETS = (  # (row, at most so many times, row)
    ("cublas", 2.6, "linear"),
    ("cublas", 0.75, "peft"),
    ("triton", 3.2, "linear"),
    ("group of 3", 1.7, "cublas"),
)
MODULE_TARGET_US = 10.0  # FusedLoraLinear over lora_linear


class Row(NamedTuple):
    """A call: `forward()` gives y, or several; `leaves` and `dy` are what its backward pass is asked with."""

    forward: Callable[[], Any]
    leaves: tuple[Tensor, ...]
    dy: Any

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.dy)


@contextlib.contextmanager
def stubbed() -> Iterator[Any]:
    """Within it, backends launch on the stub, CPU tensors count as a GPU's, and frozen products are tiny."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
    from aot import stub

    from fastlora.ops.lora import cublas, triton

    a, b, c = torch.ones(16, 64), torch.ones(64, 64), torch.ones(16, 64)
    add, multiply = Tensor.addmm_, Tensor.mm

    def addmm_(self: Tensor, *args: Tensor, **scales: float) -> Tensor:
        if self.shape[0] == TINY.m:
            return add(self, *args, **scales)
        add(c, a, b)
        return self

    def mm(self: Tensor, other: Tensor) -> Tensor:
        if self.shape[0] != LAYER.m:
            return multiply(self, other)
        multiply(a, b)
        return self.new_empty(self.shape[0], other.shape[1])

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        for module in (cublas, triton):
            patches.enter_context(mock.patch.object(module, "unsupported", return_value=None))
        patches.enter_context(mock.patch.object(Tensor, "addmm_", addmm_))
        patches.enter_context(mock.patch.object(Tensor, "mm", mm))
        yield stub.install(Path(folder))


def compiled_plans(folder: Path) -> Any:
    """csrc/plans.cpp alone, compiled and loaded: a few seconds."""
    *compile_calls, link = build.commands(build.Toolchain("g++", None, (), "not wanted"), folder, folder / "plans.so")
    subprocess.run(next(call for call in compile_calls if call[-1].endswith("plans.cpp.o")), check=True)
    subprocess.run([part for part in link if not part.endswith(".o") or part.endswith("plans.cpp.o")], check=True)
    torch.ops.load_library(folder / "plans.so")
    return torch.ops.fastlora


def rows() -> dict[str, Row]:
    """Everything measured, by name."""
    tiny = contenders.Tensors.random(TINY, CPU)
    ((x, dy),) = tiny.inputs(1, CPU)

    def contender(name: str) -> Row:
        built = contenders.build(name, tiny)
        return Row(lambda: built.forward(x), (x, *built.leaves), dy)

    found = {"linear": contender("frozen")} | {name: contender(name) for name in ("eager", "peft", "torch")}
    m, n, k, r = LAYER.m, LAYER.n, LAYER.k, LAYER.r
    big, big_dy = (torch.empty(m, width, dtype=torch.bfloat16) for width in (k, n))
    big.requires_grad_()
    weight = torch.empty(n, k, dtype=torch.bfloat16)

    def adapter(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        return torch.zeros(r, k, dtype=dtype, requires_grad=True), torch.zeros(n, r, dtype=dtype, requires_grad=True)

    a, b = adapter()
    for name in ("cublas", "triton"):
        found[name] = Row(lambda name=name: lora_linear(big, weight, a, b, 2.0, backend=name), (big, a, b), big_dy)

    wide_a, wide_b = adapter(torch.float32)

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear(big, weight, wide_a, wide_b, 2.0, backend="cublas")

    found["fp32 adapters"] = Row(
        lambda: lora_linear(big, weight, wide_a, wide_b, 2.0, backend="cublas"), (big, wide_a, wide_b), big_dy
    )
    found["fp32, autocast"] = Row(autocast, (big, wide_a, wide_b), big_dy)
    layers = [GroupLayer(weight, [Adapter(*adapter(), 2.0)]) for _ in range(3)]
    trained = [tensor for layer in layers for tensor in layer.adapters[0][:2]]
    found["group of 3"] = Row(lambda: lora_group(big, layers, backend="cublas"), (big, *trained), [big_dy] * 3)

    def module() -> Any:
        linear = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer = fastlora.FusedLoraLinear.from_linear(linear, r=r, lora_alpha=2 * r)
        layer.backend = "cublas"
        return layer

    def trained_of(*modules: Any) -> list[Tensor]:
        return [one for layer in modules for one in layer.parameters() if one.requires_grad]

    alone, together = module(), {name: module() for name in "qkv"}
    grouping.seat_together(together)
    found["FusedLoraLinear"] = Row(lambda: alone(big), (big, *trained_of(alone)), big_dy)
    found["3 in a group"] = Row(
        lambda: [layer(big) for layer in together.values()], (big, *trained_of(*together.values())), [big_dy] * 3
    )
    return found


def launches_of(driver: Any, found: dict[str, Row]) -> dict[str, int]:
    """How many kernels a call of each row launches, forward and backward, once its kind is known."""
    counts = {}
    for name, row in found.items():
        row.both()
        before = driver.launches
        row.both()
        counts[name] = driver.launches - before
    return counts


def measure(found: dict[str, Row], rounds: int) -> dict[str, dict[str, Summary]]:
    """Seconds of the host per call of each row, "forward" and "both": every call timed alone, CALLS in a row."""
    functions = {(name, "forward"): row.forward for name, row in found.items()}
    functions |= {(name, "both"): row.both for name, row in found.items()}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    gc.disable()
    for _ in range(rounds):
        for key, function in functions.items():
            function()
            for _ in range(CALLS):
                begun = time.perf_counter()
                result = function()
                samples[key].append(time.perf_counter() - begun)
                del result
    gc.enable()
    return {name: {part: Summary.of(samples[name, part]) for part in ("forward", "both")} for name in found}


def main(arguments: list[str] | None = None) -> int:
    options = command("host", __doc__, 50).parse_args(arguments)
    torch.set_num_threads(1)
    facts: dict[str, Any] = {}
    with stubbed() as driver, tempfile.TemporaryDirectory() as folder:
        from fastlora.kernels import launch

        found = rows()
        layer = f"M={LAYER.m} {LAYER.n}x{LAYER.k} r={LAYER.r}"
        print(f"host µs per call (20th percentile), {layer}, torch {torch.__version__}")
        for plans in ("Python", "C++"):
            launch.use_native(compiled_plans(Path(folder)) if plans == "C++" else None)
            launches = launches_of(driver, found)
            seconds = measure(found, options.rounds)
            us = {name: {part: 1e6 * summary.p20 for part, summary in parts.items()} for name, parts in seconds.items()}
            show(plans, us, launches)
            facts |= {f"us_{plans}": us}
    facts |= {"us": {name: parts["both"] for name, parts in us.items()}, "launches": launches}
    if options.out is not None:
        write_json(options.out, facts | {"machine": machine.describe(CPU)})
    return 0


def show(plans: str, us: dict[str, dict[str, float]], launches: dict[str, int]) -> None:
    floor = us["linear"]["both"]
    print(f"{plans + ' plans':16} forward  backward     both  x linear  launches")
    for name, parts in us.items():
        forward, both = parts["forward"], parts["both"]
        print(f"{name:16} {forward:7.1f} {both - forward:9.1f} {both:8.1f} {both / floor:9.2f} {launches[name]:9}")
    for name, most, other in TARGETS:
        ratio = us[name]["both"] / us[other]["both"]
        print(f"target: {name} at most {most} x {other}: {ratio:.2f}, {'met' if ratio <= most else 'MISSED'}")
    over = us["FusedLoraLinear"]["both"] - us["cublas"]["both"]
    verdict = "met" if over <= MODULE_TARGET_US else "MISSED"
    print(f"target: FusedLoraLinear at most {MODULE_TARGET_US:.0f} µs over lora_linear: {over:.1f}, {verdict}")
