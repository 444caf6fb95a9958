"""Which implementation runs what lies between an MLP's projections: the one that belongs to the backend that its down
projection takes.

On a GPU its kernels are compared with fp64 on a small problem before they are first trusted, as the backends are
(dispatch.py); where they fail, the activation runs in eager PyTorch and the layer by itself.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import group_dispatch
from .backends import group_torch, mlp_torch
from .self_check import first_difference, first_use, seeded

ACTIVATIONS = tuple(mlp_torch.ACTIVATIONS)

_failures: dict[tuple, str | None] = {}  # None: agrees with fp64


class Choice(NamedTuple):
    """What makes h and S and their gradients; what multiplies by the weight, and the backend's name there."""

    mlp: ModuleType
    layer: ModuleType
    name: str


def select(gate: Tensor, activation: str, down: group_dispatch.Member) -> Choice | str:
    """What runs the down projection on h, which will be like gate (M, K), or why it runs by itself."""
    choice = group_dispatch.select(gate, [down])
    if isinstance(choice, str):
        return choice
    if choice.module is group_torch:
        return Choice(mlp_torch, group_torch, choice.names[0])
    module = importlib.import_module("fastlora.backends.mlp_kernels")
    if gate.device.type == "cuda":
        failure = _failure(module, gate, activation, down)
        if failure is not None:
            return failure
    return Choice(module, choice.module, choice.names[0])


def _failure(module: ModuleType, gate: Tensor, activation: str, down: group_dispatch.Member) -> str | None:
    dropout = down.dropout_p > 0.0
    device, dtype, adapter_dtype = gate.device, gate.dtype, down.lora_A.dtype
    key = (str(device), dtype, adapter_dtype, dropout, activation)
    return first_use(
        _failures,
        key,
        lambda: self_check(module, device, dtype, adapter_dtype, dropout, activation),
        "the backend for MLPs",
        f"{device} for {dtype} and {activation}",
        "the activation runs in eager PyTorch",
    )


def self_check(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    activation: str,
) -> str | None:
    """Compares h, S and the gradients with fp64 on small problems that divide nothing, with and without up; None where
    they agree, else what differs.

    With dropout the mask is read off the implementation itself: with A = I, S is drop(h). The generators' states are
    left as they were.
    """
    with seeded(device), torch.no_grad():
        m, k = 203, 56
        for gated in (True, False):
            gate, up, dh = (torch.randn(m, k, device=device).to(dtype) for _ in range(3))
            a = torch.eye(k, device=device) if dropout else torch.randn(10, k, device=device) * k**-0.5
            a = a.to(adapter_dtype)
            found = _disagreement(module, gate, up if gated else None, dh, a, 0.25 if dropout else 0.0, activation)
            if found is not None:
                return found
    return None


def _disagreement(
    module: ModuleType, gate: Tensor, up: Tensor | None, dh: Tensor, a: Tensor, p: float, activation: str
) -> str | None:
    ds = torch.randn(gate.shape[0], a.shape[0], device=gate.device).to(gate.dtype)
    h, s, state = module.activate(gate, up, activation, a, p)
    keep = torch.ones_like(h, dtype=torch.float64)
    if p > 0.0:
        # Where h is 0 the mask cannot be seen, and does not matter: ReLU passes nothing back there either.
        keep = torch.where((s != 0) | (h == 0), 1.0 / (1.0 - p), 0.0).double()
        fraction = (s != 0).sum().item() / max(1, (h != 0).sum().item())
        if not 0.6 < fraction < 0.9:
            return f"the kept fraction is {fraction:.2f}, expected about {1 - p}"
    inputs = [tensor.double().requires_grad_() for tensor in (gate, up) if tensor is not None]
    with torch.enable_grad():
        value = mlp_torch.ACTIVATIONS[activation].value(inputs[0])
        h64 = value if up is None else value * inputs[1]
    a64, ds64 = a.double(), ds.double()
    wanted = torch.autograd.grad(h64, inputs, dh.double() + (ds64 @ a64) * keep)
    dropped = h64.detach() * keep
    dgate, dup, grad_a = module.activate_backward(dh, ds, gate, up, activation, a, state, p, (True, True))
    results = [("h", h, h64.detach()), ("S", s, dropped @ a64.t()), ("dA", grad_a, ds64.t() @ dropped)]
    results += [(name, got, want) for name, got, want in zip(("dgate", "dup"), (dgate, dup), wanted, strict=False)]
    return first_difference(results, gate.dtype)
