"""Measuring contenders that compute the same: the turns, the ratios, the table, the JSON. Shared by the benchmarks of
one layer (lora_linear) and of larger pieces (suite).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contenders import Contender, Unavailable
from .counting import Problem, Roof
from .memory import allocations_of, saved_bytes
from .timing import Summary, Timer

MOST_ERROR = 2e-2  # of the output and each gradient next to eager's: a wrong kernel is wrong by 1, bf16 by about 5e-3
REFERENCE = "eager"
PEERS = ("peft", "compile")
MINIMUM_L2 = 60 * 2**20  # of an H200: inputs rotate over more than twice the device's L2

Tensors = Tensor | tuple[Tensor, ...]
Pair = tuple[Tensor, Tensors]


class Work(NamedTuple):
    """What any implementation must do: FLOPs, and bytes to and from memory."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, roof: Roof) -> float:
        return max(self.bytes / roof.bandwidth, self.flops / roof.flops)


@dataclass
class Case:
    """Something that several contenders compute. `builders` are called only when it is measured."""

    label: str
    facts: dict[str, Any]  # its sizes and dtypes, for the JSON
    work: dict[str, Work]  # "forward" and "both"
    inputs: Sequence[Pair]  # (x, dY), rotated over
    builders: Mapping[str, Callable[[], Contender]]
    random: bool = False  # with dropout the values of two contenders are not comparable
    most_error: float = MOST_ERROR
    floors: tuple[str, ...] = ("frozen",)  # contenders that compute something else: not compared
    problem: Problem | None = None  # where it is one LoRA layer, of which the time can be predicted


def measure(case: Case, names: list[str], device: torch.device, timer: Timer, rounds: int, roof: Roof) -> dict:
    """Times every contender of `names` that can run on `case`, in turns."""
    contenders: dict[str, Contender] = {}
    unavailable: dict[str, str] = {}
    functions: dict[str, Callable[[], object]] = {}
    memory: dict[str, dict[str, int]] = {}
    want = None
    for name in names:
        begun = time.monotonic()
        try:
            contender = case.builders[name]()
            peak, values = step_values(contender, *case.inputs[0])
            check_finite(values)
            memory[name] = {"peak_bytes": peak}
            if name != "compile":  # a compiled graph would be compiled once more under the hooks
                memory[name]["saved_bytes"] = saved_bytes(contender, case.inputs[0][0])
            if name not in case.floors and not case.random:
                want = want or step_values(case.builders[REFERENCE](), *case.inputs[0])[1]
                check_close(values, want, case.most_error)
            timed = passes(contender, case.inputs, device)
            try:
                timer.check(timed[1])
            except Exception as error:
                if name in PEERS:  # PEFT's mixed batches, say, copy indices from the host, which no CUDA graph can
                    raise Unavailable(f"cannot be timed: {type(error).__name__}: {error}") from None
                raise
        except Unavailable as error:
            unavailable[name] = str(error)
            continue
        except Exception as error:  # one broken contender must not cost the measurement of the others
            unavailable[name] = f"failed: {type(error).__name__}: {error}"
            continue
        del values
        contenders[name] = contender
        functions[f"{name} forward"], functions[f"{name} both"] = timed
        if time.monotonic() - begun > 30:
            print(f"  {name}: {time.monotonic() - begun:.0f} s to build and to check", flush=True)
    del want
    samples = timer.interleaved(functions, rounds) if functions else {}
    calls = len(case.inputs) if device.type == "cuda" else 1
    results = {}
    for name in contenders:
        forward, both = (Summary.of(samples[f"{name} {what}"], calls) for what in ("forward", "both"))
        results[name] = {
            "forward": asdict(forward),
            "both": asdict(both),
            "backward_median": both.median - forward.median,
            **memory[name],
        }
    add_ratios(results, case.work, roof)
    return {"rotating_inputs": len(case.inputs), "results": results, "unavailable": unavailable}


def rotation(nbytes: int, device: torch.device) -> int:
    """How many different inputs, with outputs of `nbytes` in all, make more than twice the L2."""
    if device.type != "cuda":
        return 2
    l2 = max(MINIMUM_L2, torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, math.ceil(2 * l2 / nbytes))


