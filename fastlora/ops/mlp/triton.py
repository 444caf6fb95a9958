"""What lies between an MLP's projections by the Triton kernels of kernels/mlp.py: h and S in one pass over gate and up,
and their gradients with dA in one pass over dh, gate and up. Neither h nor a mask is kept: a seed is.

A rank beyond `mlp.fused_rank` takes the element-wise half of those kernels, and the skinny ones for its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import mlp
from ...kernels.dropout import new_seed
from ...kernels.grads import weight_grad, weight_grad_workspace
from ...kernels.group import group_expand
from ...kernels.launch import device_of, new_workspace
from ...kernels.shrink import shrink, shrink_workspace
from ..call import low_rank_dtype


def activate(
    gate: Tensor, up: Tensor | None, activation: str, lora_A: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(h, S, seed): h (M, K) = act(gate) ∘ up and S (M, r) = drop(h) Aᵀ."""
    with device_of(gate):
        seed = new_seed(gate.device) if dropout_p > 0.0 else None
        h = gate.new_empty(gate.shape)
        s = gate.new_empty(gate.shape[0], lora_A.shape[0], dtype=low_rank_dtype(gate, lora_A, None, False))
        if lora_A.shape[0] <= mlp.fused_rank(gate.dtype):
            workspace = new_workspace(gate, mlp.activate_workspace(gate, lora_A))
            mlp.activate(gate, up, activation, h, lora_A, s, workspace, seed=seed, dropout_p=dropout_p)
        else:
            mlp.activate(gate, up, activation, h)
            shrink(h, lora_A, s, new_workspace(h, shrink_workspace(h, lora_A)), seed=seed, dropout_p=dropout_p)
        return h, s, seed


def activate_backward(
    dh: Tensor | None,
    ds: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    lora_A: Tensor,
    state: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dgate, dup, dA) for dh (M, K) = dY W0, which becomes dgate, and dS (M, r); None where `needs` (gate or up,
    lora_A) is False."""
    needs_h, needs_a = needs
    dropout = {"seed": state, "dropout_p": dropout_p}
    with device_of(gate):
        dh = dh if needs_h else None
        dup = gate.new_empty(gate.shape) if needs_h and up is not None else None
        grad_a = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if needs_a else None
        rank = lora_A.shape[0]
        if rank <= mlp.fused_rank(gate.dtype):
            workspace = new_workspace(gate, mlp.activate_backward_workspace(gate, rank)) if needs_a else None
            mlp.activate_backward(dh, ds, gate, up, activation, lora_A, dh, dup, grad_a, workspace, **dropout)
            return dh, dup, grad_a
        if grad_a is not None:
            h = gate.new_empty(gate.shape)
            mlp.activate(gate, up, activation, h)
            weight_grad(h, ds, grad_a.t(), new_workspace(h, weight_grad_workspace(h, rank)), **dropout)
        if dh is not None:
            group_expand([ds], [lora_A.t()], dh, accumulate=True, seeds=[state], dropout_ps=[dropout_p])
            mlp.activate_backward(dh, None, gate, up, activation, None, dh, dup)
        return dh, dup, grad_a
