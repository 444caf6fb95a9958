"""One LoRA linear layer, all contenders in turns: `python -m bench lora_linear` (docs/benchmarks.md).

Prints a short table per case and writes everything as JSON: medians and 20th/80th percentiles of forward and of
forward + backward, the ratio to the frozen layer and to eager PyTorch, FLOPs, bytes, and the share of the roof that
was measured in the same run. "backward" is the difference of the two medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..harness import counting, machine, turns
from ..harness.contenders import CONTENDERS, Tensors, build
from ..harness.counting import Problem, Roof
from ..harness.timing import Timer, timer_for

SHAPES = {  # (M, N, K): a Llama-3-8B block's linears on a GPU; what a CPU does in milliseconds elsewhere
    "cuda": [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (8192, 1024, 4096)],
    "cpu": [(512, 1024, 1024), (512, 4096, 1024), (512, 1024, 4096)],
    "peers": [(m, n, n) for n in (4096, 5120, 8192) for m in (2048, 4096, 8192)],  # as the peers' papers measure
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
    case = turns.Case(
        label(asdict(problem)),
        asdict(problem),
        work(problem),
        tensors.inputs(rotation(problem, device), device),
        {name: functools.partial(build, name, tensors) for name in CONTENDERS},
        random=problem.dropout > 0,
    )
    found = turns.measure(case, names, device, timer, rounds, roof)
    for name, entry in found["results"].items():
        if name in counting.PASSES:  # of bytes and FLOPs alone: docs/kernels/README.md
            entry["both"]["predicted_over_frozen"] = 1 + counting.overhead(name, problem, roof)
    return {"problem": asdict(problem), **found}


def work(problem: Problem) -> dict[str, turns.Work]:
    return {
        direction: turns.Work(counting.useful_flops(problem, direction), counting.compulsory_bytes(problem, direction))
        for direction in ("forward", "both")
    }


def rotation(problem: Problem, device: torch.device) -> int:
    """How many different inputs make more than twice the L2."""
    return turns.rotation(problem.x + problem.y, device)


def label(p: dict[str, Any]) -> str:
    kinds = p["dtype"] if p["dtype"] == p["adapter_dtype"] else f"{p['dtype']} with {p['adapter_dtype']} adapters"
    return f"M={p['m']} {p['k']}->{p['n']} r={p['r']} {kinds}, dropout {p['dropout']}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench lora_linear", description=(__doc__ or "").partition("\n")[0])
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
        for case in json.loads(options.show.read_text())["cases"]:
            print(turns.table(label(case["problem"]), case))
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
        turns.write_json(out, record)
        print(turns.table(label(case["problem"]), case), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written: {out}")
    return 1 if turns.failures(record) else 0
