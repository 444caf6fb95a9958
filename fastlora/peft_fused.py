"""What PEFT's layers that run fused have in common: LoRA's (peft_layers.py) and AdaLoRA's (peft_adalora.py).

A class of theirs is a `FusedForward` before PEFT's own class, and says how its adapters are read off PEFT's attributes,
at every call: PEFT changes them at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from . import functional, grouping, mixed_batches
from .layers import is_overridden
from .peft_merge import PLAIN_TENSORS, parameters, why_not_base

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class CallCounts:
    """What became of a layer's calls: fused, left to PEFT's forward (by reason), or the base layer alone.

    The base layer alone runs where adapters are merged or disabled, or where none of the active ones is here.
    """

    fused: int = 0
    base: int = 0
    fallback: dict[str, int] = field(default_factory=dict)
    last_reason: str | None = None  # of the latest fallback


@dataclass
class Plan:
    """What a call runs."""

    weight: Tensor
    bias: Tensor | None
    adapters: list[functional.Adapter]


class FusedLayer:
    """What every swapped layer has beside PEFT's own, those of peft_quantized.py too."""

    backend: str
    calls: CallCounts

    def _get_name(self) -> str:
        """PEFT's class in `repr`, where scripts look for it."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("peft."))

    def extra_repr(self) -> str:
        return "fused by fastlora"


class FusedForward(mixed_batches.BlockState, FusedLayer):
    """A PEFT layer whose forward runs `functional.multi_lora_linear` wherever that computes the same thing."""

    # Set by `peft_layers.adopt`, taken away by `release`.
    STATE = ("backend", "calls", "undos", "group")
    group: tuple[grouping.LayerGroup, str] | None  # the group that it belongs to, and its name there

    @staticmethod
    def read_adapters(layer: Any, plan: Plan, x: Tensor | None, mixed: Sequence[str] | None) -> str | None:
        """Adds a layer's active adapters (or these) to the plan, or says why the call is left to PEFT."""
        raise NotImplementedError

    def group_sources(self) -> tuple[list[Tensor], tuple]:
        """The tensors that the running adapters' A are, or are put together from, the same objects at every call; and
        what else they depend on."""
        raise NotImplementedError

    def read_plan(self, x: Tensor | None, mixed: Sequence[str] | None = None) -> Plan | str:
        """What to run: `plan_of`."""
        return self.plan_of(self, x, mixed)

    @classmethod
    def plan_of(cls, layer: Any, x: Tensor | None, mixed: Sequence[str] | None = None) -> Plan | str:
        """What a layer, fused or still PEFT's, would run, read off PEFT's attributes now, or why the call is left to
        PEFT. Without x: as far as is known. `mixed`: the adapters of a batch that mixes them, rather than the active
        ones."""
        plan = read_base(layer, x)
        if isinstance(plan, str):
            return plan
        reason = cls.read_adapters(layer, plan, x, mixed)
        if reason is not None:
            return reason
        if plan.bias is not None and plan.bias.dtype != plan.weight.dtype:
            plan.bias = plan.bias.to(plan.weight.dtype)
        return plan

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if not layer._disable_adapters:
            names = kwargs.get("adapter_names")
            batch = mixed_batches.current(layer) if names is None else mixed_batches.of_names(tuple(names))
            if batch is not None:
                return self._mixed_forward(x, batch, args, kwargs)
        plan: Plan | str | None = why_not_arguments(args, kwargs) if args or kwargs else None
        if plan is None:
            if layer._disable_adapters or layer.merged_adapters:
                return self._base_forward(x, **kwargs)
            plan = self.read_plan(x)
        if isinstance(plan, str):
            self._count_fallback(plan)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not plan.adapters:
            return self._base_forward(x, **kwargs)
        if not torch.compiler.is_compiling():
            self.calls.fused += 1
            if self.group is not None:
                y = self.group[0].run(self, x, self._reading(plan))
                if y is not None:
                    return y
        return functional.multi_lora_linear(
            x, plan.weight, plan.adapters, plan.bias, training=True, backend=self.backend
        )

    def read_for_group(self, x: Tensor) -> grouping.Reading | None:
        """The layer as it is now, for a group of which another member is called with x; None where it runs alone."""
        layer: Any = self
        if layer._disable_adapters or layer.merged_adapters:
            return None
        plan = self.read_plan(x)
        return None if isinstance(plan, str) else self._reading(plan)

    def _reading(self, plan: Plan) -> grouping.Reading:
        sources, settings = self.group_sources()
        settings += tuple(adapter.dropout_p for adapter in plan.adapters)
        return grouping.Reading(plan.weight, plan.bias, plan.adapters, sources, settings)

    def _mixed_forward(self, x: Tensor, batch: mixed_batches.MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """PEFT's `adapter_names`: every sequence with its own adapter."""
        layer: Any = self
        given = {"adapter_names": batch.repeated(len(x)), **kwargs} if "adapter_names" not in kwargs else kwargs
        layer._check_forward_args(x, *args, **given)  # PEFT's errors: lengths, merged adapters, DoRA
        names, segments = batch.segments(x, layer.lora_A)
        others = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        plan = why_not_arguments(args, others) or self.read_plan(x, names)
        if isinstance(plan, str):
            self._count_fallback(plan)
            return super().forward(x, *args, **given)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            self.calls.fused += 1
        return functional.run_segments(x, plan.weight, plan.adapters, segments, plan.bias, self.backend)

    def _count_fallback(self, reason: str) -> None:
        if not torch.compiler.is_compiling():  # a changing count would be a new graph for every call
            counts = self.calls
            counts.fallback[reason] = counts.fallback.get(reason, 0) + 1
            counts.last_reason = reason

    def _base_forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's own forward where it comes down to the base layer; it unmerges first where adapters are disabled."""
        if not torch.compiler.is_compiling():
            self.calls.base += 1
        return super().forward(x, **kwargs)  # type: ignore[misc]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"group": None, **state})  # type: ignore[misc]  # one pickled by an earlier version has none
        if self.group is not None:
            self.group[0].add(self.group[1], self)


def why_not_arguments(args: tuple, kwargs: dict[str, Any]) -> str | None:
    if args:
        return "positional arguments beside the input"
    for name, value in kwargs.items():
        if value is not None:
            return f"keyword argument {name}"
    return None


def read_base(layer: Any, x: Tensor | None) -> Plan | str:
    """A plan without adapters, or why the call is left to PEFT."""
    base = layer._modules["base_layer"]
    assert base is not None
    reason = why_not_base(base)
    if reason is not None:
        return f"nested in another PEFT layer ({type(base).__name__})" if isinstance(base, BaseTunerLayer) else reason
    if is_overridden(base):
        return "hooks on the base layer, or its forward replaced"
    if nn_module._has_any_global_hook():
        return "global module hooks"
    weight, bias = parameters(base)
    if weight.dim() != 2:
        return "base weight is sharded or offloaded"
    if x is not None:
        reason = _why_not_input(x, weight)
        if reason is not None:
            return reason
    return Plan(weight.t() if type(base) is Conv1D else weight, bias, [])


def _why_not_input(x: Tensor, weight: Tensor) -> str | None:
    if type(x) not in PLAIN_TENSORS:
        return f"input of class {type(x).__name__}"
    if torch.is_autocast_enabled(x.device.type):
        if x.dtype not in AUTOCAST_DTYPES or weight.dtype not in AUTOCAST_DTYPES:
            return f"{x.dtype} input and {weight.dtype} base weight under autocast"
    elif x.dtype != weight.dtype:
        return f"{x.dtype} input into a {weight.dtype} base layer"
    return None


def read_dropout(dropout: nn.Module) -> float | str:
    """The probability that is in force, or why the call is left to PEFT."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is nn.Dropout:
        return dropout.p if dropout.training else 0.0
    return f"lora_dropout is a {type(dropout).__name__}"


def why_not_dtype(layer: Any, x: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why an adapter of this dtype is left to PEFT, or None."""
    if x is not None and dtype != x.dtype and not layer.cast_input_dtype_enabled:
        return f"casting the input is disabled, and the adapter is {dtype} for a {x.dtype} input"
    return None
