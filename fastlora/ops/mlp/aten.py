"""What lies between an MLP's projections, in plain ATen: h = act(gate) ∘ up and the down projection's S, and back.

What it saves over eager autograd: act(gate) and h are not kept but made again from gate and up, and every product is
formed in a buffer that is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group import aten as group_aten

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation in ATen: its value, and `backward(grad, x)`, the gradient, which is left in grad's memory."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward.grad_input(grad, x, grad_input=grad)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_backward),
    "gelu": Activation(F.gelu, _gelu_backward),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward),
    "relu": Activation(F.relu, _relu_backward),
}


def product(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """h (M, K) = act(gate) ∘ up, or act(gate) without up: a tensor of its own."""
    value = ACTIVATIONS[activation].value(gate)
    return value if up is None else value.mul_(up)


def activate(
    gate: Tensor, up: Tensor | None, activation: str, lora_A: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(h, S, dropout state): h (M, K) = act(gate) ∘ up and S (M, r) = drop(h) Aᵀ; the state is as in group/aten.py."""
    h = product(gate, up, activation)
    (s,), (state,) = group_aten.shrink(h, [lora_A], [dropout_p], False)
    return h, s, state


def activate_backward(
    dh: Tensor,
    ds: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    lora_A: Tensor,
    state: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dgate, dup, dA) for dh (M, K) = dY W0, which is written to, and dS (M, r); None where `needs` (gate or up,
    lora_A) is False.

    dh += drop′(dS A), dup = dh ∘ act(gate), dgate = dh ∘ up ∘ act′(gate), dA = dSᵀ drop(h), with h made again.
    """
    needs_h, needs_a = needs
    act = ACTIVATIONS[activation]
    value = h = None
    if up is not None:
        value = act.value(gate)
        h = value * up
    elif needs_a:
        h = act.value(gate)
    _, (grad_a,) = group_aten.shared_gradients(dh, h, [ds], [lora_A], [state], [dropout_p], False, needs_h, [needs_a])
    if not needs_h:
        return None, None, grad_a
    if up is None:
        return act.backward(dh, gate), None, grad_a
    assert value is not None and h is not None
    dup = torch.mul(dh, value, out=h)
    return act.backward(dh.mul_(up), gate), dup, grad_a
