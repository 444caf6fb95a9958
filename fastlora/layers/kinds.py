"""Adapters that are more than B A: DoRA's, which have a magnitude for every row, and AdaLoRA's, which have singular
values: functions of a `FusedLoraLinear`, most of them its methods.

    DoRA      W = m ∘ (W0 + s·B A) / ‖W0 + s·B A‖     m `lora_magnitude_vector[name]` (out,), norms by row
    AdaLoRA   W = W0 + s·P Λ Q                        P `lora_B[name]`, Λ `lora_E[name]` (r, 1), Q `lora_A[name]`
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import call
from ..ops.dora import dora as dora_op
from ..ops.dora.aten import divisor
from ..runtime.checks import check
from . import starts
from .checks import tensors_of

if TYPE_CHECKING:
    from .linear import FusedLoraLinear
    from .state import AdapterState

ADALORA_STD = 0.02  # of P and Q at the start, as in the paper's code
# Every `nn.ParameterDict` of a layer; each has entries by adapter, or none.
TRAINED = ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector")
FROZEN = ("lora_A0", "lora_B0", "lora_shift")


class Magnitudes(nn.ParameterDict):
    """DoRA's magnitudes by adapter. They stay in float32 at least, whatever the model is cast to: in half precision
    they would not be the norms that they are divided by."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == wide else tensor.to(moved.device, wide)

        return super()._apply(at_least_float32, recurse)


def use_dora(layer: AdapterState) -> dict[str, bool]:
    """By adapter."""
    return {name: name in layer.lora_magnitude_vector for name in layer.r}


def use_adalora(layer: AdapterState) -> dict[str, bool]:
    """By adapter."""
    return {name: name in layer.lora_E for name in layer.r}


def trained_parameters(layer: AdapterState, name: str) -> list[nn.Parameter]:
    """What an adapter trains: A, B and, where it has them, its singular values or magnitudes."""
    return [factors[name] for key in layer.TRAINED if name in (factors := layer._modules[key])]  # type: ignore[index, operator]


def reset_adapter(layer: FusedLoraLinear, name: str, init_lora_weights: bool | str = True) -> None:
    """Restarts an adapter, by PEFT's names (docs/details/initialisation.md).

    True, A ~ U(±1/√in) (Kaiming, a = √5) and B = 0; "gaussian", A ~ N(0, 1/r²) and B = 0 (the paper's);
    "orthogonal", both random with B A = 0, r even; False, B like A, so that the adapter changes the output at once
    (for tests and benchmarks). "pissa", `"pissa_niter_<iterations>"` and "olora" move a part of the weight into the
    adapter: its bits come back with `reset_adapter`, `delete_adapter` and `unpatch`.

    DoRA's magnitudes become the norms of the weight's rows. AdaLoRA's P and Q are drawn from N(0, 0.02²) and Λ is
    zero (drawn too with False).

    Raises ValueError, with nothing changed, for an unknown name, and as `from_weight` and `set_initial_factors` do.
    """
    layer._check_names([name], "reset_adapter")
    if name in layer.lora_E:
        check_adalora_init(init_lora_weights, "FusedLoraLinear.reset_adapter")
        nn.init.normal_(layer.lora_A[name], std=ADALORA_STD)
        nn.init.normal_(layer.lora_B[name], std=ADALORA_STD)
        if init_lora_weights is False:
            nn.init.normal_(layer.lora_E[name])
        else:
            nn.init.zeros_(layer.lora_E[name])
        return
    starts.begin(layer, name, init_lora_weights)
    if name in layer.lora_magnitude_vector:
        with torch.no_grad():
            layer.lora_magnitude_vector[name].copy_(layer.weight_norm(name))


def weight_norm(layer: FusedLoraLinear, name: str) -> Tensor:
    """‖W0 + s·B A‖ of every row (out,), which DoRA divides by; in float32, or float64 for a float64 weight."""
    layer._check_names([name], "weight_norm")
    return _norm(layer, adapters_of(layer, [name])[0])


def _norm(layer: FusedLoraLinear, adapter: call.Adapter) -> Tensor:
    if adapter.norm is not None:
        return adapter.norm
    return dora_op.weight_norm(_rows(layer), adapter.lora_A, adapter.lora_B, adapter.scaling, layer.backend)