def passes(contender: Contender, inputs: Sequence[Pair], device: torch.device):
    """The functions that are timed: over all inputs in a captured graph, over one of them in turn on a CPU."""

    def forward(pairs):
        for x, _ in pairs:
            contender.forward(x)

    def both(pairs):
        for x, dy in pairs:
            contender.backward(contender.forward(x), x, dy)

    if device.type == "cuda":
        return lambda: forward(inputs), lambda: both(inputs)
    turns = {"forward": 0, "both": 0}

    def one(what, function):
        turns[what] += 1
        function([inputs[turns[what] % len(inputs)]])

    return lambda: one("forward", forward), lambda: one("both", both)


def step_values(contender: Contender, x: Tensor, dy: Tensors) -> tuple[int, list[Tensor]]:
    """The outputs and gradients of one step, and the most bytes that a second step holds next to what was there."""

    def step() -> list[Tensor]:
        y = contender.forward(x)
        outputs = y if isinstance(y, tuple) else (y,)
        return [*(output.detach() for output in outputs), *contender.backward(y, x, dy)]

    step()  # the first one compiles, checks and chooses
    if x.device.type != "cuda":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes two lines about each run of it otherwise
        values, allocated = allocations_of(step)
        return allocated.peak, values
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values = step()
    return torch.cuda.max_memory_allocated() - before, values


def check_finite(values: list[Tensor]) -> None:
    """One step before anything is timed: what is fast but wrong is not measured."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise FloatingPointError("an output or a gradient is not finite")


def check_close(values: list[Tensor], want: list[Tensor], most_error: float) -> None:
    for got, expected in zip(values, want, strict=True):
        norm = expected.float().norm()
        error = ((got.float() - expected.float()).norm() / norm.clamp_min(1e-30)).item()
        if not error < most_error:
            raise ArithmeticError(f"differs from eager PyTorch by {error:.1e} (relative), allowed {most_error:.0e}")


def add_ratios(results: dict[str, dict[str, Any]], work: dict[str, Work], roof: Roof) -> None:
    for entry in results.values():
        for direction in ("forward", "both"):
            seconds = entry[direction]["median"]
            flops, nbytes = work[direction]
            facts = {
                "flops": flops,
                "bytes": nbytes,
                "tflops": flops / seconds / 1e12,
                "gbytes_per_second": nbytes / seconds / 1e9,
                "speed_of_light_percent": 100 * work[direction].seconds(roof) / seconds,
            }
            for other in ("frozen", "eager", "peft"):
                if other in results:
                    facts[f"over_{other}"] = seconds / results[other][direction]["median"]
            entry[direction] |= facts


def table(label: str, case: dict[str, Any]) -> str:
    """A few lines for people: milliseconds, how much over the frozen layer, how many times faster than eager and
    PEFT, what is kept for the backward pass."""
    lines = [
        label,
        f"  {'':<17}{'fwd ms':>9}{'bwd ms':>9}{'both ms':>9}{'p20-p80':>19}"
        f"{'over frozen':>13}{'x eager':>9}{'x peft':>8}{'roof':>7}{'saved MB':>10}{'peak MB':>9}",
    ]
    for name, entry in case["results"].items():
        both = entry["both"]
        spread = f"{both['p20'] * 1e3:.3f}-{both['p80'] * 1e3:.3f}"
        over = f"{100 * (both['over_frozen'] - 1):+.1f} %" if "over_frozen" in both else ""
        faster = [f"{1 / both[key]:.2f}" if key in both else "" for key in ("over_eager", "over_peft")]
        megabytes = [f"{entry[key] / 1e6:.1f}" if key in entry else "" for key in ("saved_bytes", "peak_bytes")]
        lines.append(
            f"  {name:<17}{entry['forward']['median'] * 1e3:>9.3f}{entry['backward_median'] * 1e3:>9.3f}"
            f"{both['median'] * 1e3:>9.3f}{spread:>19}{over:>13}{faster[0]:>9}{faster[1]:>8}"
            f"{both['speed_of_light_percent']:>6.0f}%{megabytes[0]:>10}{megabytes[1]:>9}"
        )
    lines += [f"  {name:<17}not measured: {why}" for name, why in case["unavailable"].items()]
    return "\n".join(lines)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Through a temporary file, so that a machine that vanishes leaves the last complete record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def failures(record: dict[str, Any]) -> list[str]:
    """What was wrong or broke, as against what cannot run here."""
    return [
        f"{name}: {why}"
        for case in record["cases"]
        for name, why in case["unavailable"].items()
        if why.startswith("failed")
    ]
