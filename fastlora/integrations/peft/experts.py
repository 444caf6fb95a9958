"""PEFT's `ParamWrapper`s on a mixture's experts, on our ops, in place.

PEFT puts a wrapper around the module for each of its parameters that is adapted, one around the other, and forms
W + ΔW of the wrapper's parameter before it calls what it holds. Here the outermost wrapper that is called reads the
adapters of those within it, and the module runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ...introspect.targets import why_not_experts
from ...layers import experts as fused
from ...layers.checks import is_overridden
from ...ops import call
from .lora import FACTORS, PeftFusedLayer, why_not_arguments
from .merge import merge_kept, parameters, unmerge_kept


class FusedParamWrapper(PeftFusedLayer, ParamWrapper):
    """PEFT's wrapper of a weight of experts. Never constructed: see `adopt`."""

    PLAIN = ParamWrapper
    shares_input = False

    @staticmethod
    def why_not_base(layer: Any) -> str | None:
        """Why a wrapper is left to PEFT as it is."""
        base = layer.get_base_layer()
        if "parametrizations" in base._modules:
            return "its module is parametrised"
        return why_not_experts(base, layer.parameter_name)

    @classmethod
    def plan_of(cls, layer: Any, x: Tensor | None) -> dict[str, list[call.Adapter]] | str:
        """The running adapters of a wrapper and of those within it, by the parameters' names, or why the call is left
        to PEFT."""
        terms: dict[str, list[call.Adapter]] = {}
        if nn_module._has_any_global_hook():
            return "global module hooks"
        for wrapper in _chain(layer):
            if wrapper is not layer and is_overridden(wrapper):
                return "hooks on a wrapper within, or its forward replaced"
            if (reason := cls.why_not_base(wrapper)) is not None:
                return reason
            found = [] if wrapper._disable_adapters or wrapper.merged_adapters else _read(wrapper)
            if isinstance(found, str):
                return found
            terms[wrapper.parameter_name] = found
        return "hooks on the experts, or their forward replaced" if is_overridden(layer.get_base_layer()) else terms

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters:  # PEFT's own unmerges
            return self.base_forward(x, *args, **kwargs)
        plan = self.plan_of(self, x) if len(args) == 2 else "not called with tokens, experts and weights"
        plan = why_not_arguments((), kwargs) or plan
        if isinstance(plan, str):
            return self.fall_back(plan, x, *args, **kwargs)
        if not any(plan.values()):
            return self.base_forward(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            for wrapper in _chain(self):
                if isinstance(wrapper, FusedParamWrapper):
                    wrapper.calls.fused += 1
        return fused.run(self.get_base_layer(), x, args[0], args[1], plan, self.backend)

    # Merging.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, expert by expert, in float32 and rounded once; always safe, and `unmerge` restores the bits."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if names:
            merge_kept(self, self._merge, names)

    def unmerge(self) -> None:
        unmerge_kept(self, super().unmerge)

    def _merge(self, safe_merge: bool, adapter_names: list[str]) -> None:
        terms = _read(self, adapter_names)
        if isinstance(terms, str):
            raise ValueError(f"merge: {self.parameter_name}: {terms}")
        transposed = bool(self.get_base_layer().is_transposed)
        broken = f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
        fused.add_deltas(self.get_param(), terms, transposed, broken)  # in PEFT's words
        self.merged_adapters.extend(adapter_names)


FusedParamWrapper.__name__ = ParamWrapper.__name__  # by which PEFT finds its wrappers; pickle goes by __qualname__


def _chain(layer: Any) -> Iterator[Any]:
    """A wrapper and those within it."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def _read(wrapper: Any, names: Any = None) -> list[call.Adapter] | str:
    """A wrapper's active adapters (or these), lora_A (E, r, K) and lora_B (E, N, r), or why they are left to PEFT."""
    terms = []
    for name in wrapper.active_adapters if names is None else names:
        if name not in wrapper.lora_A:
            continue
        down, up, dropout = wrapper.lora_A[name], wrapper.lora_B[name], wrapper.lora_dropout[name]
        if type(down) not in FACTORS or type(up) not in FACTORS or type(dropout) is not nn.Identity:
            return f"lora_A, lora_B or lora_dropout is a {type(down).__name__}, {type(up).__name__}"
        if is_overridden(down) or is_overridden(up):
            return "hooks on lora_A or lora_B, or their forward replaced"
        (a, _), (b, bias) = parameters(down), parameters(up)
        if bias is not None or a.dim() != 2 or b.dim() != 2:
            return "lora_bias, or adapter weights that are sharded or offloaded"
        terms.append(call.Adapter(*fused.by_expert(a, b, wrapper.num_experts), float(wrapper.scaling[name])))
    return terms
