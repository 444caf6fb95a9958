"""A batch whose sequences use different adapters, all ways in turns: `python -m bench multi_adapter`.

On a CPU beside PEFT's own `adapter_names=` path; on a GPU also each adapter's rows gathered and added in eager
PyTorch. Prints the median time of each and its ratio to the frozen layer; writes JSON. Every way takes one step first,
and what differs from eager by more than 2 % is not measured.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import machine
from ..harness.timing import Summary, timer_for
from ..harness.turns import write_json

MOST_ERROR = 2e-2


@dataclass(frozen=True)
class Batch:
    """`sequences` of `tokens` rows, dealt out in turn over `adapters` and, with `bare`, none."""

    sequences: int
    tokens: int
    adapters: int
    k: int
    n: int
    r: int = 16
    bare: bool = False

    def ids(self) -> list[int]:
        ways = self.adapters + self.bare
        return [(i % ways) - self.bare for i in range(self.sequences)]


SIZES = {
    "cuda": [Batch(8, 1024, 8, 4096, 4096), Batch(8, 1024, 4, 4096, 14336, bare=True), Batch(64, 1, 16, 4096, 4096)],
    "cpu": [Batch(8, 64, 4, 1024, 1024), Batch(8, 64, 3, 1024, 1024, bare=True), Batch(32, 1, 8, 1024, 1024)],
    "tiny": [Batch(4, 5, 2, 32, 48, r=4), Batch(4, 1, 2, 32, 48, r=4, bare=True)],
}
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.bfloat16, torch.float32),
}

Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tensors:
    x: Tensor
    dy: Tensor
    weight: Tensor
    factors: list[tuple[torch.nn.Parameter, torch.nn.Parameter]]
    scaling: float = 2.0

    @classmethod
    def random(cls, batch: Batch, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device) -> Tensors:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, to)

        factors = [
            (
                torch.nn.Parameter(randn(batch.r, batch.k, scale=batch.k**-0.5, to=adapter_dtype)),
                torch.nn.Parameter(randn(batch.n, batch.r, scale=batch.r**-0.5, to=adapter_dtype)),
            )
            for _ in range(batch.adapters)
        ]
        x = randn(batch.sequences, batch.tokens, batch.k).requires_grad_()
        dy = randn(batch.sequences, batch.tokens, batch.n)
        return cls(x, dy, randn(batch.n, batch.k, scale=batch.k**-0.5), factors)


def ways(batch: Batch, t: Tensors) -> dict[str, Way]:
    """What is compared, built from the same tensors."""
    from fastlora.kernels.segment_plan import Segments
    from fastlora.ops.call import Adapter
    from fastlora.ops.mixed.mixed import lora_mixed_batch

    ids = batch.ids()
    where = [
        torch.tensor([i for i, one in enumerate(ids) if one == a], device=t.x.device) for a in range(batch.adapters)
    ]
    adapters = [Adapter(a, b, t.scaling) for a, b in t.factors]
    segments = Segments(ids, batch.tokens)

    def eager(x: Tensor) -> Tensor:
        y = F.linear(x, t.weight)
        for rows, (a, b) in zip(where, t.factors, strict=True):
            term = F.linear(F.linear(x[rows].to(a.dtype), a), b) * t.scaling
            y = y.index_add(0, rows, term.to(y.dtype))
        return y

    found: dict[str, Way] = {
        "frozen": lambda x: F.linear(x, t.weight),
        "eager": eager,
        "fastlora": lambda x: lora_mixed_batch(x, t.weight, adapters, segments),
    }
    layer = peft_layer(batch, t)
    if layer is not None:
        names = ["__base__" if i < 0 else str(i) for i in ids]
        found["peft"] = lambda x: layer(x, adapter_names=names)
    return found


def peft_layer(batch: Batch, t: Tensors) -> torch.nn.Module | None:
    """PEFT's own layer with the same parameters, or None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    model = torch.nn.Sequential(torch.nn.Linear(batch.k, batch.n, bias=False))
    config = peft.LoraConfig(r=batch.r, lora_alpha=int(t.scaling * batch.r), target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several adapters are meant
        for i in range(batch.adapters):
            peft.inject_adapter_in_model(config, model, adapter_name=str(i))
    layer: Any = model[0]
    layer.base_layer.weight = torch.nn.Parameter(t.weight, requires_grad=False)
    for i, (a, b) in enumerate(t.factors):
        layer.lora_A[str(i)].weight, layer.lora_B[str(i)].weight = a, b
    return layer


def step(way: Way, t: Tensors, with_factors: bool = True) -> list[Tensor]:
    leaves = [t.x, *(leaf for pair in t.factors for leaf in pair)] if with_factors else [t.x]
    y = way(t.x)
    return [y.detach(), *torch.autograd.grad(y, leaves, t.dy)]


def measure(batch: Batch, kind: str, device: torch.device, rounds: int, clock: str) -> dict[str, Any]:
    t = Tensors.random(batch, *DTYPES[kind], device)
    compared = ways(batch, t)
    want = step(compared["eager"], t)
    failed = {}
    for name in [name for name in compared if name not in ("frozen", "eager")]:
        errors = [
            ((one.float() - other.float()).norm() / other.float().norm()).item()
            for one, other in zip(step(compared[name], t), want, strict=True)
        ]
        if not max(errors) < MOST_ERROR:
            failed[name] = f"differs from eager by {max(errors):.1e}"
            del compared[name]
    functions: dict[str, Callable[[], object]] = {}
    for name, way in compared.items():

        def forward(way: Way = way) -> object:
            with torch.no_grad():
                return way(t.x)

        functions[f"{name} forward"] = forward
        functions[f"{name} both"] = lambda way=way, name=name: step(way, t, name != "frozen")
    samples = timer_for(device, clock).interleaved(functions, rounds)
    results = {
        name: {what: asdict(Summary.of(samples[f"{name} {what}"])) for what in ("forward", "both")} for name in compared
    }
    return {"batch": asdict(batch), "dtypes": kind, "results": results, "failed": failed}


def table(case: dict[str, Any]) -> str:
    batch = case["batch"]
    bare = ", and none" if batch["bare"] else ""
    lines = [
        f"{batch['sequences']} x {batch['tokens']} rows, {batch['adapters']} adapters{bare}, "
        f"{batch['k']}->{batch['n']} r={batch['r']} {case['dtypes']}",
        f"  {'':<10}{'serve ms':>10}{'train ms':>10}{'serve x peft':>14}{'train x peft':>14}{'train x frozen':>16}",
    ]
    results = case["results"]
    for name, entry in results.items():
        forward, both = entry["forward"]["median"], entry["both"]["median"]
        ratios = [
            f"{results['peft'][w]['median'] / entry[w]['median']:.2f}" if "peft" in results else "" for w in entry
        ]
        over = both / results["frozen"]["both"]["median"]
        lines.append(
            f"  {name:<10}{forward * 1e3:>10.3f}{both * 1e3:>10.3f}{ratios[0]:>14}{ratios[1]:>14}{over:>16.2f}"
        )
    lines += [f"  {name:<10}not measured: {why}" for name, why in case["failed"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench multi_adapter", description=(__doc__ or "").split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default here: {default})")
    parser.add_argument("--sizes", choices=SIZES, help="which set of batches (default: the device's)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may repeat (default: bf16 and mixed)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="on a CPU that is shared: cpu")
    parser.add_argument("--out", type=Path, help="the JSON (default: bench/results/<gpu or cpu>/multi_adapter.json)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = machine.describe(device)
    record: dict[str, Any] = {"machine": facts, "rounds": options.rounds, "clock": options.clock, "cases": []}
    out = options.out or machine.ROOT / "bench" / "results" / machine.slug(facts) / "multi_adapter.json"
    for batch in SIZES[options.sizes or device.type]:
        for kind in options.dtype or ["bf16", "mixed"]:
            record["cases"].append(measure(batch, kind, device, options.rounds, options.clock))
            print(table(record["cases"][-1]), flush=True)
            write_json(out, record)
    return int(any(case["failed"] for case in record["cases"]))
