"""Several adapters in one batch in autograd: what is saved, and which gradients are computed.

Saved: x (for dA), S (for dB), the dropout states, and references to W0 and the factors, as in autograd.py. Adapters
without a row in the batch take no part: their gradients are None, as when a module is not called.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autograd, segments_dispatch
from .autograd import _as_shaped, backward_pass
from .backends import segments_torch
from .kernels.segment_plan import Segments


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
        scalings: tuple[float, ...],
        dropout_ps: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        count = len(scalings)
        x2 = x.reshape(-1, x.shape[-1])
        y, s, states = module.forward(
            x2, weight, bias, factors[:count], factors[count:], scalings, dropout_ps, segments
        )
        needs_x, needs_w = ctx.needs_input_grad[:2]
        needs_as = ctx.needs_input_grad[7 : 7 + count]
        ctx.save_for_backward(
            x if needs_w or any(needs_as) else None, weight if needs_x else None, *factors, *s, *states
        )
        ctx.arguments = (module, segments, scalings, dropout_ps, x.shape, len(s))
        return _as_shaped(y, x)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        module, segments, scalings, dropout_ps, shape, num_s = ctx.arguments
        count = len(scalings)
        x, weight, *rest = ctx.saved_tensors
        lora_As, lora_Bs, rest = rest[:count], rest[count : 2 * count], rest[2 * count :]
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        needs = (needs_x, ctx.needs_input_grad[7 : 7 + count], ctx.needs_input_grad[7 + count :])
        dy2 = dy.reshape(-1, dy.shape[-1])
        x2 = x.reshape(-1, x.shape[-1]) if x is not None else None
        dx, grad_as, grad_bs = module.backward(
            dy2, x2, weight, lora_As, lora_Bs, rest[:num_s], rest[num_s:], scalings, dropout_ps, segments, needs
        )
        return (
            dx.view(shape) if dx is not None else None,
            dy2.t().mm(x2) if needs_w and x2 is not None else None,
            dy2.sum(0) if needs_bias else None,
            *[None] * 4,
            *grad_as,
            *grad_bs,
        )


def mixed_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: tuple[float, ...],
    dropout_ps: tuple[float, ...],
    segments: Segments,
    backend: str,
) -> Tensor:
    """Runs the chosen implementation under autograd. Arguments are checked already (functional.py); one adapter for
    each segment, all of one dtype."""
    x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    module = segments_dispatch.select(x2, weight, bias, lora_As, lora_Bs, dropout_ps, backend)
    if module is segments_torch and x.device.type == "cpu" and x.numel() < autograd.SMALL:
        # Without gradients too: reentrant checkpointing expects the same bits of both.
        return _as_shaped(
            segments_torch.composed(x2, weight, bias, lora_As, lora_Bs, scalings, dropout_ps, segments), x
        )
    if not torch.is_grad_enabled():
        return _as_shaped(module.forward(x2, weight, bias, lora_As, lora_Bs, scalings, dropout_ps, segments)[0], x)
    if x.dim() != 2 and not x2._is_view():  # reshape had to copy x: once is enough
        x = x2.view(x.shape)
    return MixedBatchFunction.apply(  # type: ignore[return-value]
        x, weight, bias, module, segments, scalings, dropout_ps, *lora_As, *lora_Bs
    )
