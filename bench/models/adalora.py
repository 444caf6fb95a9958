"""AdaLoRA's part of a training step, in turns: `python -m bench adalora`.

Importances, scores, masks (a step of `RankAllocator` and PEFT's `update_and_allocate`), and the penalty with its
gradient, on a model of many layers with random factors and gradients; no forward pass. The scores of a first step are
compared with PEFT's before anything is timed. Writes JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fastlora

from ..harness.runner import command, record_of
from ..harness.timing import CpuTimer, Summary
from ..harness.turns import write_json

MOST_ERROR = 1e-4
STEPS = 10**6  # of the schedule: every timed step deals out, and none is the last
TARGETS = ("q", "v")


class Model(nn.Module):
    """Blocks of two linear layers. Called, it gives a loss that depends on nothing, for PEFT to add its penalty to."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({name: nn.Linear(width, width) for name in TARGETS}) for _ in range(layers // len(TARGETS))]
        )
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self) -> Any:
        return SimpleNamespace(loss=self.zero * 1.0)


def numbers(layers: int, width: int, r: int) -> int:
    """How many P, Λ and Q have together."""
    return layers * (2 * width * r + r)


def predicted(layers: int, width: int, r: int) -> dict[str, float]:
    """Seconds of a step on one core of a CPU, from what each does; made before the first measurement.

    PEFT: ten operations for every parameter, each into memory of its own, at 1.2 µs and three passes over its numbers
    at 30 GB/s; two more for its score; for every layer some 25 µs of masks, lists and concatenation; three walks over
    the model's parameters at 1 ms for 48 layers. Here: ten operations in place on numbers that are in the second-level
    cache, two passes at 35 GB/s, and 0.4 ms of Python for 48 layers.
    """
    count, parameters = numbers(layers, width, r), 3 * layers
    peft = 12 * (parameters * 1.2e-6 + 3 * 4 * count / 30e9) + layers * 25e-6 + 3e-3 * layers / 48
    ours = 10 * 2 * 4 * count / 35e9 + 0.4e-3 * layers / 48
    return {"peft step": peft, "fastlora step": ours}


def with_gradients(model: nn.Module, seed: int = 0) -> Any:
    """Sets every factor of an adapter, and its gradient, in the order of the names: the same for both ways."""
    generator = torch.Generator().manual_seed(seed)
    factors = sorted((name, p) for name, p in model.named_parameters() if ".lora_" in name)
    for _, parameter in factors:
        for target in (parameter.data, parameter.grad if parameter.grad is not None else None):
            values = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if target is None:
                parameter.grad = values
            else:
                target.copy_(values)
    return model


def build(layers: int, width: int, r: int, device: torch.device) -> tuple[Any, Any]:
    """(PEFT's model, fastlora's), with the same factors and gradients."""
    import peft

    settings: dict[str, Any] = {"init_r": r, "target_r": 2 * r // 3, "total_step": STEPS}
    config = peft.AdaLoraConfig(**settings, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(Model(layers, width).to(device), config)
    ours = Model(layers, width).to(device)
    fastlora.patch(ours, r=r, use_adalora=True)
    return with_gradients(theirs), with_gradients(ours)


def check(theirs: Any, allocator: fastlora.variants.RankAllocator) -> None:
    """Raises RuntimeError where the scores are not PEFT's."""
    peft = theirs.base_model.rankallocator
    for name, got in allocator.scores.items():
        element = {key: peft._element_score(f"{name}.{key}.default") for key in ("lora_A", "lora_B", "lora_E")}
        want: Tensor = element["lora_E"][:, 0] + element["lora_A"].mean(1) + element["lora_B"].mean(0)
        error = ((got - want).norm() / want.norm()).item()
        if not error < MOST_ERROR:
            raise RuntimeError(f"the scores of {name} differ from PEFT's by {error:.1e}")


def measure(layers: int, width: int, r: int, device: torch.device, rounds: int, clock: str) -> dict[str, Any]:
    theirs, ours = build(layers, width, r, device)
    allocator = fastlora.variants.RankAllocator(ours, 2 * r // 3, STEPS)
    step = 1

    def peft_step() -> None:
        nonlocal step
        theirs.base_model.update_and_allocate(step)
        step += 1

    peft_step()
    allocator.step()
    check(theirs, allocator)
    functions: dict[str, Callable[[], object]] = {
        "peft step": peft_step,
        "fastlora step": allocator.step,
        "peft penalty": lambda: theirs.base_model().loss.backward(),
        "fastlora penalty": lambda: fastlora.variants.orthogonality_penalty(ours).backward(),
    }
    # With the host's part, and on a GPU until it is idle: PEFT reads its threshold back, which a CUDA graph cannot.
    waiting = {name: _until_idle(function, device) for name, function in functions.items()}
    samples = CpuTimer(clock).interleaved(waiting, rounds)
    return {
        "layers": layers,
        "width": width,
        "r": r,
        "numbers": numbers(layers, width, r),
        "predicted_seconds": predicted(layers, width, r) if device.type == "cpu" else {},
        "times": {name: asdict(Summary.of(seconds)) for name, seconds in samples.items()},
    }


def _until_idle(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return function

    def run() -> None:
        function()
        torch.cuda.synchronize(device)

    return run


def table(case: dict[str, Any]) -> str:
    lines = [f"{case['layers']} layers {case['width']}x{case['width']}, r={case['r']}: {case['numbers']:,} numbers"]
    for what in ("step", "penalty"):
        for name in ("peft", "fastlora"):
            median = case["times"][f"{name} {what}"]["median"]
            guess = case["predicted_seconds"].get(f"{name} {what}")
            before = "" if guess is None else f"   predicted {1e3 * guess:.1f}"
            times = case["times"][f"peft {what}"]["median"] / median
            lines.append(f"  {what:<8} {name:<9}{1e3 * median:>9.2f} ms{times:>7.1f} x peft{before}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = command("adalora", __doc__, 40, "device", "clock")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, action="append", help="may repeat (default: 768 and 2048)")
    parser.add_argument("--r", type=int, default=12)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    out, record = record_of("adalora", options)
    record["cases"] = []
    for width in options.width or [768, 2048]:
        case = measure(options.layers, width, options.r, device, options.rounds, options.clock)
        record["cases"].append(case)
        print(table(case), flush=True)
    write_json(out, record)
    return 0