def get_delta_weight(layer: FusedLoraLinear, name: str) -> Tensor:
    """What the adapter adds to the weight, in float32 (float64 for float64 adapters) and in the weight's layout:
    (out, in), or (in, out) with `fan_in_fan_out`.

    s·B A, or s·(B A − B₀A₀) after a start away from zero; s·P Λ Q; DoRA's m ∘ (W0 + s·B A)/‖W0 + s·B A‖ − W0.
    """
    layer._check_names([name], "get_delta_weight")
    delta = starts.product(layer, name, layer.lora_A[name], layer.lora_B[name])
    if starts.runs_beside(layer, name):
        delta = delta + starts.product(layer, name, layer.lora_A0[name], layer.lora_B0[name])
    if name in layer.lora_magnitude_vector:
        with torch.no_grad():
            weight = _unmerged_weight(layer).detach().to(delta.dtype)
            factor = layer.lora_magnitude_vector[name].to(delta.dtype) / divisor(layer.weight_norm(name)).to(
                delta.dtype
            )
            factor = factor if layer.fan_in_fan_out else factor.unsqueeze(1)
            delta = factor * (weight + delta) - weight
    return delta


def _rows(layer: FusedLoraLinear) -> Tensor:
    """The weight without what is merged into it, as (out, in)."""
    weight = _unmerged_weight(layer)
    return weight.t() if layer.fan_in_fan_out else weight


def _unmerged_weight(layer: FusedLoraLinear) -> Tensor:
    if not layer.merged_adapters:
        return layer.weight
    assert layer._base_weight is not None
    return layer._base_weight[0].detach().to(layer.weight)


def adapters_of(layer: FusedLoraLinear, names: Sequence[str]) -> list[call.Adapter]:
    """The low-rank terms of these adapters."""
    lora_A, lora_B = tensors_of(layer._modules["lora_A"]), tensors_of(layer._modules["lora_B"])
    scaling, dropout = layer.scaling, layer.lora_dropout
    training = layer.training
    adapters = [
        call.Adapter(lora_A[name], lora_B[name], scaling[name], dropout[name] if training else 0.0) for name in names
    ]
    if len(layer._modules["lora_A0"]):  # type: ignore[arg-type]
        adapters = _with_starts(layer, names, adapters)
    if len(layer._modules["lora_E"]) or len(layer._modules["lora_magnitude_vector"]):  # type: ignore[arg-type]
        adapters = _as_variants(layer, names, adapters)
    return adapters


def _with_starts(layer: FusedLoraLinear, names: Sequence[str], adapters: list[call.Adapter]) -> list[call.Adapter]:
    """One dropout mask for both halves, so that a step with dropout too starts from the base model's output."""
    return [
        adapter._replace(
            lora_A=torch.cat((adapter.lora_A, layer.lora_A0[name])),
            lora_B=torch.cat((adapter.lora_B, layer.lora_B0[name]), dim=1),
        )
        if starts.runs_beside(layer, name)
        else adapter
        for name, adapter in zip(names, adapters, strict=True)
    ]


def _as_variants(layer: FusedLoraLinear, names: Sequence[str], adapters: list[call.Adapter]) -> list[call.Adapter]:
    """These adapters with their singular values (in A) and magnitudes."""
    values: Any = layer._modules["lora_E"]
    magnitudes: Any = layer._modules["lora_magnitude_vector"]
    found = []
    for name, adapter in zip(names, adapters, strict=True):
        if name in values:
            adapter = adapter._replace(lora_A=adapter.lora_A * values[name])
        if name in magnitudes:
            norm = None
            if layer.kept_norms is not None:
                parts = (layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0)
                sources = [layer.weight, *(factors[name] for factors in parts if name in factors)]
                norm = layer.kept_norms.of(name, sources, adapter.scaling, functools.partial(_norm, layer, adapter))
            adapter = adapter._replace(magnitude=magnitudes[name], norm=norm)
        found.append(adapter)
    return found


def check_kinds(use_dora: Any, use_adalora: Any, init: bool | str, caller: str) -> None:
    """Raises ValueError for kinds of adapter that do not go together."""
    for argument, value in (("use_dora", use_dora), ("use_adalora", use_adalora)):
        check(isinstance(value, bool), caller, argument, value, "True or False")
    if use_dora and use_adalora:
        raise ValueError(f"{caller}: use_dora, use_adalora: got True for both, want one of them at most")
    if use_adalora:
        check_adalora_init(init, caller)


def check_adalora_init(init: bool | str, caller: str) -> None:
    """Raises ValueError for a start that AdaLoRA's P Λ Q does not have."""
    if not isinstance(init, bool):
        raise ValueError(
            f"{caller}: init_lora_weights: got {init!r} with use_adalora, want True (P and Q drawn, Λ zero) or False"
        )
