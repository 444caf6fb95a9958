"""The head's loss, all ways in turns: `python -m bench head`.

Forward + backward of the cross-entropy of a head with LoRA, on the same tensors: eager PyTorch, the frozen head in
chunks, LoRA in chunks, and its log-probabilities. Time (medians of interleaved rounds), bytes kept for the backward
pass and, on a CPU, the peak of what is allocated. What differs from eager by more than 2 % is not measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.functional import lora_linear_cross_entropy, lora_linear_log_probs

from ..harness.contenders import Contender
from ..harness.memory import allocations_of, saved_bytes
from ..harness.runner import command, record_of
from ..harness.timing import Summary, timer_for
from ..harness.turns import write_json

MOST_ERROR = 2e-2
VOCABULARIES = (32_000, 64_000, 152_000)
SIZES = {"cuda": (8192, 4096, VOCABULARIES), "cpu": (512, 512, VOCABULARIES), "tiny": (32, 24, (101,))}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALING = 2.0


def contenders(h: Tensor, v: int, r: int) -> dict[str, Contender]:
    """What is compared, with float32 adapters; each gives its scalar loss as a tensor of one element."""
    t, k = h.shape
    device = h.device
    weight = torch.randn(v, k, device=device).mul_(k**-0.5).to(h.dtype)
    a, b = torch.randn(r, k, device=device).mul_(k**-0.5), torch.randn(v, r, device=device).mul_(0.02)
    labels = torch.randint(v, (t,), device=device)
    a, b = a.requires_grad_(), b.requires_grad_()

    def logits(x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x.to(a.dtype), a), b)
        return (F.linear(x, weight) + SCALING * low_rank).to(x.dtype).float()

    def log_probs(x: Tensor) -> Tensor:
        return lora_linear_log_probs(x, weight, a, b, labels, SCALING).mean().neg().view(1)

    ways: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]] = {
        "eager": (lambda x: F.cross_entropy(logits(x), labels).view(1), (a, b)),
        "eager frozen": (lambda x: F.cross_entropy(F.linear(x, weight).float(), labels).view(1), ()),
        "frozen": (lambda x: lora_linear_cross_entropy(x, weight, None, None, labels, 1.0).view(1), ()),
        "fastlora": (lambda x: lora_linear_cross_entropy(x, weight, a, b, labels, SCALING).view(1), (a, b)),
        "log_probs": (log_probs, (a, b)),
    }
    return {name: Contender(name, *way, parameters=(weight,)) for name, way in ways.items()}


def step(contender: Contender, h: Tensor) -> list[Tensor]:
    x = h.detach().requires_grad_()
    return list(torch.autograd.grad(contender.forward(x), (x, *contender.leaves)))


def measure(size: tuple[int, ...], dtype: str, device: torch.device, rounds: int, clock: str) -> dict[str, Any]:
    t, k, v, r = size
    torch.manual_seed(0)
    h = torch.randn(t, k, device=device).to(DTYPES[dtype])
    compared, failed = contenders(h, v, r), {}
    for name, base in (("fastlora", "eager"), ("log_probs", "eager"), ("frozen", "eager frozen")):
        pairs = zip(step(compared[name], h), step(compared[base], h), strict=True)
        error = max(((one.float() - other.float()).norm() / other.float().norm()).item() for one, other in pairs)
        if not error < MOST_ERROR:
            failed[name] = f"differs from eager by {error:.1e}"
            del compared[name]
    functions: dict[str, Callable[[], object]] = {
        name: functools.partial(step, one, h) for name, one in compared.items()
    }
    samples = timer_for(device, clock).interleaved(functions, rounds)
    rows: dict[str, dict[str, Any]] = {}
    for name, one in compared.items():
        saved = saved_bytes(one, h.clone().requires_grad_())
        rows[name] = {"time": asdict(Summary.of(samples[name])), "saved_bytes": saved}
        if device.type == "cpu":
            rows[name]["peak_bytes"] = allocations_of(functions[name])[1].peak
    problem = {"tokens": t, "hidden": k, "words": v, "r": r, "dtype": dtype}
    return {"problem": problem, "ways": rows, "failed": failed}


def table(case: dict[str, Any]) -> str:
    p, ways = case["problem"], case["ways"]
    logits = p["tokens"] * p["words"] * 4
    lines = [
        f"{p['tokens']} tokens, {p['hidden']} -> {p['words']} words, r={p['r']} {p['dtype']}; "
        f"logits {logits / 2**20:.0f} MiB",
        f"  {'':<14}{'ms':>10}{'x eager':>9}{'kept MiB':>10}{'peak MiB':>10}",
    ]
    for name, row in ways.items():
        median = row["time"]["median"]
        ratio = ways["eager"]["time"]["median"] / median
        sizes = "".join(f"{row[what] / 2**20:>10.1f}" if what in row else "" for what in ("saved_bytes", "peak_bytes"))
        lines.append(f"  {name:<14}{1e3 * median:>10.1f}{ratio:>9.2f}{sizes}")
    lines += [f"  {name:<14}not measured: {why}" for name, why in case["failed"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = command("head", __doc__, 8, "device", "clock")
    parser.add_argument("--sizes", choices=SIZES, help="which set (default: the device's)")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may repeat (default: fp32 on a CPU, else bf16)"
    )
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    out, record = record_of("head", options)
    record["heads"] = []
    t, k, vocabularies = SIZES[options.sizes or device.type]
    for v in vocabularies:
        for dtype in options.dtype or ["fp32" if device.type == "cpu" else "bf16"]:
            record["heads"].append(measure((t, k, v, options.rank), dtype, device, options.rounds, options.clock))
            print(table(record["heads"][-1]), flush=True)
            write_json(out, record)
    return int(any(case["failed"] for case in record["heads"]))
