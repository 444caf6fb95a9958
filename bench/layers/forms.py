"""Several LoRA linears together, as cases to measure: layers that share x (q, k, v; gate, up), and gated MLPs.

Each contender is put together from the single layers of harness.contenders, so that the baselines are the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.contenders import Contender, Tensors, build
from ..harness.counting import Problem, compulsory_bytes, useful_flops
from ..harness.turns import Case, Work, rotation


@dataclass(frozen=True)
class Group:
    """Layers (K -> each of `ns`) on one x (M, K)."""

    m: int
    k: int
    ns: tuple[int, ...]
    r: int = 16
    dtype: str = "bfloat16"
    adapter_dtype: str = "bfloat16"
    dropout: float = 0.0

    def problems(self) -> list[Problem]:
        return [
            Problem(self.m, n, self.k, self.r, self.dtype, self.adapter_dtype, dropout=self.dropout) for n in self.ns
        ]


GROUPS = {  # name: (M, K, the members' N); k and v apart, where a layer is small and LoRA costs most
    "cuda": {
        "qkv": (8192, 4096, (4096, 1024, 1024)),
        "k and v": (8192, 4096, (1024, 1024)),
        "gate and up": (8192, 4096, (14336, 14336)),
    },
    "cpu": {
        "qkv": (512, 1024, (1024, 256, 256)),
        "k and v": (512, 1024, (256, 256)),
        "gate and up": (512, 1024, (2816, 2816)),
    },
    "tiny": {"qkv": (64, 48, (48, 16, 16))},
}


MLPS = {"cuda": (8192, 4096, 14336), "cpu": (512, 1024, 2816), "tiny": (64, 48, 80)}  # (M, hidden, intermediate)


def group_case(name: str, group: Group, device: torch.device) -> Case:
    """q, k, v or gate, up: one by one as each contender does it, and as fastlora's group."""
    problems = group.problems()
    layers = [Tensors.random(problem, device, seed) for seed, problem in enumerate(problems)]
    nbytes = problems[0].x + sum(problem.y for problem in problems)
    pairs = [
        (layers[0].inputs(1, device, seed)[0][0], tuple(layer.inputs(1, device, seed)[0][1] for layer in layers))
        for seed in range(rotation(nbytes, device))
    ]
    builders: dict[str, Callable[[], Contender]] = {
        way: lambda way=way: together([build(way, layer) for layer in layers])
        for way in ("frozen", "eager", "peft", "addmm", "auto")
    }
    builders["one by one"] = builders.pop("auto")
    builders["group"] = lambda: grouped(layers)
    return Case(
        f"{name}: M={group.m} {group.k}->{group.ns} r={group.r} {group.dtype}, {group.adapter_dtype} adapters, "
        f"dropout {group.dropout}",
        {"form": "group", "name": name, **asdict(group)},
        group_work(problems),
        pairs,
        builders,
        random=group.dropout > 0,
    )


def together(members: list[Contender]) -> Contender:
    """One contender of several that are fed the same x; autograd adds up their gradients of x."""
    return Contender(
        members[0].name,
        lambda x: tuple(member.forward(x) for member in members),
        tuple(leaf for member in members for leaf in member.leaves),
        tuple(parameter for member in members for parameter in member.parameters),
    )


def as_layer(t: Tensors):
    from fastlora.ops.call import Adapter, GroupLayer

    return GroupLayer(t.weight, [Adapter(t.lora_a, t.lora_b, t.scaling, t.problem.dropout)], t.bias)


def grouped(layers: list[Tensors]) -> Contender:
    from fastlora.functional import lora_group

    members = [as_layer(t) for t in layers]

    return Contender("group", lambda x: lora_group(x, members), factors(layers), tuple(t.weight for t in layers))


def factors(layers: list[Tensors]) -> tuple[Tensor, ...]:
    return tuple(leaf for t in layers for leaf in (t.lora_a, t.lora_b))


def group_work(problems: list[Problem]) -> dict[str, Work]:
    """x is read once in each pass, and its gradient written once."""
    shared = len(problems) - 1
    found = {}
    for direction, times in (("forward", 1), ("both", 3)):
        found[direction] = Work(
            sum(useful_flops(problem, direction) for problem in problems),
            sum(compulsory_bytes(problem, direction) for problem in problems) - times * shared * problems[0].x,
        )
    return found


def mlp_case(m: int, hidden: int, intermediate: int, like: Problem, device: torch.device) -> Case:
    """down(silu(gate(x)) * up(x)) with an adapter on each; rank, dtypes and dropout are those of `like`."""
    wide, narrow = replace(like, m=m, n=intermediate, k=hidden), replace(like, m=m, n=hidden, k=intermediate)
    layers = [Tensors.random(problem, device, seed) for seed, problem in enumerate((wide, wide, narrow))]
    pairs = [
        (layers[0].inputs(1, device, seed)[0][0], layers[2].inputs(1, device, seed)[0][1])
        for seed in range(rotation(2 * wide.x, device))
    ]
    builders: dict[str, Callable[[], Contender]] = {
        way: lambda way=way: gated([build(way, layer) for layer in layers])
        for way in ("frozen", "eager", "peft", "addmm", "auto")
    }
    builders["one by one"] = builders.pop("auto")
    builders["mlp"] = lambda: fused_mlp(layers)
    facts = {"form": "mlp", **asdict(like), "m": m, "hidden": hidden, "intermediate": intermediate}
    return Case(
        f"SwiGLU MLP: M={m} {hidden}->{intermediate}->{hidden} r={like.r} {like.dtype}, {like.adapter_dtype} adapters, "
        f"dropout {like.dropout}",
        {key: value for key, value in facts.items() if key not in ("n", "k")},
        stack_work([wide, wide, narrow], wide.x),
        pairs,
        builders,
        random=like.dropout > 0,
    )


def gated(members: list[Contender]) -> Contender:
    gate, up, down = members
    both = together(members)
    return replace(both, forward=lambda x: down.forward(F.silu(gate.forward(x)) * up.forward(x)))


def fused_mlp(layers: list[Tensors]) -> Contender:
    from fastlora.ops.mlp.mlp import lora_mlp

    gate, up, down = (as_layer(t) for t in layers)
    parameters = tuple(t.weight for t in layers)
    return Contender("mlp", lambda x: lora_mlp(x, gate, up, down, "silu"), factors(layers), parameters)


def stack_work(problems: list[Problem], passed: int) -> dict[str, Work]:
    """Of layers one after the other. Bytes: the parameters in both passes, and `passed` for each of the first layer's
    input, the last one's output and their gradients; what lies between need not leave the chip."""
    found = {}
    for direction, (reads_x, reads_y, ends) in {"forward": (1, 1, 2), "both": (3, 2, 4)}.items():
        nbytes = sum(compulsory_bytes(p, direction) - reads_x * p.x - reads_y * p.y for p in problems)
        found[direction] = Work(sum(useful_flops(p, direction) for p in problems), nbytes + ends * passed)
    return found
