"""`lora_mlp`: an MLP of LoRA layers with what lies between its projections fused.
Part of functional.py, which it belongs to; the maths is one floor down."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, functional, group_dispatch, mlp_autograd, mlp_dispatch
from .backends import mlp_torch
from .functional import Adapter, GroupLayer


def lora_mlp(
    x: Tensor,
    gate: GroupLayer,
    up: GroupLayer | None,
    down: GroupLayer,
    activation: str = "silu",
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """An MLP of LoRA layers, gated (SwiGLU, GeGLU, ReGLU) or plain (up is None): x, gate, up and S are kept.

    Equivalent to:

        h = act(multi_lora_linear(x, *gate)) * multi_lora_linear(x, *up)  # without up: act(multi_lora_linear(x, *gate))
        multi_lora_linear(h, *down)

    Args:
        x: (..., K). gate, up: `GroupLayer`s with weight (N, K); down: with weight
            (K', N). Adapters as in `lora_linear`.
        activation: "silu", "gelu" (with erf), "gelu_tanh" or "relu".
        training, backend: as in `lora_linear`.

    Returns:
        (..., K'). gate and up run as in `lora_group`, the rest as in `lora_activated_linear`.

    Raises:
        ValueError: as `lora_linear`; an unknown activation; gate and up of different sizes.

    Source: Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    _check_activation(activation)
    if up is None:
        (gated,), upped = functional.lora_group(x, [gate], training, backend), None
    else:
        gated, upped = functional.lora_group(x, [gate, up], training, backend)
    return lora_activated_linear(gated, upped, down, activation, training, backend)


def lora_activated_linear(
    gate: Tensor,
    up: Tensor | None,
    layer: GroupLayer,
    activation: str = "silu",
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A LoRA layer on h = act(gate) * up (or act(gate)), with h and S made in one pass and h made again for the
    gradients: neither h nor act(gate) is kept.

    Equivalent to `multi_lora_linear(act(gate) * up, *layer)`, and run so where that is no better or the only way: small
    h on a CPU, a weight that is trained, no adapter or several that drop something, autocast, inside torch.compile and
    torch.func, tensor subclasses.

    Args: gate, up: (..., K), of one dtype; layer: weight (N, K). The rest as in `lora_mlp`.
    Raises: ValueError as `lora_mlp`.
    """
    _check_activation(activation)
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device):
        raise ValueError(
            f"lora_mlp: gate and up: got {tuple(gate.shape)} {gate.dtype} on {gate.device} and {tuple(up.shape)} "
            f"{up.dtype} on {up.device}, want the same"
        )
    if not training:
        layer = layer._replace(adapters=[adapter._replace(dropout_p=0.0) for adapter in layer.adapters])
    weight, bias = layer.weight, layer.bias
    for one in layer.adapters:
        functional._check(gate, weight, one, bias)
    adapter = functional.as_one_adapter(layer.adapters)
    choice = None
    if adapter is not None and not torch.compiler.is_compiling() and _may_activate(gate, up, weight, bias, adapter):
        rows = gate.reshape(-1, gate.shape[-1])
        member = group_dispatch.Member(weight, bias, *adapter[:2], adapter.dropout_p, backend)
        choice = mlp_dispatch.select(rows, activation, member)
    if adapter is None or choice is None or isinstance(choice, str):
        h = mlp_torch.ACTIVATIONS[activation].value(gate)
        return functional.multi_lora_linear(h if up is None else h * up, weight, layer.adapters, bias, backend=backend)
    return mlp_autograd.activated_linear(gate, up, weight, bias, *adapter[:4], activation, choice)


def _may_activate(gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> bool:
    if gate.is_nested or (gate.device.type == "cpu" and gate.numel() < autograd.SMALL):
        return False
    if weight.requires_grad or weight.numel() == 0 or autograd.autocast_enabled(gate):
        return False
    if weight.dtype != gate.dtype or (bias is not None and bias.dtype != gate.dtype):
        return False
    return functional._takes_fused_path(gate, up, weight, bias, adapter.lora_A, adapter.lora_B)


def _check_activation(activation: str) -> None:
    if activation not in mlp_dispatch.ACTIVATIONS:
        raise ValueError(f"lora_mlp: activation: got {activation!r}, want one of {', '.join(mlp_dispatch.ACTIVATIONS)}")
