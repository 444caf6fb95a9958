"""Bytes that several processes exchange in a training step, counted from shapes and read off the collectives.

Two gloo processes run forward and backward of a small Llama under DDP, FSDP2 (every block) and tensor parallelism
(transformers' plan), frozen, with fastlora's LoRA and with PEFT's, and every collective's bytes are added up: the
count from shapes must agree. The same count at Llama-3 8B and 70B gives the table for 8 and 64 GPUs. A process sends
2(t - 1)/t of an all-reduced tensor, (t - 1)/t of a gathered or scattered one (rings). Optimizers send nothing.

PEFT under tensor parallelism is cut as PEFT cuts it on transformers' models: lora_B column-wise, lora_A row-wise.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora

from ..harness.runner import command, record_of
from ..harness.turns import write_json

WAYS = ("ddp", "fsdp2", "tp")
KINDS = ("frozen", "fastlora", "peft")
# What is passed on, of an operation's bytes, by each of t processes in a ring; and which argument has them all.
RINGS: dict[str, tuple[int, int]] = {
    "allreduce_": (2, 0),
    "all_reduce": (2, 0),
    "_allgather_base_": (1, 0),
    "_reduce_scatter_base_": (1, 1),
}


@dataclass(frozen=True)
class Model:
    """A Llama by its sizes, with LoRA of rank r on the seven linear layers of each block."""

    hidden: int
    intermediate: int
    kv: int
    blocks: int
    vocabulary: int
    r: int = 16
    base_bytes: int = 2
    adapter_bytes: int = 4

    def layers(self) -> list[tuple[int, int, bool]]:
        """(N, K, cut by columns) of a block's linear layers."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        return [(h, h, False), (kv, h, False), (kv, h, False), (h, h, True), (i, h, False), (i, h, False), (h, i, True)]

    def adapters(self, cut: int = 1) -> int:
        """Bytes of the adapters that a process has, of a tensor-parallel group of so many."""
        of_block = sum(n + k // cut if rowwise else n // cut + k for n, k, rowwise in self.layers())
        return self.blocks * self.r * of_block * self.adapter_bytes

    def block(self) -> int:
        """Bytes of a frozen block: its matrices and two norms."""
        return (sum(n * k for n, k, _ in self.layers()) + 2 * self.hidden) * self.base_bytes

    def rest(self) -> int:
        """Bytes of what is outside the blocks: embeddings, the head, a norm."""
        return (2 * self.vocabulary + 1) * self.hidden * self.base_bytes


MODELS = {
    "Llama-3 8B": Model(4096, 14336, 1024, 32, 128256),
    "Llama-3 70B": Model(8192, 28672, 1024, 80, 128256),
}
SMALL = Model(64, 160, 32, 2, 96, r=4, base_bytes=4)


def counted(model: Model, way: str, kind: str, processes: int, tokens: int, shared_input: bool = True) -> float:
    """Bytes that a process sends in a step, with these tokens through each replica.

    `tp`: a group of `processes` works on the same tokens. `shared_input`: q, k and v, and gate and up, are given x as
    one DTensor (`PrepareModuleInput`), so that one all-reduce has their dX; transformers' plan has one for each layer.
    """
    ring, lora = (processes - 1) / processes, kind != "frozen"
    if way == "ddp":
        return 2 * ring * model.adapters() * lora
    if way == "fsdp2":  # blocks are gathered twice, what is outside them once; adapters' gradients are scattered
        return ring * (2 * model.blocks * model.block() + model.rest() + 3 * model.adapters() * lora)
    layers, r, wide = model.layers(), model.r, model.adapter_bytes
    columnwise = sum(not rowwise for *_, rowwise in layers)
    sums = sum(rowwise for *_, rowwise in layers) + (2 if shared_input else columnwise)
    sent = sums * tokens * model.hidden * model.base_bytes
    if kind == "fastlora":
        sent += sum(r * (n if rowwise else k) * wide for n, k, rowwise in layers)
    elif kind == "peft":
        sent += len(layers) * tokens * r * wide
    return 2 * ring * model.blocks * sent


def table(tokens: int = 8192) -> list[dict[str, Any]]:
    """GB that a GPU sends in a step of `tokens` tokens a GPU. Under tensor parallelism eight GPUs share a replica, and
    so 8 · `tokens` tokens; on 64 there are eight replicas, which all-reduce their adapters."""
    rows = []
    for name, model in MODELS.items():
        for way in WAYS:
            for gpus in (8, 64):
                replicas = 2 * (1 - 8 / gpus) * model.adapters(8) if way == "tp" else 0.0
                cut, each = (8, 8 * tokens) if way == "tp" else (gpus, tokens)
                sent = {kind: counted(model, way, kind, cut, each) for kind in KINDS}
                sent |= {kind: sent[kind] + replicas for kind in KINDS[1:]}
                rows.append(
                    {"model": name, "way": way, "gpus": gpus, "gigabytes": {k: v / 1e9 for k, v in sent.items()}}
                )
    return rows


def written(rows: list[dict[str, Any]]) -> str:
    """The table as docs/distributed.md has it: on 8 and on 64 GPUs what the frozen model sends, and what LoRA adds."""
    found = {(row["model"], row["way"], row["gpus"]): row["gigabytes"] for row in rows}
    names = [f"{name}, {what}" for name in MODELS for what in ("frozen", "LoRA adds")]
    lines = [f"| way | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for way in WAYS:
        cells = []
        for name in MODELS:
            sent = [found[name, way, gpus] for gpus in (8, 64)]
            frozen, ours, theirs = (
                " / ".join(f"{one[k] - base:.2f}" for one, base in pairs)
                for k, pairs in (
                    ("frozen", [(one, 0.0) for one in sent]),
                    ("fastlora", [(one, one["frozen"]) for one in sent]),
                    ("peft", [(one, one["frozen"]) for one in sent]),
                )
            )
            cells += [frozen, ours if ours == theirs else f"{ours} (PEFT {theirs})"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Collectives(TorchDispatchMode):
    """Counts what is sent within it: {operation: [calls, bytes of the whole tensors, bytes sent by a process]}."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes, self.found = processes, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        room, _, name = func.name().partition(".")[0].partition("::")
        if room in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            times, place = RINGS[name]  # a KeyError: an operation that is not known here
            tensors = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
            whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            entry = self.found.setdefault(name, [0, 0, 0])
            entry[:] = entry[0] + 1, entry[1] + whole, entry[2] + times * whole * (self.processes - 1) // self.processes
        return func(*args, **(kwargs or {}))


def build(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": SMALL.blocks}
    sizes: dict[str, Any] = {
        "hidden_size": SMALL.hidden,
        "intermediate_size": SMALL.intermediate,
        "vocab_size": SMALL.vocabulary,
    }
    config: Any = transformers.LlamaConfig(**heads, **sizes)
    model: Any = transformers.LlamaForCausalLM(config).requires_grad_(False)
    if kind == "fastlora":
        fastlora.patch(model, r=SMALL.r)
    elif kind == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=SMALL.r, target_modules="all-linear"))
    return model


def spread(model: Any, way: str, kind: str) -> Any:
    """The model under DDP, FSDP2 or tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    inner = model.get_base_model() if kind == "peft" else model
    if way == "ddp":
        return model if kind == "frozen" else nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    if way == "fsdp2":
        for block in inner.model.layers:
            fully_shard(block)
        return fully_shard(model)
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {name: styles[style]() for name, style in inner.tp_plan.items() if style in styles}
    if kind == "fastlora":
        plan = fastlora.parallel_plan(model, plan)
    elif kind == "peft":
        factor = {ColwiseParallel: "lora_B", RowwiseParallel: "lora_A"}
        both = [((f"{name}.base_layer", s), (f"{name}.{factor[type(s)]}.default", s)) for name, s in plan.items()]
        plan = {f"base_model.model.{name}": style for pair in both for name, style in pair}
    parallelize_module(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), plan)
    return model


def measured(way: str, kind: str, tokens: int) -> dict[str, list[int]]:
    """What one step sends, the third (buckets are made in the first two)."""
    model = spread(build(kind), way, kind)
    seen = Collectives(torch.distributed.get_world_size())
    for step in range(3):
        x = torch.randn(2, tokens // 2, SMALL.hidden, requires_grad=True)
        with seen if step == 2 else contextlib.nullcontext():
            model(inputs_embeds=x).logits.square().mean().backward()
    return seen.found


def _process(rank: int, folder: str, processes: int, tokens: int) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=processes)
    found = {way: {kind: measured(way, kind, tokens) for kind in KINDS} for way in WAYS}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def main(arguments: list[str] | None = None) -> int:
    parser = command("distributed", __doc__, None)
    parser.add_argument("--tokens", type=int, default=256, help="of a step of the two processes")
    parser.set_defaults(rounds=None, clock=None)
    options = parser.parse_args(arguments)
    out, record = record_of("distributed", options)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, 2, options.tokens), nprocs=2)  # type: ignore[attr-defined]
        found = json.loads(Path(folder, "found.json").read_text())
    wrong, cases = [], []
    print(f"bytes that each of two processes sends in a step of {options.tokens} tokens, {SMALL}")
    for way, kinds in found.items():
        for kind, operations in kinds.items():
            sent, want = (
                sum(entry[2] for entry in operations.values()),
                counted(SMALL, way, kind, 2, options.tokens, False),
            )
            cases.append({"way": way, "kind": kind, "sent": sent, "counted": want, "operations": operations})
            wrong += [f"{way}, {kind}: sent {sent}, counted {want:.0f}"] * (sent != want)
            print(f"{way:6} {kind:9} {sent:>9,}  " + ", ".join(f"{n} {v[0]}x" for n, v in operations.items()))
    rows = table()
    print("\nGB that a GPU sends in a step of 8192 tokens a GPU, on 8 / 64 GPUs, counted")
    print(written(rows))
    write_json(out, record | {"model": asdict(SMALL), "tokens": options.tokens, "cases": cases, "counted": rows})
    print(f"written: {out}", *wrong, sep="\n")
    return 1 if wrong else 0
