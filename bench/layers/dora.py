"""DoRA, all ways in turns: `python -m bench dora`.

One layer, forward + backward, on the same tensors: the frozen layer, LoRA and DoRA here, DoRA in eager PyTorch, and
PEFT's own layer, unpatched. Time (medians of interleaved rounds), bytes kept for the backward pass and, on a CPU, the
peak of what is allocated. What differs from eager by more than 2 % is not measured. Writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.functional import dora_linear, lora_linear
from fastlora.ops import reference

from ..harness import machine
from ..harness.contenders import Contender, Tensors, Unavailable
from ..harness.counting import Problem
from ..harness.memory import allocations_of, saved_bytes
from ..harness.timing import Summary, timer_for
from ..harness.turns import write_json

MOST_ERROR = 2e-2
SHAPES = {
    "cuda": [(8192, 4096, 4096, 16), (8192, 14336, 4096, 16), (8192, 1024, 4096, 16)],
    "cpu": [(512, 1024, 1024, 16), (512, 2048, 1024, 16), (64, 1024, 1024, 16), (1, 1024, 1024, 16)],
    "tiny": [(6, 24, 20, 4)],
}
DTYPES = {"bf16": ("bfloat16", "bfloat16"), "fp32": ("float32", "float32"), "mixed": ("bfloat16", "float32")}


def contenders(t: Tensors) -> dict[str, Contender]:
    """What is compared, built from the same tensors; the magnitudes are the weight's norms."""
    p, norm = t.problem, t.weight.float().norm(dim=1)
    magnitude = norm.to(t.lora_a.dtype).requires_grad_()
    leaves, settings = (t.lora_a, t.lora_b, magnitude), (t.scaling, t.bias, p.dropout)
    ways: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]] = {
        "frozen": (lambda x: F.linear(x, t.weight, t.bias), ()),
        "fastlora LoRA": (lambda x: lora_linear(x, t.weight, t.lora_a, t.lora_b, *settings), leaves[:2]),
        "eager": (lambda x: reference.dora_linear(x, t.weight, *leaves, *settings), leaves),
        "fastlora": (lambda x: dora_linear(x, t.weight, *leaves, *settings), leaves),
    }
    found = {name: Contender(name, *way, parameters=(t.weight,)) for name, way in ways.items()}
    with contextlib.suppress(Unavailable):
        found["peft"] = peft(t, magnitude)
    return found


def peft(t: Tensors, magnitude: Tensor) -> Contender:
    """PEFT's own layer, in training mode."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not installed: {error}") from None
    p = t.problem
    base = nn.Linear(p.k, p.n, bias=p.bias, device="meta")
    base.weight = nn.Parameter(t.weight, requires_grad=False)
    config = LoraConfig(
        r=p.r, lora_alpha=int(t.scaling * p.r), lora_dropout=p.dropout, target_modules=["0"], use_dora=True
    )
    layer: Any = inject_adapter_in_model(config, nn.Sequential(base))[0]  # type: ignore[index]
    layer.lora_A["default"].weight = nn.Parameter(t.lora_a.detach())
    layer.lora_B["default"].weight = nn.Parameter(t.lora_b.detach())
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude.detach())
    layer.train()
    leaves = tuple(
        layer.get_parameter(f"{name}.default.weight") for name in ("lora_A", "lora_B", "lora_magnitude_vector")
    )
    return Contender("peft", layer, leaves, parameters=(t.weight,))


def results_of(contender: Contender, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = contender.forward(x)
    return [y.detach(), *contender.backward(y, x, dy)]


def measure(shape: tuple[int, ...], kind: str, dropout: float, device: torch.device, rounds: int, clock: str) -> Any:
    m, n, k, r = shape
    problem = Problem(m, n, k, r, *DTYPES[kind], dropout=dropout)
    t = Tensors.random(problem, device)
    x, dy = t.inputs(1, device)[0]
    compared, failed = contenders(t), {}
    torch.manual_seed(0)
    want = results_of(compared["eager"], x, dy)
    for name in ("fastlora", "peft") if "peft" in compared else ("fastlora",):
        torch.manual_seed(0)
        pairs = zip(results_of(compared[name], x, dy), want, strict=True)
        error = max(((one.float() - other.float()).norm() / other.float().norm()).item() for one, other in pairs)
        if not error < MOST_ERROR and not (dropout and device.type == "cuda"):  # where the masks are other ones
            failed[name] = f"differs from eager by {error:.1e}"
            del compared[name]
    functions: dict[str, Callable[[], object]] = {}
    memory: dict[str, dict[str, float]] = {}
    for name, one in compared.items():

        def serve(one: Contender = one) -> object:
            with torch.no_grad():
                return one.forward(x)

        functions[f"{name} forward"] = serve
        functions[f"{name} both"] = lambda one=one: results_of(one, x, dy)
        memory[name] = {"saved_bytes": saved_bytes(one, x)}
        if device.type == "cpu":
            memory[name]["peak_bytes"] = allocations_of(functions[f"{name} both"])[1].peak
    samples = timer_for(device, clock).interleaved(functions, rounds)
    times = {
        name: {what: asdict(Summary.of(samples[f"{name} {what}"])) for what in ("forward", "both")} for name in compared
    }
    return {"problem": asdict(problem), "times": times, "memory": memory, "failed": failed}


def table(case: dict[str, Any]) -> str:
    p, times = case["problem"], case["times"]
    lines = [
        f"M={p['m']} {p['k']}->{p['n']} r={p['r']} {p['dtype']}, {p['adapter_dtype']} adapters, dropout {p['dropout']}",
        f"  {'':<14}{'forward ms':>12}{'both ms':>10}{'over frozen':>13}{'x peft':>8}{'kept MiB':>10}{'peak MiB':>10}",
    ]
    for name, entry in times.items():
        forward, both = entry["forward"]["median"], entry["both"]["median"]
        over = 100 * (both / times["frozen"]["both"]["median"] - 1)
        ratio = f"{times['peft']['both']['median'] / both:.2f}" if "peft" in times else ""
        kept, peak = (case["memory"][name].get(what) for what in ("saved_bytes", "peak_bytes"))
        sizes = "".join("" if size is None else f"{size / 2**20:>10.2f}" for size in (kept, peak))
        lines.append(f"  {name:<14}{1e3 * forward:>12.3f}{1e3 * both:>10.3f}{over:>12.0f}%{ratio:>8}{sizes}")
    lines += [f"  {name:<14}not measured: {why}" for name, why in case["failed"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench dora", description=(__doc__ or "").split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default here: {default})")
    parser.add_argument("--shapes", choices=SHAPES, help="which set (default: the device's)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may repeat (default: fp32, bf16 and mixed)")
    parser.add_argument("--dropout", type=float, action="append", help="may repeat (default: 0 and 0.1)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="on a CPU that is shared: cpu")
    parser.add_argument("--out", type=Path, help="the JSON (default: bench/results/<gpu or cpu>/dora.json)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = machine.describe(device)
    record: dict[str, Any] = {"machine": facts, "rounds": options.rounds, "clock": options.clock, "layers": []}
    out = options.out or machine.ROOT / "bench" / "results" / machine.slug(facts) / "dora.json"
    for shape in SHAPES[options.shapes or device.type]:
        for kind in options.dtype or ["fp32", "bf16", "mixed"]:
            for dropout in options.dropout or [0.0, 0.1]:
                record["layers"].append(measure(shape, kind, dropout, device, options.rounds, options.clock))
                print(table(record["layers"][-1]), flush=True)
                write_json(out, record)
    return int(any(case["failed"] for case in record["layers"]))
