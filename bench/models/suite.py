"""Larger pieces than a layer, all contenders in turns: `python -m bench suite` (docs/benchmarks.md).

Groups of layers that share x, gated MLPs, batches of several adapters, whole transformer blocks at real shapes, and a
training step of a small language model.
Prints a short table per case and writes everything as JSON, as lora_linear does.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..harness import machine, turns
from ..harness.contenders import Unavailable
from ..harness.counting import Problem, Roof
from ..harness.timing import timer_for
from ..harness.turns import Case
from ..layers import forms, mixed
from ..layers.lora_linear import DTYPES
from . import blocks


@dataclass(frozen=True)
class Sizes:
    """What is measured on one sort of device."""

    groups: str  # a key of forms.GROUPS, forms.MLPS and mixed.BATCHES
    blocks: tuple[str, ...]
    sequences: int
    tokens: int
    model: str
    model_sequences: int
    model_tokens: int
    dtypes: tuple[str, ...]
    dropouts: tuple[float, ...]
    rounds: int


SIZES = {
    "cuda": Sizes(
        "cuda", ("llama-3-8b", "qwen3-8b", "mistral-7b", "t5-base", "vit-l"), 4, 2048, "llama-400m", 4, 1024,
        ("bf16", "mixed"), (0.0, 0.1), 20,
    ),
    "cpu": Sizes(
        "cpu", ("llama-3-8b", "qwen3-8b", "mistral-7b", "t5-base", "vit-l"), 1, 128, "llama-small", 2, 128,
        ("mixed",), (0.0,), 8,
    ),
    "tiny": Sizes("tiny", ("tiny",), 2, 16, "llama-tiny", 2, 16, ("fp32",), (0.0, 0.1), 2),
}  # fmt: skip
FORMS = ("group", "mlp", "mixed", "block", "train")


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Callable[[], Case]]:
    """What makes each case, the most telling ones first: a run may be cut short."""
    sizes: Sizes = options.sizes
    for kind in options.dtype:
        dtype, adapter_dtype = DTYPES[kind]
        for p in options.dropout:
            for form in options.forms:
                if form == "group":
                    for name, (m, k, ns) in forms.GROUPS[sizes.groups].items():
                        group = forms.Group(m, k, ns, options.r, dtype, adapter_dtype, p)
                        yield lambda name=name, group=group: forms.group_case(name, group, device)
                elif form == "mlp":
                    like = Problem(0, 0, 0, options.r, dtype, adapter_dtype, dropout=p)
                    yield lambda like=like: forms.mlp_case(*forms.MLPS[sizes.groups], like, device)
                elif form == "mixed":
                    like = Problem(0, 0, 0, options.r, dtype, adapter_dtype, dropout=p)
                    yield lambda like=like: mixed.mixed_case(mixed.BATCHES[sizes.groups], like, device)
                elif form == "block":
                    for name in options.models or sizes.blocks:
                        amount = blocks.sequences_of(name, sizes.sequences, sizes.tokens)
                        settings = blocks.Settings(*amount, options.r, p, dtype, adapter_dtype)
                        yield lambda name=name, settings=settings: blocks.block_case(name, settings, device, 2)
                elif form == "train":
                    amount = (sizes.model_sequences, sizes.model_tokens)
                    settings = blocks.Settings(*amount, options.r, p, dtype, adapter_dtype)
                    yield lambda settings=settings: blocks.training_case(sizes.model, settings, device, 2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench suite", description=(__doc__ or "").partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default here: {default})")
    parser.add_argument("--size", choices=SIZES, help="(default: the device's)")
    parser.add_argument("--forms", default=",".join(FORMS), help="comma-separated (default: all)")
    parser.add_argument("--models", help="blocks, comma-separated, of: " + ", ".join(blocks.BLOCKS))
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may repeat (default: the size's)")
    parser.add_argument("--dropout", type=float, action="append", help="may repeat (default: the size's)")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--contenders", help="comma-separated; those that a case does not have are passed over")
    parser.add_argument("--rounds", type=int, help="turns per case (default: the size's)")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no new case is begun")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="on a CPU that is shared: cpu")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print an earlier run's tables and measure nothing")
    parser.add_argument("--out", type=Path, help="the JSON (default: bench/results/<gpu or cpu>/suite.json)")
    options = parser.parse_args(arguments)
    options.sizes = SIZES[options.size or options.device.partition(":")[0]]
    options.forms = options.forms.split(",")
    if unknown := sorted(set(options.forms) - set(FORMS)):
        parser.error(f"--forms: got {', '.join(unknown)}, want some of {', '.join(FORMS)}")
    options.models = options.models.split(",") if options.models else None
    if unknown := sorted(set(options.models or ()) - set(blocks.BLOCKS)):
        parser.error(f"--models: got {', '.join(unknown)}, want some of {', '.join(blocks.BLOCKS)}")
    options.contenders = options.contenders.split(",") if options.contenders else None
    options.dtype = options.dtype or list(options.sizes.dtypes)
    options.dropout = options.dropout or list(options.sizes.dropouts)
    options.rounds = options.rounds or options.sizes.rounds
    return options


def measure(make: Callable[[], Case], options: argparse.Namespace, device: torch.device, roofs: dict[str, Roof]):
    """One case's entry in the record."""
    timer = timer_for(device, options.clock)
    case = make()
    dtype = case.facts["dtype"]
    if dtype not in roofs:
        roofs[dtype] = machine.measure_roof(device, dtype, timer)
    names = [name for name in case.builders if options.contenders is None or name in options.contenders]
    if options.contenders is None and device.type != "cuda":
        names = [name for name in names if name != "compile"]
    found = turns.measure(case, names, device, timer, options.rounds, roofs[dtype])
    return {"label": case.label, "facts": case.facts, **found}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        for case in json.loads(options.show.read_text())["cases"]:
            print(turns.table(case["label"], case))
        return 0
    device, begun = torch.device(options.device), time.monotonic()
    facts = machine.describe(device)
    out = options.out or machine.ROOT / "bench" / "results" / machine.slug(facts) / "suite.json"
    roofs: dict[str, Roof] = {}
    record: dict[str, Any] = {"machine": facts, "rounds": options.rounds, "clock": options.clock}
    record |= {"cases": [], "failed": []}
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    makers = list(cases(options, device))
    for make in makers:
        if time.monotonic() - begun > options.time_limit:
            print(f"time limit of {options.time_limit:.0f} s: the remaining cases are not measured")
            break
        try:
            case = measure(make, options, device, roofs)
        except Unavailable as error:
            print(f"left out: {error}", flush=True)
            continue
        except Exception as error:  # the other cases are still to be measured
            failed = f"{type(error).__name__}: {error}"
            record["failed"].append(failed)
            print(f"FAILED: {failed}", flush=True)
            continue
        record["cases"].append(case)
        record["roofs"] = {dtype: asdict(roof) for dtype, roof in roofs.items()}
        record["complete"] = len(record["cases"]) == len(makers)
        turns.write_json(out, record)
        print(turns.table(case["label"], case), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written: {out}")
    return 1 if record["failed"] or turns.failures(record) else 0
