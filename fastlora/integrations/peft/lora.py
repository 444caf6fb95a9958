"""What PEFT's layers that run fused have in common, and LoRA's `Linear` among them (AdaLoRA's is in adalora.py, those
on quantised bases in quantised.py).

A class of theirs is a `FusedForward` before PEFT's own class, and says how its adapters are read off PEFT's attributes,
at every call: PEFT changes them at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from ...introspect.fused import FusedPeftLayer
from ...layers import batch as layers_batch
from ...layers.checks import is_overridden
from ...layers.fused import FusedLayer, Terms
from ...layers.head import lazy_logits
from ...ops import call
from ...ops import layer as ops_layer
from ...ops.dora import dora as dora_op
from ...ops.mixed import mixed as mixed_op
from .merge import DTYPES, PLAIN_TENSORS, ExactMergeLinear, parameters, why_not_base
from .starts import StartedLinear

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PeftFusedLayer(FusedPeftLayer, FusedLayer):
    """What every swapped layer has besides PEFT's own, whatever its base."""

    STATE = ("backend", "calls", "group")  # set by `adopt.adopt`, taken away by `release`
    PLAIN: type[nn.Module]  # PEFT's own class

    def _get_name(self) -> str:
        """PEFT's class in `repr`, where scripts look for it."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("peft."))

    def extra_repr(self) -> str:
        return "fused by fastlora"

    @classmethod
    def plan_of(cls, layer: Any, x: Tensor | None) -> Any:
        """What a layer, fused or still PEFT's, would run (`Terms`), or why the call is left to PEFT's forward. Without
        x: as far as is known."""
        raise NotImplementedError

    def run(self, x: Tensor, plan: Any) -> Tensor:
        """Runs a plan that has adapters."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        plan: Any = why_not_arguments(args, kwargs) if args or kwargs else None
        if plan is None:
            if layer._disable_adapters or layer.merged_adapters:
                return self.base_forward(x, **kwargs)
            plan = self.plan_of(layer, x)
        if isinstance(plan, str):
            return self.fall_back(plan, x, *args, **kwargs)
        if self.loss_trust is not None and (lazy := lazy_logits(layer, x, plan, self.loss_trust)) is not None:
            self.calls.fused += 1
            return lazy
        if not plan.adapters:
            return self.base_forward(x, **kwargs)
        if not torch.compiler.is_compiling():  # a changing count would be a new graph for every call
            self.calls.fused += 1
        return self.run(x, plan)

    def fall_back(self, reason: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own forward, and why."""
        if not torch.compiler.is_compiling():
            self.calls.fell_back(reason)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own forward where it comes down to the base layer; it unmerges first where adapters are disabled."""
        if not torch.compiler.is_compiling():
            self.calls.base += 1
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class FusedForward(PeftFusedLayer):
    """A PEFT layer whose forward runs `functional.multi_lora_linear` wherever that computes the same thing."""

    why_not_base = staticmethod(why_not_base)

    @staticmethod
    def read_adapters(layer: Any, plan: Terms, x: Tensor | None, mixed: Sequence[str] | None) -> str | None:
        """Adds a layer's active adapters (or these) to the plan, or says why the call is left to PEFT."""
        raise NotImplementedError

    def terms(self, x: Tensor) -> Terms | str:
        layer: Any = self
        if layer._disable_adapters or layer.merged_adapters:
            return read_base(layer, x)
        return self.plan_of(layer, x)

    @classmethod
    def plan_of(cls, layer: Any, x: Tensor | None, mixed: Sequence[str] | None = None) -> Terms | str:
        """`mixed`: the adapters of a batch that mixes them, rather than the active ones."""
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
            batch = layers_batch.current(layer) if names is None else layers_batch.of_names(tuple(names))
            if batch is not None:
                return self._mixed_forward(x, batch, args, kwargs)
        return super().forward(x, *args, **kwargs)

    def run(self, x: Tensor, plan: Terms) -> Tensor:
        y = None
        if self.group is not None and not torch.compiler.is_compiling():
            y = self.group[0].run(self, x, plan)
        if y is None:
            y = ops_layer.multi_lora_linear(x, plan.weight, plan.adapters, plan.bias, backend=self.backend)
        return y

    def _mixed_forward(self, x: Tensor, batch: layers_batch.MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """PEFT's `adapter_names`: every sequence with its own adapter."""
        layer: Any = self
        given = {"adapter_names": batch.repeated(len(x)), **kwargs} if "adapter_names" not in kwargs else kwargs
        layer._check_forward_args(x, *args, **given)  # PEFT's errors: lengths, merged adapters, DoRA
        names, segments = batch.segments(x, layer.lora_A)
        others = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        plan = why_not_arguments(args, others) or self.plan_of(layer, x, names)
        if isinstance(plan, str):
            return self.fall_back(plan, x, *args, **given)
        if not torch.compiler.is_compiling():
            self.calls.fused += 1
        return mixed_op.run_segments(x, plan.weight, plan.adapters, segments, plan.bias, self.backend)


def why_not_arguments(args: tuple, kwargs: dict[str, Any]) -> str | None:
    if args:
        return "positional arguments besides the input"
    for name, value in kwargs.items():
        if value is not None:
            return f"keyword argument {name}"
    return None


def why_not(base: Any, why_not_base: Callable[[Any], str | None]) -> str | None:
    """Why a layer with this base stays with PEFT, or None."""
    if isinstance(base, BaseTunerLayer):
        return f"nested in another PEFT layer ({type(base).__name__})"
    return why_not_base(base)


def why_not_called(base: Any, why_not_base: Callable[[Any], str | None]) -> str | None:
    """Why a call of a layer with this base is left to PEFT, whatever its adapters and input, or None."""
    if (reason := why_not(base, why_not_base)) is not None:
        return reason
    if is_overridden(base):
        return "hooks on the base layer, or its forward replaced"
    return "global module hooks" if nn_module._has_any_global_hook() else None


def read_base(layer: Any, x: Tensor | None) -> Terms | str:
    """A plan without adapters, or why the call is left to PEFT."""
    base = layer._modules["base_layer"]
    if (reason := why_not_called(base, why_not_base)) is not None:
        return reason
    weight, bias = parameters(base)
    if weight.dim() != 2:
        return "base weight is sharded or offloaded"
    if x is not None:
        if x.device != weight.device and "forward" in base.__dict__:
            return "an input on another device than the base layer, to which accelerate's hook moves it"
        reason = _why_not_input(x, weight)
        if reason is not None:
            return reason
    return Terms(weight.t() if type(base) is Conv1D else weight, bias, [])


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


def why_not_factors(layer: Any, x: Tensor | None, factors: Sequence[Tensor], scaling: Any) -> str | None:
    """Why an adapter of these factors (A and B first) is left to PEFT, or None."""
    dtype = factors[0].dtype
    for factor in factors:
        if type(factor) not in PLAIN_TENSORS:
            return f"adapter weights of class {', '.join(type(one).__name__ for one in factors)}"
        if factor.dim() != 2:
            return "adapter weights are sharded or offloaded"
        if factor.dtype != dtype or dtype not in DTYPES:
            return f"adapter dtypes {', '.join(str(one.dtype) for one in factors)}"
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}"
    if x is not None and dtype != x.dtype and not layer.cast_input_dtype_enabled:
        return f"casting the input is disabled, and the adapter is {dtype} for a {x.dtype} input"
    return None


FACTORS = (nn.Linear, StartedLinear)

# PEFT's layers on quantised bases -> where their fused forms are.
QUANTISED_LAYERS = {
    "peft.tuners.lora.bnb.Linear4bit": ("bnb", "FusedLinear4bit"),
    "peft.tuners.lora.bnb.Linear8bitLt": ("bnb", "FusedLinear8bitLt"),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": ("quantised", "FusedTorchaoLinear"),
}


class FusedPeftLinear(FusedForward, ExactMergeLinear):
    """PEFT's LoRA `Linear` whose forward runs `functional.multi_lora_linear` wherever that computes the same thing.

    Never constructed: `adopt(layer)` turns a PEFT layer into one, `release(layer)` turns it back. Everything PEFT does
    to its layers goes on working. `calls` counts what happened; `prediction(layer)` says what would happen now.
    """

    PLAIN = PeftLinear

    @staticmethod
    def read_adapters(layer: Any, plan: Terms, x: Tensor | None, mixed: Sequence[str] | None) -> str | None:
        return add_adapters(plan, layer, x, mixed, dora=True)

    def group_sources(self) -> tuple[list[Tensor], tuple]:
        downs: Any = self.lora_A._modules
        running = [downs[name] for name in self.active_adapters if name in downs]
        sources = [
            tensor
            for down in running
            for tensor in (*down._parameters.values(), *down._buffers.values())
            if tensor is not None
        ]
        return sources, tuple(down.__dict__.get("beside") for down in running)


def add_adapters(
    plan: Terms, layer: Any, x: Tensor | None, mixed: Sequence[str] | None = None, dora: bool = False
) -> str | None:
    """Adds a layer's active adapters (or these) to the plan, or says why the call is left to PEFT, as it is for DoRA
    unless `dora`."""
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules  # type: ignore[union-attr]
    dropouts = modules["lora_dropout"]._modules  # type: ignore[union-attr]
    for name in layer.active_adapters if mixed is None else mixed:
        if name in lora_a:
            if mixed is not None and parameters(lora_b[name])[1] is not None:  # type: ignore[arg-type]
                return "lora_bias in a batch that mixes adapters"
            variant = layer.lora_variant.get(name)
            if variant is not None and not (dora and type(variant) is DoraLinearVariant):
                return f"variant {type(variant).__name__}"
            reason = _add_adapter(plan, layer, lora_a[name], lora_b[name], dropouts[name], layer.scaling[name], x)
            if reason is None and variant is not None:
                reason = _add_magnitude(plan, layer, name)
            if reason is not None:
                return reason
    if len(plan.adapters) > 1 and any(adapter.magnitude is not None for adapter in plan.adapters):
        return "DoRA beside other adapters"  # PEFT scales what the adapters before it have added
    return None


def _add_magnitude(plan: Terms, layer: Any, name: str) -> str | None:
    """Makes the plan's last adapter DoRA's, or says why the call is left to PEFT."""
    holder = layer.lora_magnitude_vector[name]
    if type(holder) is not DoraLinearLayer or is_overridden(holder):
        return f"the magnitudes are in a {type(holder).__name__}, or there are hooks on it"
    magnitude, weight = holder.weight, plan.weight
    wanted = (tuple(plan.adapters[-1].lora_B.shape[:1]), weight.device)  # of a shard, a shard's; weights may be packed
    if type(magnitude) not in PLAIN_TENSORS or (tuple(magnitude.shape), magnitude.device) != wanted:
        return "magnitudes that are sharded or offloaded"
    adapter, norm = plan.adapters[-1], None
    if isinstance(layer, FusedPeftLinear) and layer.kept_norms is not None:
        sources = [weight, adapter.lora_A, adapter.lora_B]
        arguments = (weight, adapter.lora_A, adapter.lora_B, adapter.scaling, layer.backend)
        make = functools.partial(dora_op.weight_norm, *arguments)
        norm = layer.kept_norms.of(name, sources, adapter.scaling, make)
    plan.adapters[-1] = adapter._replace(magnitude=magnitude, norm=norm)
    return None


def _add_adapter(
    plan: Terms, layer: Any, down: Any, up: Any, dropout: Any, scaling: Any, x: Tensor | None
) -> str | None:
    if type(down) not in FACTORS or type(up) not in FACTORS:
        return f"lora_A or lora_B is a {type(down).__name__}, {type(up).__name__}"
    dropout_p = read_dropout(dropout)
    if isinstance(dropout_p, str):
        return dropout_p
    if is_overridden(down) or is_overridden(up) or is_overridden(dropout):
        return "hooks on lora_A, lora_B or lora_dropout, or their forward replaced"
    (lora_a, lora_a_bias), (lora_b, lora_b_bias) = parameters(down), parameters(up)
    if lora_a_bias is not None:
        return "lora_A has a bias"
    if (reason := why_not_factors(layer, x, (lora_a, lora_b), scaling)) is not None:
        return reason
    plan.adapters.append(call.Adapter(lora_a, lora_b, float(scaling), dropout_p))
    if lora_b_bias is not None and x is not None:  # lora_bias=True: s·(S Bᵀ + c) + b = s·S Bᵀ + (b + s·c)
        addition = lora_b_bias * scaling
        plan.bias = addition if plan.bias is None else plan.bias + addition
    return None
