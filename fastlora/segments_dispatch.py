"""Which implementation runs a batch of several adapters: ATen where each adapter alone would take it, otherwise the
segment kernels, once they have agreed with the reference on this device."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import dispatch, reference
from .backends import segments_torch
from .kernels.segment_plan import BASE, Segments
from .self_check import first_difference, first_use, seeded

_failures: dict[tuple[str, torch.dtype, torch.dtype, bool], str | None] = {}  # None: agrees with the reference


def select(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    dropout_ps: Sequence[float],
    backend: str,
) -> ModuleType:
    """What runs x (M, K) with these adapters, all of one dtype. Falls down to ATen, with a warning where the kernels
    are wrong here."""
    widest = max(range(len(lora_As)), key=lambda i: lora_As[i].shape[0])
    dropout_p = max(dropout_ps)
    name = dispatch.select(x, weight, bias, lora_As[widest], lora_Bs[widest], dropout_p, backend).name
    if name == "torch":
        return segments_torch
    module = importlib.import_module("fastlora.backends.segments_kernels")
    if x.is_cuda and _failure(module, x, lora_As[0].dtype, dropout_p > 0.0) is not None:
        return segments_torch
    return module


def _failure(module: ModuleType, x: Tensor, adapter_dtype: torch.dtype, dropout: bool) -> str | None:
    key = (str(x.device), x.dtype, adapter_dtype, dropout)
    return first_use(
        _failures,
        key,
        lambda: self_check(module, x.device, x.dtype, adapter_dtype, dropout),
        "the backend for several adapters in one batch",
        f"{x.device} for {x.dtype}",
        "ATen runs instead",
    )


def self_check(
    module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool
) -> str | None:
    """Compares y and every gradient with fp64 on a small problem of two adapters and bare rows that divides nothing;
    None where they agree, else what differs.

    With dropout the masks are read off the implementation: with A = I, S is drop(x). The generators' states are left as
    they were.
    """
    with seeded(device), torch.no_grad():
        n, k, tokens, p = 152, 72, 41, 0.25 if dropout else 0.0
        segments = Segments([1, 0, BASE, 1, 0], tokens)
        sequences = segments.sequences
        ranks = (k, k) if dropout else (10, 24)
        x = torch.randn(5 * tokens, k, device=device).to(dtype)
        weight = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
        bias, dy = (torch.randn(*size, device=device).to(dtype) for size in ((n,), (5 * tokens, n)))
        downs = [torch.eye(k) if dropout else torch.randn(r, k) * k**-0.5 for r in ranks]
        lora_As = [a.to(device, adapter_dtype) for a in downs]
        lora_Bs = [(torch.randn(n, r, device=device) * r**-0.5).to(adapter_dtype) for r in ranks]
        scalings, ps, yes = (1.5, 0.5), (p, p), (True, True)
        y, s, states = module.forward(x, weight, bias, lora_As, lora_Bs, scalings, ps, segments)
        results = module.backward(dy, x, weight, lora_As, lora_Bs, s, states, scalings, ps, segments, (True, yes, yes))
        got = [y, results[0], *results[1], *results[2]]
        keeps = [None, None]
        if dropout:
            keeps = [(s[0][start:end] != 0) for start, end in zip(segments.starts, segments.starts[1:], strict=False)]
        leaves = [t.double().requires_grad_() for t in (x, *lora_As, *lora_Bs)]
    with torch.inference_mode(False), torch.enable_grad():
        adapters = [(leaves[1 + i], leaves[3 + i], scalings[i], p) for i in range(2)]
        want = reference.mixed_batch_lora_linear(
            leaves[0].view(5, tokens, k), weight.double(), adapters, sequences, bias.double(), keeps
        ).view(-1, n)
        expected = [want.detach(), *torch.autograd.grad(want, leaves, dy.double())]
    names = ("output", "gradient of x", *(f"gradient of lora_{f} {i}" for f in "AB" for i in range(2)))
    return first_difference(zip(names, got, expected, strict=True), dtype)
