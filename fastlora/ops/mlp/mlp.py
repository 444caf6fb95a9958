"""`lora_mlp`: an MLP of LoRA layers with what lies between its projections fused:
y = h W0ᵀ + b + s·(drop(h) Aᵀ) Bᵀ with h = act(gate) ∘ up.

    forward     h = act(gate) ∘ up and S = drop(h) Aᵀ in one pass; then the layer's product with S
    backward    dS = s·dY B · dB = s·dYᵀ S · dh = dY W0
                in one pass over dh, gate and up: dh += drop′(dS A), dgate, dup, and dA = dSᵀ drop(h) with h made again

Saved: gate, up, S and the dropout state, and references to W0, A and B. Never: h, nor act(gate), which eager autograd
keeps both. The implementation belongs to the backend that the down projection takes; where its kernels fail their
first-use check, the activation runs in eager PyTorch and the layer by itself.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.checks import check_choice
from ...runtime.trust import Trusted, first_difference, seeded
from .. import call
from .. import layer as ops_layer
from ..call import Adapter, GroupLayer, as_2d, as_shaped, backward_pass
from ..group import aten as group_aten
from ..group import group as group_op
from . import aten


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
        choice: Choice,
    ) -> Tensor:
        gate2, up2 = as_2d(gate), None if up is None else as_2d(up)
        h, s, state = choice.mlp.activate(gate2, up2, activation, lora_A, dropout_p)
        y = choice.layer.member_forward(h, weight, bias, s, lora_B, scaling, choice.name)
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
        return as_shaped(y, gate)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, lora_A, lora_B, s, state = ctx.saved_tensors
        scaling, dropout_p, activation, choice = ctx.arguments
        need_gate, need_up, _, need_bias, need_a, need_b = ctx.needs_input_grad[:6]
        need_h = need_gate or need_up
        dy2 = as_2d(dy)
        dh, ds, grad_b = choice.layer.member_backward(
            dy2, weight, s, lora_B, scaling, None, (need_h, need_h or need_a, need_b)
        )
        dgate = dup = grad_a = None
        if need_h or need_a:
            dgate, dup, grad_a = choice.mlp.activate_backward(
                dh,
                ds,
                as_2d(gate),
                None if up is None else as_2d(up),
                activation,
                lora_A,
                state,
                dropout_p,
                (need_h, need_a),
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


ACTIVATIONS = tuple(aten.ACTIVATIONS)


_trusted = Trusted("the backend for MLPs", "the activation runs in eager PyTorch")


class Choice(NamedTuple):
    """What makes h and S and their gradients; what multiplies by the weight, and the backend's name there."""

    mlp: ModuleType
    layer: ModuleType
    name: str


def select(gate: Tensor, activation: str, down: group_op.Member) -> Choice | str:
    """What runs the down projection on h, which will be like gate (M, K), or why it runs by itself."""
    choice = group_op.select(gate, [down])
    if isinstance(choice, str):
        return choice
    if choice.module is group_aten:
        return Choice(aten, group_aten, choice.names[0])
    module = importlib.import_module("fastlora.ops.mlp.triton")
    if gate.device.type == "cuda":
        key = (gate.device, gate.dtype, down.lora_A.dtype, down.dropout_p > 0.0, activation)
        failure = _trusted.why_not(key, lambda: self_check(module, *key))
        if failure is not None:
            return failure
    return Choice(module, choice.module, choice.names[0])


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
        value = aten.ACTIVATIONS[activation].value(inputs[0])
        h64 = value if up is None else value * inputs[1]
    a64, ds64 = a.double(), ds.double()
    wanted = torch.autograd.grad(h64, inputs, dh.double() + (ds64 @ a64) * keep)
    dropped = h64.detach() * keep
    dgate, dup, grad_a = module.activate_backward(dh, ds, gate, up, activation, a, state, p, (True, True))
    results = [("h", h, h64.detach()), ("S", s, dropped @ a64.t()), ("dA", grad_a, ds64.t() @ dropped)]
    results += [(name, got, want) for name, got, want in zip(("dgate", "dup"), (dgate, dup), wanted, strict=False)]
    return first_difference(results, gate.dtype)


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
    check_choice("lora_mlp", "activation", activation, ACTIVATIONS)
    if up is None:
        (gated,), upped = ops_layer.run_group(x, [gate], training, backend, False, "lora_mlp"), None
    else:
        gated, upped = ops_layer.run_group(x, [gate, up], training, backend, False, "lora_mlp")
    return _run_activated(gated, upped, down, activation, training, backend, "lora_mlp")


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
    check_choice("lora_activated_linear", "activation", activation, ACTIVATIONS)
    return _run_activated(gate, up, layer, activation, training, backend, "lora_activated_linear")


def _run_activated(
    gate: Tensor,
    up: Tensor | None,
    layer: GroupLayer,
    activation: str,
    training: bool,
    backend: str,
    caller: str,
) -> Tensor:
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device):
        raise ValueError(
            f"{caller}: gate and up: got {tuple(gate.shape)} {gate.dtype} on {gate.device} and {tuple(up.shape)} "
            f"{up.dtype} on {up.device}, want the same"
        )
    if not training:
        layer = layer._replace(adapters=[adapter._replace(dropout_p=0.0) for adapter in layer.adapters])
    weight, bias = layer.weight, layer.bias
    for one in layer.adapters:
        call.check_call(gate, weight, one, bias, caller)
    adapter = call.as_one_adapter(layer.adapters)
    if adapter is not None and not torch.compiler.is_compiling() and _may_activate(gate, up, weight, bias, adapter):
        y = fused(gate, up, weight, bias, adapter, activation, backend)
        if y is not None:
            return y
    h = aten.ACTIVATIONS[activation].value(gate)
    h = h if up is None else h * up
    return ops_layer.run_layer(h, weight, layer.adapters, bias, backend, caller)


def fused(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Adapter,
    activation: str,
    backend: str,
) -> Tensor | None:
    """y by what `select` chooses, under autograd; None where it chooses nothing. Arguments are checked already."""
    a, b, scaling, dropout_p, *_ = adapter
    rows = as_2d(gate)
    choice = select(rows, activation, group_op.Member(weight, bias, *adapter[:4], backend))
    if isinstance(choice, str):
        return None
    if torch.is_grad_enabled():
        return ActivatedLinear.apply(  # type: ignore[return-value]
            gate, up, weight, bias, a, b, scaling, dropout_p, activation, choice
        )
    h, s, _ = choice.mlp.activate(rows, None if up is None else as_2d(up), activation, a, dropout_p)
    return as_shaped(choice.layer.member_forward(h, weight, bias, s, b, scaling, choice.name), gate)


def _may_activate(gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> bool:
    if gate.is_nested or (gate.device.type == "cpu" and gate.numel() < call.SMALL):
        return False
    if weight.requires_grad or weight.numel() == 0 or call.autocast_enabled(gate):
        return False
    if weight.dtype != gate.dtype or (bias is not None and bias.dtype != gate.dtype):
        return False
    return call.takes_fused_path(gate, up, weight, bias, adapter.lora_A, adapter.lora_B)
