"""Errors against fp64 next to eager PyTorch's: `python -m bench correctness`. A table that comes before any timing.

For the output and each gradient: ‖got − exact‖ / ‖exact‖ with the exact one computed in fp64 from the same inputs. A
row passes where each is at most twice eager's in the same dtypes, plus one rounding of the dtype: the rule of the tests
(CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..harness import machine
from ..harness.contenders import Contender, Tensors, Unavailable, build
from ..harness.counting import Problem
from ..harness.runner import DTYPES, command
from ..harness.turns import step_values, write_json
from . import forms

NAMES = ("torch", "cublas", "triton", "triton_s_inside", "peft")
SHAPES = {
    "cuda": [(2048, 4096, 4096), (333, 1000, 1001), (1024, 4096, 14336)],
    "cpu": [(33, 40, 56)],
}


@dataclass
class Row:
    """One contender's errors in one form: the outputs and gradients, in order."""

    form: str
    name: str
    errors: list[float]
    eager: list[float]
    allowed: list[float]

    @property
    def passed(self) -> bool:
        return all(error <= most for error, most in zip(self.errors, self.allowed, strict=True))

    def __str__(self) -> str:
        ratio = max(error / max(eager, 1e-30) for error, eager in zip(self.errors, self.eager, strict=True))
        worst = f"{max(self.errors):.2e}, eager {max(self.eager):.2e}, worst ratio {ratio:5.2f}"
        return f"{self.form:<58}{self.name:<17}{worst}  {'passed' if self.passed else 'FAILED'}"


def exact(t: Tensors) -> Tensors:
    """The same numbers in fp64."""
    problem = replace(t.problem, dtype="float64", adapter_dtype="float64")
    a, b = (tensor.detach().double().requires_grad_() for tensor in (t.lora_a, t.lora_b))
    return Tensors(problem, t.weight.double(), None if t.bias is None else t.bias.double(), a, b, t.scaling)


def relative(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]


def rows(
    form: str,
    builders: dict[str, Callable[[], Contender]],
    exact_contender: Contender,
    x: Tensor,
    dy: Any,
) -> list[Row]:
    """Each contender's row; those that cannot run here have none."""
    double = tuple(part.double() for part in dy) if isinstance(dy, tuple) else dy.double()
    want = step_values(exact_contender, x.detach().double().requires_grad_(), double)[1]
    eager_values = step_values(builders["eager"](), x, dy)[1]
    eager = relative(eager_values, want)
    allowed = [2 * error + torch.finfo(value.dtype).eps for error, value in zip(eager, eager_values, strict=True)]
    found = []
    for name, make in builders.items():
        if name in ("eager", "frozen"):
            continue
        try:
            contender = make()
        except Unavailable:
            continue
        found.append(Row(form, name, relative(step_values(contender, x, dy)[1], want), eager, allowed))
    return found


def layers(problem: Problem, names: list[str], device: torch.device) -> list[Row]:
    t = Tensors.random(problem, device)
    ((x, dy),) = t.inputs(1, device)
    builders = {name: lambda name=name: build(name, t) for name in ("eager", *names)}
    form = f"layer M={problem.m} {problem.k}->{problem.n} {problem.dtype}, {problem.adapter_dtype}"
    return rows(form, builders, build("eager", exact(t)), x, dy)


def group(problem: Problem, device: torch.device) -> list[Row]:
    sizes = (problem.n, max(1, problem.n // 4), max(1, problem.n // 4))
    shape = forms.Group(problem.m, problem.k, sizes, problem.r, problem.dtype, problem.adapter_dtype)
    members = [Tensors.random(p, device, seed) for seed, p in enumerate(shape.problems())]
    x = members[0].inputs(1, device)[0][0]
    dys = tuple(member.inputs(1, device)[0][1] for member in members)
    builders = {
        "eager": lambda: forms.together([build("eager", member) for member in members]),
        "group": lambda: forms.grouped(members),
    }
    reference = forms.together([build("eager", exact(member)) for member in members])
    return rows(
        f"group M={shape.m} {shape.k}->{sizes} {shape.dtype}, {shape.adapter_dtype}", builders, reference, x, dys
    )


def mlp(problem: Problem, device: torch.device) -> list[Row]:
    wide, narrow = problem, replace(problem, n=problem.k, k=problem.n)
    members = [Tensors.random(p, device, seed) for seed, p in enumerate((wide, wide, narrow))]
    x, dy = members[0].inputs(1, device)[0][0], members[2].inputs(1, device)[0][1]
    builders = {
        "eager": lambda: forms.gated([build("eager", member) for member in members]),
        "mlp": lambda: forms.fused_mlp(members),
    }
    reference = forms.gated([build("eager", exact(member)) for member in members])
    return rows(f"MLP M={wide.m} {wide.k}->{wide.n} {wide.dtype}, {wide.adapter_dtype}", builders, reference, x, dy)


def main(arguments: list[str] | None = None) -> int:
    parser = command("correctness", __doc__, None, "device")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may repeat (default: all)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    record: dict[str, Any] = {"machine": machine.describe(device), "rows": []}
    failed = 0
    for kind in options.dtype or DTYPES:
        for index, (m, n, k) in enumerate(SHAPES[device.type]):
            problem = Problem(m, n, k, 16, *DTYPES[kind])
            makers: list[Callable[[], list[Row]]] = [lambda problem=problem: layers(problem, list(NAMES), device)]
            if index == 0:
                makers += [
                    lambda problem=problem: group(problem, device),
                    lambda problem=problem: mlp(replace(problem, n=2 * problem.n), device),
                ]
            for make in makers:
                try:
                    found = make()
                except Exception as error:  # the other rows are still to be seen
                    failed += 1
                    print(f"M={m} {k}->{n} {kind}: FAILED: {type(error).__name__}: {error}", flush=True)
                    continue
                for row in found:
                    failed += not row.passed
                    print(row, flush=True)
                record["rows"] += [asdict(row) | {"passed": row.passed} for row in found]
                if options.out:
                    write_json(options.out, record)
    print(f"{len(record['rows'])} rows, {failed} failed")
    return 1 if failed else 0
