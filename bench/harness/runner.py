"""The command of a benchmark whose contenders compute the same: its options, its loop over the cases, its record."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import counting, machine, turns
from .contenders import Unavailable
from .counting import Problem, Roof
from .timing import Timer, timer_for
from .turns import Case

DTYPES = {  # name on the command line: (base, adapters)
    "bf16": ("bfloat16", "bfloat16"),
    "fp32": ("float32", "float32"),
    "mixed": ("bfloat16", "float32"),
}


def command(name: str, doc: str | None, rounds: int | None, *options: str) -> argparse.ArgumentParser:
    """A benchmark's parser with --rounds (where it has any), --out, and of "device" and "clock" those named."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=(doc or "").partition("\n")[0])
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=int, default=rounds or None, help=f"turns (default: {rounds or 'by case'})"
        )
    if "device" in options:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", default=default, help=f"cpu or cuda (default here: {default})")
    if "clock" in options:
        parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="on a CPU that is shared: cpu")
    parser.add_argument("--out", type=Path, help="the JSON (default, where one is kept: bench/results/<gpu or cpu>)")
    return parser


def record_of(name: str, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Where a benchmark's JSON goes, and what each of them begins with."""
    facts = machine.describe(torch.device(getattr(options, "device", "cpu")))
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    out = options.out or machine.ROOT / "bench" / "results" / machine.slug(facts) / f"{name}.json"
    return out, {"machine": facts, "rounds": options.rounds, "clock": options.clock}


def new_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """With the options of contenders that compute the same."""
    parser = command(name, doc, 0, "device", "clock")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may repeat")
    parser.add_argument("--dropout", type=float, action="append", help="may repeat")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--contenders", help="comma-separated; those that a case does not have are passed over")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no new case is begun")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print an earlier run's tables and measure nothing")
    return parser


def some_of(parser: argparse.ArgumentParser, option: str, text: str | None, known: Sequence[str]) -> list[str] | None:
    """A comma-separated option's values; complains of those that are not known."""
    values = text.split(",") if text else None
    if unknown := sorted(set(values or ()) - set(known)):
        parser.error(f"{option}: got {', '.join(unknown)}, want some of {', '.join(known)}")
    return values


def label(p: Mapping[str, Any]) -> str:
    """Of one layer's problem."""
    kinds = p["dtype"] if p["dtype"] == p["adapter_dtype"] else f"{p['dtype']} with {p['adapter_dtype']} adapters"
    return f"M={p['m']} {p['k']}->{p['n']} r={p['r']} {kinds}, dropout {p['dropout']}"


def measure(case: Case, names: list[str], device: torch.device, timer: Timer, rounds: int, roof: Roof) -> dict:
    """One case's entry in the record."""
    found = turns.measure(case, [name for name in names if name in case.builders], device, timer, rounds, roof)
    if case.problem is None:
        return {"label": case.label, "facts": case.facts, **found}
    for name, entry in found["results"].items():
        if name in counting.PASSES:  # of bytes and FLOPs alone: docs/kernels/README.md
            entry["both"]["predicted_over_frozen"] = 1 + counting.overhead(name, case.problem, roof)
    return {"problem": asdict(case.problem), **found}


def run(name: str, makers: Sequence[Callable[[], Case]], names: list[str] | None, options: argparse.Namespace) -> int:
    """Measures what each of `makers` makes, the contenders called `names` (None: all but torch.compile on a CPU), and
    writes the record after each case. Returns the exit status: 1 where something was wrong or broke.
    """
    if options.show:
        for case in json.loads(options.show.read_text())["cases"]:
            print(turns.table(case.get("label") or label(case["problem"]), case))
        return 0
    device, begun = torch.device(options.device), time.monotonic()
    timer, (out, record) = timer_for(device, options.clock), record_of(name, options)
    roofs: dict[str, Roof] = {}
    record |= {"roofs": {}, "cases": [], "failed": [], "complete": False}
    for make in makers:
        if time.monotonic() - begun > options.time_limit:
            print(f"time limit of {options.time_limit:.0f} s: the remaining cases are not measured")
            break
        try:
            case = make()
            dtype = case.facts["dtype"]
            if dtype not in roofs:
                roof = roofs[dtype] = machine.measure_roof(device, dtype, timer)
                record["roofs"][dtype] = asdict(roof)
                print(f"roof, {dtype}: {roof.flops / 1e12:.2f} TFLOP/s, {roof.bandwidth / 1e9:.1f} GB/s", flush=True)
            chosen = names or [n for n in case.builders if n != "compile" or device.type == "cuda"]
            entry = measure(case, chosen, device, timer, options.rounds, roofs[dtype])
        except Unavailable as error:
            print(f"left out: {error}", flush=True)
            continue
        except Exception as error:  # the other cases are still to be measured
            record["failed"].append(f"{type(error).__name__}: {error}")
            print(f"FAILED: {record['failed'][-1]}", flush=True)
            continue
        record["cases"].append(entry)
        record["complete"] = len(record["cases"]) == len(makers)
        turns.write_json(out, record)
        print(turns.table(case.label, entry), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written: {out}")
    return 1 if record["failed"] or turns.failures(record) else 0


def layer_case(layer: Problem, inputs: Sequence[turns.Pair], builders: Mapping[str, Any], **rest: Any) -> Case:
    """One layer's."""
    work = {
        direction: turns.Work(counting.useful_flops(layer, direction), counting.compulsory_bytes(layer, direction))
        for direction in ("forward", "both")
    }
    return Case(label(asdict(layer)), asdict(layer), work, inputs, builders, random=layer.dropout > 0, **rest)
