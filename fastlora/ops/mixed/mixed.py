"""`lora_mixed_batch`: a batch whose sequences use different adapters.

Saved: x (for dA), S (for dB), the dropout states, and references to W0 and the factors. Adapters without a row in the
batch take no part: their gradients are None, as when a module is not called. ATen runs where each adapter alone would
take it, otherwise the segment kernels, once they have agreed with the reference on this device.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.segment_plan import BASE, Segments
from ...runtime.trust import Trusted, first_difference, seeded
from .. import call, reference
from ..call import (
    Adapter,
    as_2d,
    as_shaped,
    backward_pass,
    cast_for_autocast,
    check_call,
    check_one_dtype,
    takes_fused_path,
)
from ..lora import choice
from . import aten

_trusted = Trusted("the backend for several adapters in one batch", "ATen runs instead")


def select(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    backend: str,
    narrow: bool = False,
) -> ModuleType:
    """What runs x (M, K) with these adapters, all of one dtype. Falls down to ATen, with a warning where the kernels
    are wrong here."""
    widest = max(adapters, key=lambda adapter: adapter.lora_A.shape[0])
    dropout_p = max(adapter.dropout_p for adapter in adapters)
    name = choice.select(x, weight, bias, widest.lora_A, widest.lora_B, dropout_p, backend, narrow).name
    if name == "torch":
        return aten
    module = importlib.import_module("fastlora.ops.mixed.triton")
    key = (x.device, x.dtype, widest.lora_A.dtype, dropout_p > 0.0, narrow)
    if x.is_cuda and _trusted.why_not(key, lambda: self_check(module, *key)) is not None:
        return aten
    return module


def self_check(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    narrow: bool = False,
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
        scalings, yes = (1.5, 0.5), (True, True)
        adapters = [Adapter(a, b, scaling, p) for a, b, scaling in zip(lora_As, lora_Bs, scalings, strict=True)]
        y, s, states = module.forward(x, weight, bias, adapters, segments, narrow)
        results = module.backward(dy, x, weight, adapters, s, states, segments, (True, yes, yes), narrow)
        got = [y, results[0], *results[1], *results[2]]
        keeps = [None, None]
        if dropout:
            keeps = [(s[0][start:end] != 0) for start, end in zip(segments.starts, segments.starts[1:], strict=False)]
        leaves = [t.double().requires_grad_() for t in (x, *lora_As, *lora_Bs)]
    with torch.inference_mode(False), torch.enable_grad():
        exact = [(leaves[1 + i], leaves[3 + i], scalings[i], p) for i in range(2)]
        want = reference.mixed_batch_lora_linear(
            leaves[0].view(5, tokens, k), weight.double(), exact, sequences, bias.double(), keeps
        ).view(-1, n)
        expected = [want.detach(), *torch.autograd.grad(want, leaves, dy.double())]
    names = ("output", "gradient of x", *(f"gradient of lora_{f} {i}" for f in "AB" for i in range(2)))
    return first_difference(zip(names, got, expected, strict=True), dtype)


class MixedBatchFunction(torch.autograd.Function):
    """y of x (..., K), with factors A₁ … Aₙ, B₁ … Bₙ for the n segments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: ModuleType,
        segments: Segments,
        terms: tuple[tuple[float, float], ...],
        narrow: bool,
        *factors: Tensor,
    ) -> Tensor:
        y, s, states = module.forward(as_2d(x), weight, bias, _adapters(factors, terms), segments, narrow)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        needs_as = ctx.needs_input_grad[7 : 7 + len(terms)]
        ctx.save_for_backward(
            x if needs_w or any(needs_as) else None, weight if needs_x else None, *factors, *s, *states
        )
        ctx.arguments = (module, segments, terms, x.shape, len(s), narrow)
        return as_shaped(y, x)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        module, segments, terms, shape, num_s, narrow = ctx.arguments
        count = len(terms)
        x, weight, *rest = ctx.saved_tensors
        adapters, rest = _adapters(rest, terms), rest[2 * count :]
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        needs = (needs_x, ctx.needs_input_grad[7 : 7 + count], ctx.needs_input_grad[7 + count :])
        dy2 = as_2d(dy)
        x2 = as_2d(x) if x is not None else None
        dx, grad_as, grad_bs = module.backward(
            dy2, x2, weight, adapters, rest[:num_s], rest[num_s:], segments, needs, narrow
        )
        return (
            dx.view(shape) if dx is not None else None,
            dy2.t().mm(x2) if needs_w and x2 is not None else None,
            dy2.sum(0) if needs_bias else None,
            *[None] * 4,
            *grad_as,
            *grad_bs,
        )


def _adapters(factors: Sequence[Tensor], terms: Sequence[tuple[float, float]]) -> list[Adapter]:
    """Of A₁ … Aₙ, B₁ … Bₙ (and what may follow), and each one's scale and dropout probability."""
    pairs = zip(factors, factors[len(terms) :], terms, strict=False)
    return [Adapter(a, b, scaling, dropout_p) for a, b, (scaling, dropout_p) in pairs]


