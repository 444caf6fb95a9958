"""`lora_mlp`: an MLP of LoRA layers with what lies between its projections fused; `rms_norm_lora`, the norm before
it. Part of functional.py, which it belongs to; the maths is one floor down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, functional, group_dispatch, mlp_autograd, mlp_dispatch, norm_autograd
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


def rms_norm_lora(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    layers: Sequence[GroupLayer],
    training: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """RMSNorm and the LoRA layers that it feeds: the norm's pass over x writes S for all of them.

    Equivalent to `lora_group(F.rms_norm(x, (K,), norm_weight, eps), layers, training, backend)`, and run so where the
    Triton kernels do not run, adapters drop something or have more than 64 ranks together, under autocast, inside
    torch.compile and torch.func.

    Args: x: (..., K); norm_weight: (K,), of x's dtype or another float dtype (x's where the kernels do not run); eps:
        added to the mean square; layers, training, backend: as in `lora_group`.
    Returns: a tuple of (..., Nᵢ), differentiable in x, norm_weight and what `lora_group` is.
    Raises: ValueError as `lora_group`; a norm_weight that is not (K,).
    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    if x.dim() < 1 or norm_weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm_lora: norm_weight: got shape {tuple(norm_weight.shape)}, want (K,) for x {tuple(x.shape)}"
        )
    layers = [
        layer if training else layer._replace(adapters=[a._replace(dropout_p=0.0) for a in layer.adapters])
        for layer in layers
    ]
    members, scalings = [], []
    for layer in layers:
        for one in layer.adapters:
            functional._check(x, layer.weight, one, layer.bias)
        adapter = functional.as_one_adapter(layer.adapters)
        if adapter is not None and adapter.dropout_p == 0.0:
            members.append(group_dispatch.Member(layer.weight, layer.bias, *adapter[:2], 0.0, backend))
            scalings.append(adapter.scaling)
    if len(members) == len(layers) and members and _may_normalise(x, norm_weight, members):
        selected = norm_autograd.select(x.reshape(-1, x.shape[-1]), norm_weight, members)
        if not isinstance(selected, str):
            return norm_autograd.run(x, norm_weight, eps, members, scalings, selected)
    y = F.rms_norm(x, x.shape[-1:], norm_weight.to(x.dtype), eps)
    return functional.lora_group(y, layers, backend=backend)


def _may_normalise(x: Tensor, norm_weight: Tensor, members: Sequence[group_dispatch.Member]) -> bool:
    if torch.compiler.is_compiling() or x.is_nested or autograd.autocast_enabled(x) or x.numel() == 0:
        return False
    tensors = [tensor for member in members for tensor in member[:4]]
    if any(tensor is not None and tensor.device != x.device for tensor in (norm_weight, *tensors)):
        return False
    if any(t is not None and t.dtype != x.dtype for member in members for t in member[:2]):
        return False
    return functional._takes_fused_path(x, norm_weight, *tensors)
