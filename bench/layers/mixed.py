"""One layer on a batch whose sequences use different adapters, and some none, as a case to measure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.contenders import Contender, Tensors, Unavailable
from ..harness.counting import Problem, compulsory_bytes, useful_flops
from ..harness.turns import Case, Work, rotation

BASE = "__base__"


@dataclass(frozen=True)
class Batch:
    """`sequences` of `tokens` each, at a layer K -> N; the adapters take turns, and every eighth sequence has none."""

    sequences: int
    tokens: int
    n: int
    k: int
    adapters: int

    @property
    def ids(self) -> list[int]:
        """An adapter's number for each sequence, -1 for none."""
        return [-1 if i % 8 == 7 else i % self.adapters for i in range(self.sequences)]


BATCHES = {  # training, and serving a token of each sequence
    "cuda": [Batch(32, 256, 4096, 4096, 7), Batch(64, 1, 4096, 4096, 16)],
    "cpu": [Batch(16, 64, 1024, 1024, 4), Batch(32, 1, 1024, 1024, 8)],
    "tiny": [Batch(8, 4, 48, 32, 3)],
}


def mixed_case(batch: Batch, like: Problem, device: torch.device) -> Case:
    """Rank, dtypes and dropout are those of `like`."""
    problem = replace(like, m=batch.sequences * batch.tokens, n=batch.n, k=batch.k)
    members = [Tensors.random(problem, device, seed) for seed in range(batch.adapters)]
    for member in members[1:]:
        member.weight = members[0].weight
    shape = (batch.sequences, batch.tokens)
    pairs = [
        (x.detach().view(*shape, batch.k).requires_grad_(), dy.view(*shape, batch.n))
        for x, dy in members[0].inputs(rotation(problem.x + problem.y, device), device)
    ]
    builders: dict[str, Callable[[], Contender]] = {
        "frozen": lambda: Contender("frozen", lambda x: F.linear(x, members[0].weight), ()),
        "eager": lambda: eager(members, batch),
        "peft": lambda: peft(members, batch),
        "mixed batch": lambda: mixed_batch(members, batch),
    }
    return Case(
        f"mixed batch: {batch.sequences} x {batch.tokens} tokens, {batch.adapters} adapters and none, "
        f"{batch.k}->{batch.n} r={like.r} {like.dtype}, {like.adapter_dtype} adapters, dropout {like.dropout}",
        {"form": "mixed batch", "name": f"{batch.adapters} adapters", **problem.__dict__, **batch.__dict__},
        work(problem, batch),
        pairs,
        builders,
        random=like.dropout > 0,
    )


def work(problem: Problem, batch: Batch) -> dict[str, Work]:
    """The frozen layer on every row, each adapter on its own."""
    found = {}
    for direction, times in (("forward", 1), ("both", 3)):
        base = replace(problem, r=0)
        flops, nbytes = useful_flops(base, direction), compulsory_bytes(base, direction)
        rows = batch.tokens * sum(i >= 0 for i in batch.ids)
        adapted = replace(problem, m=rows)
        flops += useful_flops(adapted, direction) - useful_flops(replace(adapted, r=0), direction)
        nbytes += times * batch.adapters * (problem.lora_a + problem.lora_b)
        found[direction] = Work(flops, nbytes)
    return found


def factors(members: list[Tensors]) -> tuple[Tensor, ...]:
    return tuple(leaf for t in members for leaf in (t.lora_a, t.lora_b))


def eager(members: list[Tensors], batch: Batch) -> Contender:
    """The frozen layer, then every adapter on its rows, as PEFT does it."""
    rows = [
        torch.tensor([i for i, used in enumerate(batch.ids) if used == number], device=members[0].weight.device)
        for number in range(batch.adapters)
    ]
    p = members[0].problem.dropout

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, members[0].weight)
        for t, index in zip(members, rows, strict=True):
            own = x.index_select(0, index)
            own = F.dropout(own, p) if p else own
            low_rank = F.linear(F.linear(own.to(t.lora_a.dtype), t.lora_a), t.lora_b)
            y = y.index_add(0, index, (t.scaling * low_rank).to(y.dtype))
        return y

    return Contender("eager", forward, factors(members), (members[0].weight,))


def peft(members: list[Tensors], batch: Batch) -> Contender:
    """PEFT's layer with `adapter_names`."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not installed: {error}") from None
    p, scaling = members[0].problem, members[0].scaling
    base = nn.Linear(p.k, p.n, bias=False, device="meta")
    base.weight = nn.Parameter(members[0].weight, requires_grad=False)
    config = LoraConfig(r=p.r, lora_alpha=int(scaling * p.r), lora_dropout=p.dropout, target_modules=["0"])
    model: Any = nn.Sequential(base)
    with warnings.catch_warnings():  # that there is more than one adapter
        warnings.simplefilter("ignore", UserWarning)
        for number in range(batch.adapters):
            inject_adapter_in_model(config, model, adapter_name=str(number))
    layer, leaves = model[0], []
    for number, t in enumerate(members):
        for holder, value in ((layer.lora_A[str(number)], t.lora_a), (layer.lora_B[str(number)], t.lora_b)):
            holder.weight = nn.Parameter(value.detach())
            leaves.append(holder.weight)
    layer.train()
    names = [BASE if i < 0 else str(i) for i in batch.ids]
    return Contender("peft", lambda x: layer(x, adapter_names=names), tuple(leaves), (members[0].weight,))


def mixed_batch(members: list[Tensors], batch: Batch) -> Contender:
    """As in a model, where `fastlora.adapter_names` sorts a batch once for all layers."""
    from fastlora.kernels.segment_plan import Segments
    from fastlora.ops.call import Adapter
    from fastlora.ops.mixed.mixed import run_segments

    segments = Segments(batch.ids, batch.tokens)
    adapters = [Adapter(t.lora_a, t.lora_b, t.scaling, t.problem.dropout) for t in members]
    chosen, weight = [adapters[i] for i in segments.adapters], members[0].weight
    return Contender(
        "mixed batch", lambda x: run_segments(x, weight, chosen, segments, None, "auto"), factors(members), (weight,)
    )