def lora_mixed_batch(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    adapter_ids: Sequence[int] | Tensor | Segments,
    bias: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer on a batch whose sequences use different adapters, or none: the frozen layer runs once for the
    whole batch, and every pass over the adapters is one launch whatever their number.

    Equivalent to:

        for i, adapter_id in enumerate(adapter_ids):
            chosen = [] if adapter_id == -1 else [adapters[adapter_id]]
            y[i] = multi_lora_linear(x[i], weight, chosen, bias, training)

    Args:
        x: (batch, ..., K), dtypes as in `lora_linear`. weight: (N, K). bias: (N,) or None.
        adapters: `Adapter`s; ranks, scales and dropout probabilities may differ. Where their dtypes differ they are
            cast to the widest, and their gradients back.
        adapter_ids: an adapter's number for each sequence of x, -1 for none. A list costs no synchronisation; an
            integer tensor on a GPU is read back to the host once. Several layers on one batch, and CUDA graphs, take
            `functional.Segments(ids, tokens)`, sorted and sent to the device once.
        training, backend: as in `lora_linear` ("triton" and "cublas" are the same here).

    Returns:
        (batch, ..., N) in x's dtype. Differentiable once in x, weight, bias and every adapter that has a sequence; the
        others get no gradient (None), as modules that are not called.

    Raises:
        ValueError: as `lora_linear`; as many ids as sequences, each from -1 to len(adapters) - 1.

    Source: the batching is that of Punica (Chen et al. 2023, arXiv 2310.18547) and S-LoRA (Sheng et al. 2023, arXiv
    2311.03285), here with a backward pass.
    """
    tokens = math.prod(x.shape[1:-1])
    if isinstance(adapter_ids, Segments):
        segments = adapter_ids
    else:
        ids = adapter_ids.tolist() if isinstance(adapter_ids, Tensor) else adapter_ids
        segments = Segments([int(i) for i in ids], tokens)
    if x.dim() < 2 or (segments.batch, segments.tokens) != (x.shape[0], tokens):
        raise ValueError(
            f"lora_mixed_batch: adapter_ids: got {segments.batch} (for {segments.tokens} rows each) for x "
            f"{tuple(x.shape)}, want x (batch, ..., K) and one id for each sequence of the batch"
        )
    if any(not BASE <= i < len(adapters) for i in segments.adapters):
        raise ValueError(
            f"lora_mixed_batch: adapter_ids: got {list(segments.adapters)}, want numbers of the {len(adapters)} "
            f"adapters, or {BASE} for none"
        )
    if not training:
        adapters = [adapter._replace(dropout_p=0.0) for adapter in adapters]
    return run_segments(x, weight, [adapters[i] for i in segments.adapters], segments, bias, backend)


def run_segments(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    segments: Segments,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`lora_mixed_batch` where the batch is sorted already: one adapter for each of the segments."""
    for adapter in adapters:
        check_call(x, weight, adapter, bias, "lora_mixed_batch")
    if segments.num_positions == 0:  # no adapter, or no row
        return F.linear(x, weight, bias)
    narrow = call.autocast_enabled(x)
    if narrow:
        x, weight, bias = cast_for_autocast(x, weight, bias)
    check_one_dtype(x, weight, bias, "lora_mixed_batch")
    if any(adapter.magnitude is not None for adapter in adapters):
        raise ValueError(
            "lora_mixed_batch: adapters: got one with a magnitude (DoRA), want plain ones: run its "
            "sequences in a batch of their own"
        )
    factors = [adapter.lora_A for adapter in adapters] + [adapter.lora_B for adapter in adapters]
    fused = takes_fused_path(x, weight, bias, *factors) and not torch.compiler.is_compiling()
    if not fused or weight.numel() == 0 or x.is_nested:
        return reference.mixed_batch_lora_linear(x, weight, adapters, segments.sequences, bias)
    widest = functools.reduce(torch.promote_types, (factor.dtype for factor in factors))
    factors = [factor.to(widest) for factor in factors]
    terms = tuple((float(adapter.scaling), adapter.dropout_p) for adapter in adapters)
    adapters, x2 = _adapters(factors, terms), as_2d(x)
    module = select(x2, weight, bias, adapters, backend, narrow)
    if module is aten and x.device.type == "cpu" and x.numel() < call.SMALL:
        # Without gradients too: reentrant checkpointing expects the same bits of both.
        return as_shaped(aten.composed(x2, weight, bias, adapters, segments, narrow), x)
    if not torch.is_grad_enabled():
        return as_shaped(module.forward(x2, weight, bias, adapters, segments, narrow)[0], x)
    if x.dim() != 2 and not x2._is_view():  # reshape had to copy x: once is enough
        x = x2.view(x.shape)
    return MixedBatchFunction.apply(x, weight, bias, module, segments, terms, narrow, *factors)  # type: ignore[return-value]
