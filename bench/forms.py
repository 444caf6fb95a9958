"""Several LoRA linears together, as cases to measure: layers that share x (q, k, v; gate, up).

Each contender is put together from the single layers of bench.contenders, so that the baselines are the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .compare import Case, Work, rotation
from .contenders import Contender, Tensors, build
from .counting import Problem, compulsory_bytes, useful_flops


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


GROUPS = {  # name: (M, K, the members' N)
    "cuda": {"qkv": (8192, 4096, (4096, 1024, 1024)), "gate and up": (8192, 4096, (14336, 14336))},
    "cpu": {"qkv": (512, 1024, (1024, 256, 256)), "gate and up": (512, 1024, (2816, 2816))},
    "tiny": {"qkv": (64, 48, (48, 16, 16))},
}


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


def grouped(layers: list[Tensors]) -> Contender:
    from fastlora.functional import Adapter, GroupLayer, lora_group

    def members() -> list[GroupLayer]:
        return [
            GroupLayer(t.weight, [Adapter(t.lora_a, t.lora_b, t.scaling, t.problem.dropout)], t.bias) for t in layers
        ]

    leaves = tuple(leaf for t in layers for leaf in (t.lora_a, t.lora_b))
    return Contender("group", lambda x: lora_group(x, members()), leaves, tuple(t.weight for t in layers))


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
