"""How long it takes to go to another task: `python -m bench switching`.

A Llama of 32 blocks (224 linear layers, as Llama-2-7B has; narrow, since nothing here depends on the width) with
several adapters: `fastlora.set_adapter` next to PEFT's `set_adapter` on the same model, in turns; mixing two adapters
exactly and into rank r; and, for one layer of full size, merging and unmerging. Writes JSON.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

import fastlora

from ..harness.runner import command, record_of
from ..harness.timing import CpuTimer, Summary
from ..harness.turns import write_json

TO_TRAIN, TO_SERVE = "fastlora", "fastlora, trainable=False"


def llama(blocks: int, width: int) -> Any:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=blocks, **sizes)
    return transformers.LlamaForCausalLM(config)


def switching(blocks: int, adapters: int, rounds: int, clock: str) -> dict[str, Any]:
    """Between the first two of that many adapters, and back."""
    ours = llama(blocks, 32)
    ways: dict[str, Callable[[], object]] = {}
    for i in range(adapters):
        fastlora.patch(ours, r=4, adapter_name=f"task{i}")
    turn: dict[str, int] = dict.fromkeys((TO_TRAIN, TO_SERVE, "peft"), 0)

    def switch_ours(way: str) -> None:
        turn[way] += 1
        fastlora.set_adapter(ours, f"task{turn[way] % 2}", trainable=way == TO_TRAIN)

    for way in (TO_TRAIN, TO_SERVE):
        ways[way] = lambda way=way: switch_ours(way)
    try:
        import peft
    except ImportError:
        peft = None
    if peft is not None:
        config = peft.LoraConfig(r=4, target_modules="all-linear")
        theirs = peft.get_peft_model(llama(blocks, 32), config, "task0")
        for i in range(1, adapters):
            theirs.add_adapter(f"task{i}", copy.deepcopy(config))

        def switch_theirs() -> None:
            turn["peft"] += 1
            theirs.set_adapter(f"task{turn['peft'] % 2}")

        ways["peft"] = switch_theirs
    samples = CpuTimer(clock).interleaved(ways, rounds)
    layers = sum(isinstance(module, fastlora.FusedLoraLinear) for module in ours.modules())
    return {"layers": layers, "adapters": adapters, "times": {n: asdict(Summary.of(s)) for n, s in samples.items()}}


def one_layer(width: int, r: int, rounds: int, clock: str) -> dict[str, Any]:
    """Merging, unmerging and mixing in one layer width×width."""
    layer = fastlora.FusedLoraLinear(width, width, r=r)
    layer.add_adapter("second", r=r)
    for name in layer.lora_B:
        nn.init.normal_(layer.lora_B[name])
    model = nn.Sequential(layer)
    both = {"default": 0.5, "second": 0.5}

    def mix(rank: int | None) -> None:
        fastlora.add_weighted_adapter(model, both, "mixed", r=rank)
        layer.delete_adapter("mixed")

    def merge() -> None:
        fastlora.merge(model)
        fastlora.unmerge(model)

    ways: dict[str, Callable[[], object]] = {
        "merge and unmerge": merge,
        "mix": lambda: mix(None),
        f"mix into rank {r}": lambda: mix(r),
    }
    samples = CpuTimer(clock).interleaved(ways, rounds)
    return {"width": width, "r": r, "times": {name: asdict(Summary.of(s)) for name, s in samples.items()}}


def main(arguments: list[str] | None = None) -> int:
    parser = command("switching", __doc__, 50, "clock")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--width", type=int, default=4096, help="of the layer that is merged and mixed")
    parser.add_argument("--r", type=int, default=16)
    options = parser.parse_args(arguments)
    out, record = record_of("switching", options)
    record["switching"] = []
    for adapters in options.adapters:
        case = switching(options.blocks, adapters, options.rounds, options.clock)
        record["switching"].append(case)
        times = ", ".join(f"{name} {1e3 * entry['median']:.2f} ms" for name, entry in case["times"].items())
        print(f"{case['layers']} layers, {adapters} adapters: {times}", flush=True)
    record["layer"] = one_layer(options.width, options.r, max(3, options.rounds // 10), options.clock)
    for name, entry in record["layer"]["times"].items():
        print(f"one layer {options.width}², r = {options.r}: {name} {1e3 * entry['median']:.1f} ms")
    write_json(out, record)
    return 0
