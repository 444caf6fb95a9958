"""One training step of a Llama with a quantised base under PEFT, patched and not: memory on any device, time on a GPU.

    python -m bench qlora [--bits 4] [--hidden 2048] [--tokens 512] [--out OUT]

Random weights, quantised by bitsandbytes; bf16 with fp32 adapters under autocast, as transformers' Trainer runs QLoRA.
On a CPU every allocation is counted (bench/harness/memory.py) and no time is told.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.ops.quant import weights

from ..harness.memory import allocations_of
from ..harness.runner import command
from ..harness.turns import write_json

MIB = 1 << 20


def model_of(options: argparse.Namespace) -> Any:
    """PEFT on a quantised Llama without head, gradients flowing into its inputs."""
    import bitsandbytes as bnb
    import peft
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.key_value // 64,
    }
    torch.manual_seed(0)
    model: Any = transformers.LlamaModel(transformers.LlamaConfig(**sizes)).bfloat16()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            features: Any = (module.in_features, module.out_features)
            layer: Any
            if options.bits == 4:
                layer = bnb.nn.Linear4bit(*features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(*features, bias=False, has_fp16_weights=False)
            layer.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.requires_grad_(False))
    setattr(model, f"is_loaded_in_{options.bits}bit", True)
    config = peft.LoraConfig(
        r=options.r, target_modules="all-linear", lora_dropout=options.dropout, init_lora_weights=False
    )
    return peft.get_peft_model(model.to(options.device), config).to(options.device).train()


def step_of(model: Any, x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """A forward pass, and a backward pass through what it returns."""

    def forward() -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(inputs_embeds=x).last_hidden_state

    def backward(y: Any) -> None:
        y.float().square().mean().backward()

    return forward, backward


def measured(model: Any, x: Tensor, repeats: int) -> dict[str, float]:
    """MiB kept after the forward pass and at the peak of a step, beyond the model, its gradients and x; the shared
    buffer counts. On a GPU also milliseconds, the median of `repeats` steps."""
    forward, backward = step_of(model, x)
    backward(forward())  # gradients and, on a GPU, compiled kernels are there now
    weights.release_buffers()
    found: dict[str, float] = {}
    if x.device.type == "cpu":
        y, passed = allocations_of(forward)
        found["kept"] = passed.held / MIB
        del y
        weights.release_buffers()
        _, step = allocations_of(lambda: backward(forward()))
        found["peak"] = step.peak / MIB
        return found
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward()
    found["kept"] = (torch.cuda.memory_allocated() - before) / MIB
    backward(y)
    del y
    found["peak"] = (torch.cuda.max_memory_allocated() - before) / MIB
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        backward(forward())
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    found["ms"] = statistics.median(times)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = command("qlora", __doc__, None, "device")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--key-value", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=20, help="steps timed on a GPU")
    options = parser.parse_args(arguments)
    model = model_of(options)
    fused = copy.deepcopy(model)
    report = fastlora.patch(fused)
    x = torch.randn(1, options.tokens, options.hidden, device=options.device, requires_grad=True)
    rows = {"PEFT": measured(model, x, options.repeats), "fastlora": measured(fused, x, options.repeats)}
    print(f"{len(report.patched)} layers in {options.bits} bits, {options.tokens} tokens, on {options.device}")
    for name, row in rows.items():
        print(
            f"{name:<10}"
            + "".join(f"  {key} {value:9.1f} {'' if key == 'ms' else 'MiB'}" for key, value in row.items())
        )
    if options.out is not None:
        shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        write_json(options.out, {"options": shown, "rows": rows})
