"""The second half of an MLP in autograd: y = h W0ᵀ + b + s·(drop(h) Aᵀ) Bᵀ with h = act(gate) ∘ up.

    forward     h = act(gate) ∘ up and S = drop(h) Aᵀ in one pass; then the layer's product with S
    backward    dS = s·dY B · dB = s·dYᵀ S · dh = dY W0
                in one pass over dh, gate and up: dh += drop′(dS A), dgate, dup, and dA = dSᵀ drop(h) with h made again

Saved: gate, up, S and the dropout state, and references to W0, A and B. Never: h, nor act(gate), which eager autograd
keeps both. gate and up come from whatever computes them (a group, fused layers, plain ones).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import mlp_dispatch
from .autograd import _as_shaped, backward_pass


class ActivatedLinear(torch.autograd.Function):
    """y (..., N) of gate and up (..., K), differentiable in gate, up, b, A and B; W0 is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float,
        activation: str,
        choice: mlp_dispatch.Choice,
    ) -> Tensor:
        gate2, up2 = _as_rows(gate), _as_rows(up)
        h, s, state = choice.mlp.activate(gate2, up2, activation, lora_A, dropout_p)
        y = choice.layer.forward(h, weight, bias, s, lora_B, scaling, choice.name)
        need_gate, need_up, _, _, need_a, need_b = ctx.needs_input_grad[:6]
        need_h = need_gate or need_up
        ctx.save_for_backward(
            gate if need_h or need_a else None,
            up if need_h or need_a else None,
            weight if need_h else None,
            lora_A if need_h or need_a else None,
            lora_B if need_h or need_a or need_b else None,
            s if need_b else None,
            state if need_h or need_a else None,
        )
        ctx.arguments = (scaling, dropout_p, activation, choice)
        return _as_shaped(y, gate)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, lora_A, lora_B, s, state = ctx.saved_tensors
        scaling, dropout_p, activation, choice = ctx.arguments
        need_gate, need_up, _, need_bias, need_a, need_b = ctx.needs_input_grad[:6]
        need_h = need_gate or need_up
        dy2 = dy.reshape(-1, dy.shape[-1])
        dh, ds, grad_b = choice.layer.backward(
            dy2, weight, s, lora_B, scaling, None, (need_h, need_h or need_a, need_b)
        )
        dgate = dup = grad_a = None
        if need_h or need_a:
            dgate, dup, grad_a = choice.mlp.activate_backward(
                dh, ds, _as_rows(gate), _as_rows(up), activation, lora_A, state, dropout_p, (need_h, need_a)
            )
        return (
            dgate.view(gate.shape) if need_gate and dgate is not None else None,
            dup.view(gate.shape) if need_up and dup is not None else None,
            None,
            dy2.sum(0) if need_bias else None,
            grad_a,
            grad_b,
            *[None] * 4,
        )


def activated_linear(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    activation: str,
    choice: mlp_dispatch.Choice,
) -> Tensor:
    """Runs the choice under autograd. Arguments are checked already (functional.py)."""
    if torch.is_grad_enabled():
        return ActivatedLinear.apply(  # type: ignore[return-value]
            gate, up, weight, bias, lora_A, lora_B, scaling, dropout_p, activation, choice
        )
    h, s, _ = choice.mlp.activate(_as_rows(gate), _as_rows(up), activation, lora_A, dropout_p)
    return _as_shaped(choice.layer.forward(h, weight, bias, s, lora_B, scaling, choice.name), gate)


def _as_rows(x: Tensor | None) -> Any:
    return x if x is None or x.dim() == 2 else x.reshape(-1, x.shape[-1])
