"""Which implementation runs a group of layers: the one that belongs to the backends its members would take alone.

On a GPU the group's own kernels are compared with the reference on a small problem before they are first trusted, as
the backends are (dispatch.py); where they fail, or where the members would take different roads, the layers run one by
one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .backends import group_torch
from .self_check import first_difference, first_use, seeded

KERNEL_BACKENDS = ("cublas", "triton")

_failures: dict[tuple[str, torch.dtype, torch.dtype, bool], str | None] = {}  # None: agrees with the reference


class Member(NamedTuple):
    """One layer of a group: weight (N, K), lora_A (r, K), lora_B (N, r), the dropout probability in force."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dropout_p: float
    backend: str = "auto"


class Choice(NamedTuple):
    """The group's implementation, and the backend by which each member multiplies by its weight."""

    module: ModuleType
    names: tuple[str, ...]


def select(x: Tensor, members: Sequence[Member]) -> Choice | str:
    """What runs the group on x (M, K), or why the layers run one by one. Weights and biases are cast to x's dtype by
    whoever multiplies by them."""
    names = tuple(_backend(x, member) for member in members)
    if all(name == "torch" for name in names):
        return Choice(group_torch, names)
    if not all(name in KERNEL_BACKENDS for name in names):
        return f"the members run on different backends: {', '.join(names)}"
    module = importlib.import_module("fastlora.backends.group_kernels")
    if x.device.type == "cuda":
        for dtype in {member.lora_A.dtype for member in members}:
            failure = _failure(module, x.device, x.dtype, dtype, any(m.dropout_p > 0.0 for m in members))
            if failure is not None:
                return failure
    return Choice(module, names)


def _backend(x: Tensor, member: Member) -> str:
    weight, bias = member.weight, member.bias
    if weight.dtype != x.dtype:  # under autocast: what matters to the choice is the dtype that it will have
        weight = weight.new_empty(weight.shape, dtype=x.dtype) if x.is_cuda else weight
        bias = bias.to(x.dtype) if bias is not None else None
    name = dispatch.select(x, weight, bias, member.lora_A, member.lora_B, member.dropout_p, member.backend).name
    return dispatch.FAMILY.get(name, name)


def _failure(
    module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool
) -> str | None:
    """None where the kernels have been compared with the reference on this device and agree; else why they are not
    used."""
    key = (str(device), dtype, adapter_dtype, dropout)
    return first_use(
        _failures,
        key,
        lambda: self_check(module, device, dtype, adapter_dtype, dropout),
        "the backend for groups of layers",
        f"{device} for {dtype}",
        "layers run one by one",
    )


def self_check(
    module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool
) -> str | None:
    """Compares S, dX and dA of a group of two with fp64 on a small problem that divides nothing; None where they agree,
    else what differs.

    With dropout the masks are read off the implementation itself: with A = I, S is drop(x). The generators' states are
    left as they were.
    """
    with seeded(device), torch.no_grad():
        m, k = 203, 72
        ranks = (k, k) if dropout else (10, 24)
        p = 0.25 if dropout else 0.0
        x = torch.randn(m, k, device=device).to(dtype)
        lora_As = [
            (torch.eye(k, device=device) if dropout else torch.randn(r, k, device=device) * k**-0.5).to(adapter_dtype)
            for r in ranks
        ]
        dss = [torch.randn(m, r, device=device).to(dtype) for r in ranks]
        dx = torch.randn(m, k, device=device).to(dtype)
        expected_dx = dx.double()
        s, states = module.shrink(x, lora_As, (p, p), False)
        dx, grads = module.shared_gradients(dx, x, dss, lora_As, states, (p, p), False, True, (True, True))
        results = []
        for i in range(2):
            keep = (s[i] != 0).double() / (1 - p) if dropout else torch.ones_like(x, dtype=torch.float64)
            if dropout and not 0.6 < (s[i] != 0).double().mean().item() < 0.9:
                return f"the kept fraction is {(s[i] != 0).double().mean().item():.2f}, expected about {1 - p}"
            a, ds, dropped = lora_As[i].double(), dss[i].double(), x.double() * keep
            expected_dx += (ds @ a) * keep
            results += [(f"S of member {i}", s[i], dropped @ a.t()), (f"dA of member {i}", grads[i], ds.t() @ dropped)]
        results.append(("dX", dx, expected_dx))
    return first_difference(results, dtype)
