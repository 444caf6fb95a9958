"""Layers that share x, one by one and as a group, in turns: `python -m bench lora_group` (docs/benchmarks.md).

Prints the ratio of the group's time to that of the layers one by one, forward and forward + backward, for q, k, v of a
model with grouped-query attention, for its k and v alone, and for gate and up. On a CPU times are processor time.
`--out PATH` keeps them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.functional import Adapter, GroupLayer, lora_group, multi_lora_linear

from ..harness import machine
from ..harness.timing import Summary, timer_for
from .forms import GROUPS

SHAPES = {**GROUPS, "tiny": {"qkv": (512, 256, (64, 16, 16)), "gate and up": (512, 256, (96, 96))}}
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32,) * 2,
}


def one_by_one(x: Tensor, layers: list[GroupLayer]) -> tuple[Tensor, ...]:
    return tuple(multi_lora_linear(x, layer.weight, layer.adapters, layer.bias) for layer in layers)


def build(
    shape: tuple[int, int, tuple[int, ...]],
    r: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    p: float,
    device: torch.device,
) -> tuple[Tensor, list[GroupLayer], list[Tensor]]:
    """(x, layers, the outputs' gradients), random."""
    m, k, sizes = shape
    dtype, adapter_dtype = dtypes

    def randn(rows: int, columns: int, to: torch.dtype) -> Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).to(to)

    layers = [
        GroupLayer(
            randn(n, k, dtype),
            [Adapter(randn(r, k, adapter_dtype).requires_grad_(), randn(n, r, adapter_dtype).requires_grad_(), 2.0, p)],
        )
        for n in sizes
    ]
    return torch.randn(m, k, device=device).to(dtype).requires_grad_(), layers, [randn(m, n, dtype) for n in sizes]


def functions(x: Tensor, layers: list[GroupLayer], dys: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Forward, and forward + backward, both ways; x is an activation, as in a model."""
    leaves = [x, *(tensor for layer in layers for tensor in layer.adapters[0][:2])]
    ways = {"one by one": one_by_one, "group": lora_group}

    def both(way: Callable) -> object:
        return torch.autograd.grad(way(x.view_as(x), layers), leaves, dys)

    found: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        found[f"{name} forward"] = lambda way=way: way(x.view_as(x), layers)
        found[f"{name} both"] = lambda way=way: both(way)
    return found


def measure(device: torch.device, sizes: str, r: int, rounds: int) -> list[dict[str, Any]]:
    timer = timer_for(device, clock="cpu")
    cases = []
    for shape_name, shape in SHAPES[sizes].items():
        for dtype_name, dtypes in DTYPES.items():
            for p in (0.0, 0.1):
                samples = timer.interleaved(functions(*build(shape, r, dtypes, p, device)), rounds)
                times = {name: Summary.of(seconds) for name, seconds in samples.items()}
                ratios = {
                    what: times[f"group {what}"].median / times[f"one by one {what}"].median
                    for what in ("forward", "both")
                }
                cases.append(
                    {
                        "group": shape_name,
                        "m": shape[0],
                        "k": shape[1],
                        "n": shape[2],
                        "r": r,
                        "dtypes": dtype_name,
                        "dropout": p,
                        "ratios": ratios,
                        "times": {name: asdict(summary) for name, summary in times.items()},
                    }
                )
                print(
                    f"{shape_name:12} {dtype_name:6} p={p:<4} group / one by one: "
                    f"forward {ratios['forward']:.3f}, forward + backward {ratios['both']:.3f}",
                    flush=True,
                )
    return cases


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Layers that share x: one by one, and as a group.")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = "tiny" if options.tiny else device.type
    cases = measure(device, sizes, options.rank, options.rounds)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine.describe(device), "cases": cases}, indent=1) + "\n")
