"""An MLP of LoRA layers, fused and not: `python -m bench lora_mlp`. Time of a training step and bytes kept for it.

Forward + backward of the same layers in turns: eager PyTorch, `lora_group` and `lora_linear` with the activation in
eager PyTorch ("one by one"), and `lora_mlp`. The clock is the process's CPU time on a CPU, so that other processes
disturb less, and CUDA graphs' elsewhere. suite measures the same form among the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastlora.functional import Adapter, GroupLayer, lora_group, lora_mlp, multi_lora_linear
from fastlora.ops.mlp.aten import ACTIVATIONS
from fastlora.ops.reference import lora_linear

from ..harness import machine
from ..harness.timing import Summary, timer_for

SIZES = {"cuda": (8192, 4096, 14336), "cpu": (512, 512, 1408)}  # M, hidden, intermediate
WAYS = ("eager", "one by one", "lora_mlp")


class Problem:
    """Random layers and x; `ways` are functions of x that compute the same."""

    def __init__(self, size: tuple[int, int, int], r: int, dtype: torch.dtype, device: torch.device) -> None:
        m, hidden, intermediate = size
        self.x = torch.randn(m, hidden, device=device).to(dtype).requires_grad_()
        shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        self.layers = {name: self._layer(n, k, r, dtype, device) for name, (n, k) in shapes.items()}

    @staticmethod
    def _layer(n: int, k: int, r: int, dtype: torch.dtype, device: torch.device) -> GroupLayer:
        weight = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
        lora_A = torch.nn.Parameter(torch.randn(r, k, device=device) * k**-0.5)
        return GroupLayer(weight, [Adapter(lora_A, torch.nn.Parameter(torch.randn(n, r, device=device)), 2.0)])

    def ways(self, activation: str, gated: bool) -> dict[str, Callable[[], Tensor]]:
        x, act = self.x, ACTIVATIONS[activation].value
        gate, down = self.layers["gate"], self.layers["down"]
        up = self.layers["up"] if gated else None

        def eager_layer(x: Tensor, layer: GroupLayer) -> Tensor:
            adapter = layer.adapters[0]
            return lora_linear(x, layer.weight, adapter.lora_A, adapter.lora_B, adapter.scaling)

        def eager() -> Tensor:
            h = act(eager_layer(x, gate))
            return eager_layer(h if up is None else h * eager_layer(x, up), down)

        def one_by_one() -> Tensor:
            gated, *rest = lora_group(x, [gate] if up is None else [gate, up])
            h = act(gated)
            return multi_lora_linear(h * rest[0] if rest else h, down.weight, down.adapters)

        return dict(zip(WAYS, (eager, one_by_one, lambda: lora_mlp(x, gate, up, down, activation)), strict=True))

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        leaves = [self.x, *(factor for layer in self.layers.values() for factor in layer.adapters[0][:2])]

        def run() -> object:
            return torch.autograd.grad(forward().sum(), leaves, allow_unused=True)

        return run

    def saved_bytes(self, forward: Callable[[], Tensor]) -> int:
        """Bytes of distinct memory kept for the backward pass, weights and adapters left out."""
        fixed = {layer.weight.untyped_storage().data_ptr() for layer in self.layers.values()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in fixed:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
        return sum(kept.values())


def measure(device: torch.device, size: tuple[int, int, int], r: int, rounds: int) -> list[dict]:
    rows = []
    timer = timer_for(device, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(size, r, dtype, device)
        for activation, gated in itertools.product(ACTIVATIONS, (True, False)):
            ways = problem.ways(activation, gated)
            samples = timer.interleaved({name: problem.step(way) for name, way in ways.items()}, rounds)
            for name, way in ways.items():
                row = {"dtype": str(dtype).removeprefix("torch."), "activation": activation, "gated": gated}
                seconds = Summary.of(samples[name]).median
                rows.append(row | {"way": name, "seconds": seconds, "saved_bytes": problem.saved_bytes(way)})
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'':<28}{'eager':>10}{'one by one':>12}{'lora_mlp':>10}   ms, then MB kept"]
    for start in range(0, len(rows), len(WAYS)):
        several = rows[start : start + len(WAYS)]
        name = f"{several[0]['dtype']} {several[0]['activation']} {'gated' if several[0]['gated'] else 'plain'}"
        times = [f"{1e3 * row['seconds']:.1f}" for row in several]
        kept = [f"{row['saved_bytes'] / 1e6:.1f}" for row in several]
        lines.append(f"{name:<28}{times[0]:>10}{times[1]:>12}{times[2]:>10}   {' '.join(kept)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench lora_mlp", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=3, metavar=("M", "HIDDEN", "INTERMEDIATE"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write JSON there")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    m, hidden, intermediate = options.size or SIZES[device.type]
    rows = measure(device, (m, hidden, intermediate), options.rank, options.rounds)
    print(table(rows))
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": machine.describe(device), "rows": rows}, indent=1) + "\n")
    return 0
