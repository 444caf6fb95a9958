"""One LoRA linear layer, all contenders in turns: `python -m bench.lora_linear` (docs/benchmarks.md).

Prints a short table per case and writes everything as JSON: medians and 20th/80th percentiles of forward and of
forward + backward, the ratio to the frozen layer and to eager PyTorch, FLOPs, bytes, and the share of the roof that
was measured in the same run. "backward" is the difference of the two medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import counting, machine
from .contenders import CONTENDERS, Contender, Tensors, Unavailable, build
from .counting import Problem, Roof
from .timing import Summary, Timer, timer_for

MINIMUM_L2 = 60 * 2**20  # of an H200: inputs rotate over more than twice the device's L2

MOST_ERROR = 2e-2  # of the output and each gradient beside eager's: a wrong kernel is wrong by 1, bf16 by about 5e-3

SHAPES = {  # (M, N, K): a Llama-3-8B block's linears on a GPU; what a CPU does in milliseconds elsewhere
    "cuda": [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (8192, 1024, 4096)],
    "cpu": [(512, 1024, 1024), (512, 4096, 1024), (512, 1024, 4096)],
    "tiny": [(64, 48, 32)],
}
DTYPES = {  # name on the command line: (base, adapters)
    "bf16": ("bfloat16", "bfloat16"),
    "fp32": ("float32", "float32"),
    "mixed": ("bfloat16", "float32"),
}


def contender_names(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return list(CONTENDERS)
    return ["frozen", "eager", "peft", "addmm", "torch"]


def measure_case(
    problem: Problem, names: list[str], device: torch.device, timer: Timer, rounds: int, roof: Roof
) -> dict[str, Any]:
    """Times every contender that can run on `problem`, in turns."""
    tensors = Tensors.random(problem, device)
    inputs = tensors.inputs(rotation(problem, device), device)
    contenders, unavailable = {}, {}
    functions = {}
    for name in names:
        try:
            contender = build(name, tensors)
            check_values(contender, tensors, *inputs[0])
        except Unavailable as error:
            unavailable[name] = str(error)
            continue
        except Exception as error:  # one broken contender must not cost the measurement of the others
            unavailable[name] = f"failed: {type(error).__name__}: {error}"
            continue
        contenders[name] = contender
        functions[f"{name} forward"], functions[f"{name} both"] = passes(contender, inputs, device)
    samples = timer.interleaved(functions, rounds)
    calls = len(inputs) if device.type == "cuda" else 1
    results = {}
    for name in contenders:
        forward, both = (Summary.of(samples[f"{name} {what}"], calls) for what in ("forward", "both"))
        results[name] = {
            "forward": asdict(forward),
            "both": asdict(both),
            "backward_median": both.median - forward.median,
        }
    add_ratios(results, problem, roof)
    return {"problem": asdict(problem), "rotating_inputs": len(inputs), "results": results, "unavailable": unavailable}


def rotation(problem: Problem, device: torch.device) -> int:
    """How many different inputs make more than twice the L2."""
    if device.type != "cuda":
        return 2
    l2 = max(MINIMUM_L2, torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, math.ceil(2 * l2 / (problem.x + problem.y)))


def passes(contender: Contender, inputs: list, device: torch.device):
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


def check_values(contender: Contender, tensors: Tensors, x: torch.Tensor, dy: torch.Tensor) -> None:
    """One step before anything is timed: what is fast but wrong is not measured. With dropout only finiteness is
    checked."""
    y = contender.forward(x)
    got = (y.detach(), *contender.backward(y, x, dy))
    if not all(bool(value.isfinite().all()) for value in got):
        raise FloatingPointError("an output or a gradient is not finite")
    if tensors.problem.dropout or contender.name == "frozen":
        return
    eager = build("eager", tensors)
    y = eager.forward(x)
    for value, want in zip(got, (y.detach(), *eager.backward(y, x, dy)), strict=True):
        error = ((value.float() - want.float()).norm() / want.float().norm()).item()
        if not error < MOST_ERROR:
            raise ArithmeticError(f"differs from eager PyTorch by {error:.1e} (relative), allowed {MOST_ERROR:.0e}")


def add_ratios(results: dict[str, dict[str, Any]], problem: Problem, roof: Roof) -> None:
    for entry in results.values():
        for direction in ("forward", "both"):
            seconds = entry[direction]["median"]
            facts = {
                "tflops": counting.useful_flops(problem, direction) / seconds / 1e12,
                "speed_of_light_percent": counting.speed_of_light(problem, direction, seconds, roof),
            }
            for other in ("frozen", "eager", "peft"):
                if other in results:
                    facts[f"over_{other}"] = seconds / results[other][direction]["median"]
            entry[direction] |= facts


def table(case: dict[str, Any]) -> str:
    """A few lines for people: milliseconds, how much over the frozen layer, how many times faster than eager and
    PEFT."""
    p = case["problem"]
    kinds = p["dtype"] if p["dtype"] == p["adapter_dtype"] else f"{p['dtype']} with {p['adapter_dtype']} adapters"
    lines = [
        f"M={p['m']} {p['k']}->{p['n']} r={p['r']} {kinds}, dropout {p['dropout']}",
        f"  {'':<16}{'fwd ms':>9}{'bwd ms':>9}{'both ms':>9}{'p20-p80':>16}"
        f"{'over frozen':>13}{'x eager':>9}{'x peft':>8}{'roof':>7}",
    ]
    for name, entry in case["results"].items():
        both = entry["both"]
        spread = f"{both['p20'] * 1e3:.3f}-{both['p80'] * 1e3:.3f}"
        over = f"{100 * (both['over_frozen'] - 1):+.1f} %" if "over_frozen" in both else ""
        faster = [f"{1 / both[key]:.2f}" if key in both else "" for key in ("over_eager", "over_peft")]
        lines.append(
            f"  {name:<16}{entry['forward']['median'] * 1e3:>9.3f}{entry['backward_median'] * 1e3:>9.3f}"
            f"{both['median'] * 1e3:>9.3f}{spread:>16}{over:>13}{faster[0]:>9}{faster[1]:>8}"
            f"{both['speed_of_light_percent']:>6.0f}%"
        )
    lines += [f"  {name:<16}not measured: {why}" for name, why in case["unavailable"].items()]
    return "\n".join(lines)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Through a temporary file, so that a machine that vanishes leaves the last complete record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.lora_linear", description=(__doc__ or "").partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default here: {default})")
    parser.add_argument("--shapes", choices=SHAPES, help="which set of shapes (default: the device's)")
    parser.add_argument(
        "--shape", action="append", metavar="MxNxK", help="one shape, such as 8192x4096x4096; may repeat"
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may repeat (default: bf16 on a GPU, all on a CPU)"
    )
    parser.add_argument("--dropout", type=float, action="append", help="may repeat (default: 0 and 0.1)")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--contenders", help="comma-separated, of: " + ", ".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, help="turns per case (default: 30 on a GPU, 60 on a CPU)")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no new case is begun")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="on a CPU that is shared: cpu")
    parser.add_argument(
        "--show", type=Path, metavar="JSON", help="print the tables of an earlier run and measure nothing"
    )
    parser.add_argument("--out", type=Path, help="the JSON (default: bench/results/<gpu or cpu>/lora_linear.json)")
    options = parser.parse_args(arguments)
    names = (options.contenders or "").split(",") if options.contenders else None
    if names and (unknown := sorted(set(names) - set(CONTENDERS))):
        parser.error(f"--contenders: got {', '.join(unknown)}, want some of {', '.join(CONTENDERS)}")
    options.names = names or contender_names(torch.device(options.device))
    try:
        options.cases = cases(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def cases(options: argparse.Namespace) -> list[Problem]:
    shapes = SHAPES[options.shapes or options.device.partition(":")[0]]
    if options.shape:
        shapes = []
        for text in options.shape:
            parts = text.split("x")
            if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
                raise ValueError(f"--shape: got {text!r}, want MxNxK, such as 8192x4096x4096")
            shapes.append(tuple(map(int, parts)))
    if options.r < 1:
        raise ValueError(f"--r: got {options.r}, want at least 1")
    kinds = options.dtype or (["bf16"] if options.device.startswith("cuda") else list(DTYPES))
    return [
        Problem(m, n, k, options.r, *DTYPES[kind], bias=options.bias, dropout=p)
        for kind in kinds
        for p in options.dropout or [0.0, 0.1]
        for m, n, k in shapes
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        print("\n".join(table(case) for case in json.loads(options.show.read_text())["cases"]))
        return 0
    device, begun = torch.device(options.device), time.monotonic()
    timer = timer_for(device, options.clock)
    facts = machine.describe(device)
    rounds = options.rounds or (30 if device.type == "cuda" else 60)
    out = options.out or machine.ROOT / "bench" / "results" / machine.slug(facts) / "lora_linear.json"
    roofs: dict[str, Roof] = {}
    record: dict[str, Any] = {
        "machine": facts,
        "rounds": rounds,
        "clock": options.clock,
        "roofs": {},
        "cases": [],
        "complete": False,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    for problem in options.cases:
        if time.monotonic() - begun > options.time_limit:
            print(f"time limit of {options.time_limit:.0f} s: the remaining cases are not measured")
            break
        if problem.dtype not in roofs:
            roof = roofs[problem.dtype] = machine.measure_roof(device, problem.dtype, timer)
            record["roofs"][problem.dtype] = asdict(roof)
            print(
                f"roof, {problem.dtype}: {roof.flops / 1e12:.2f} TFLOP/s, {roof.bandwidth / 1e9:.1f} GB/s", flush=True
            )
        case = measure_case(problem, options.names, device, timer, rounds, roofs[problem.dtype])
        record["cases"].append(case)
        record["complete"] = len(record["cases"]) == len(options.cases)
        write_json(out, record)
        print(table(case), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written: {out}")
    failed = [
        f"{name}: {why}"
        for case in record["cases"]
        for name, why in case["unavailable"].items()
        if why.startswith("failed")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
