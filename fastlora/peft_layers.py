"""PEFT's LoRA layer on our kernels, in place: `patch` swaps the class of an instance, `unpatch` swaps it back.

PEFT changes its layers at run time (merging, disabling, switching and deleting adapters, changing scales), so nothing
is remembered between calls: every forward reads PEFT's own attributes and takes the fused path, or leaves the call to
PEFT's forward and counts the reason. A class swap, unlike a bound `forward`, survives deepcopy and pickle, and keeps
identity, hooks and references.

Merging is in peft_merge.py. docs/peft.md lists what is fused, what is not, and the reasons' wording.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from . import dora_functional, functional, grouping, mixed_batches
from .kept_norms import KeptNorms
from .layers import is_overridden, keep_off_the_fast_path
from .peft_merge import DTYPES, PLAIN_TENSORS, ExactMergeLinear, parameters, why_not_base
from .peft_starts import StartedLinear

FACTORS = (nn.Linear, StartedLinear)
# PEFT's layers on quantised bases -> where their fused forms are.
QUANTISED_LAYERS = {
    "peft.tuners.lora.bnb.Linear4bit": ("peft_bnb", "FusedLinear4bit"),
    "peft.tuners.lora.bnb.Linear8bitLt": ("peft_bnb", "FusedLinear8bitLt"),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": ("peft_quantized", "FusedTorchaoLinear"),
}
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


class FusedLayer:
    """What every swapped layer has beside PEFT's own: FusedPeftLinear, and those of peft_quantized.py."""

    backend: str
    calls: CallCounts

    def _get_name(self) -> str:
        """PEFT's class in `repr`, where scripts look for it."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("peft."))

    def extra_repr(self) -> str:
        return "fused by fastlora"


class FusedPeftLinear(FusedLayer, ExactMergeLinear):
    """PEFT's LoRA `Linear` whose forward runs `functional.multi_lora_linear` wherever that computes the same thing.

    Never constructed: `adopt(layer)` turns a PEFT layer into one, `release(layer)` turns it back. Everything PEFT does
    to its layers goes on working. `calls` counts what happened; `prediction(layer)` says what would happen now.
    """

    # Set by `adopt`, taken away by `release`.
    STATE = ("backend", "calls", "undos", "group")
    group: tuple[grouping.LayerGroup, str] | None  # the group that it belongs to, and its name there
    mixed_batch: mixed_batches.MixedBatch | None = None  # set on the instance within `fastlora.adapter_names`
    kept_norms: KeptNorms | None = None  # set on the instance within `fastlora.variants.kept_norms`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan: Plan | str | None
        if not self._disable_adapters:
            names = kwargs.get("adapter_names")
            batch = mixed_batches.current(self) if names is None else mixed_batches.of_names(tuple(names))
            if batch is not None:
                return self._mixed_forward(x, batch, args, kwargs)
        if args or kwargs:
            plan = why_not_arguments(args, kwargs)
        else:
            plan = None
        if plan is None:
            if self._disable_adapters or self.merged_adapters:
                return self._base_forward(x, **kwargs)
            plan = _plan(self, x)
        if isinstance(plan, str):
            self._count_fallback(plan)
            return super().forward(x, *args, **kwargs)
        if not plan.adapters:
            return self._base_forward(x, **kwargs)
        if not torch.compiler.is_compiling():
            self.calls.fused += 1
            if self.group is not None:
                y = self.group[0].run(self, x, _reading(self, plan))
                if y is not None:
                    return y
        return functional.multi_lora_linear(
            x, plan.weight, plan.adapters, plan.bias, training=True, backend=self.backend
        )

    def read_for_group(self, x: Tensor) -> grouping.Reading | None:
        """The layer as it is now, for a group of which another member is called with x; None where it runs alone."""
        if self._disable_adapters or self.merged_adapters:
            return None
        plan = _plan(self, x)
        return None if isinstance(plan, str) else _reading(self, plan)

    def _mixed_forward(self, x: Tensor, batch: mixed_batches.MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """PEFT's `adapter_names`: every sequence with its own adapter."""
        given = {"adapter_names": batch.repeated(len(x)), **kwargs} if "adapter_names" not in kwargs else kwargs
        self._check_forward_args(x, *args, **given)  # PEFT's errors: lengths, merged adapters, DoRA
        names, segments = batch.segments(x, self.lora_A)
        others = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        plan = why_not_arguments(args, others) or _plan(self, x, names)
        if isinstance(plan, str):
            self._count_fallback(plan)
            return super().forward(x, *args, **given)
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
        return super().forward(x, **kwargs)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"group": None, **state})  # a layer pickled by an earlier version has none
        if self.group is not None:
            self.group[0].add(self.group[1], self)


def unsupported(layer: nn.Module) -> str | None:
    """None where `adopt` takes this layer, or why it is left to PEFT as it is (docs/peft.md)."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.unsupported(layer)
    if type(layer) not in (PeftLinear, FusedPeftLinear):
        name = f"{type(layer).__module__}.{type(layer).__name__}"
        return f"PEFT layer class {name}: only peft.tuners.lora.layer.Linear is fused"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    base = cast(PeftLinear, layer).base_layer
    if isinstance(base, BaseTunerLayer):
        return f"nested in another PEFT layer ({type(base).__name__})"
    return why_not_base(base)


def prediction(layer: PeftLinear) -> str | None:
    """None where a call would be fused now, or why it would be left to PEFT's forward. Inputs may add reasons."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.prediction(layer)
    reason = unsupported(layer)
    if reason is not None or layer._disable_adapters or layer.merged_adapters:
        return reason
    plan = _plan(layer, None)
    return plan if isinstance(plan, str) else None


def adopt(layer: nn.Module, backend: str = "auto") -> FusedPeftLinear:
    """Makes a PEFT LoRA layer a `FusedPeftLinear`, in place. Raises ValueError with `unsupported`'s reason."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.adopt(layer, backend)
    reason = unsupported(layer)
    if reason is not None:
        raise ValueError(f"fastlora: adopt: layer: {reason}")
    if type(layer) is PeftLinear:
        layer.__class__ = FusedPeftLinear
        layer.calls, layer.undos, layer.group = CallCounts(), [], None  # type: ignore[assignment]
        layer.lora_A.register_forward_pre_hook(keep_off_the_fast_path)
    fused = cast(FusedPeftLinear, layer)
    fused.backend = backend
    return fused


def release(layer: FusedPeftLinear) -> None:
    """Makes it PEFT's own layer again, as if it had never been adopted: what was merged is merged again by PEFT."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.release(layer)
    merged = list(layer.merged_adapters)
    layer._restore()
    again = merged[len(layer.merged_adapters) :]
    for name in FusedPeftLinear.STATE:
        delattr(layer, name)
    hooks = layer.lora_A._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is keep_off_the_fast_path]:
        del hooks[key]
    cast(nn.Module, layer).__class__ = PeftLinear
    if again:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of merging on top of others
            layer.merge(adapter_names=again)


def class_name(thing: Any) -> str:
    """The full name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__name__}"


def _quantised(layer: nn.Module) -> Any:
    """peft_quantized.py, where the layer is one of its; it is imported only then."""
    if class_name(layer) not in QUANTISED_LAYERS and (
        not isinstance(layer, FusedLayer) or isinstance(layer, FusedPeftLinear)
    ):
        return None
    from . import peft_quantized

    return peft_quantized


@dataclass
class Plan:
    weight: Tensor
    bias: Tensor | None
    adapters: list[functional.Adapter]


def _reading(layer: PeftLinear, plan: Plan) -> grouping.Reading:
    """A plan with the tensors that its lora_A are, or are put together from: the same objects at every call."""
    downs: Any = layer.lora_A._modules
    running = [downs[name] for name in layer.active_adapters if name in downs]
    sources = [
        tensor
        for down in running
        for tensor in (*down._parameters.values(), *down._buffers.values())
        if tensor is not None
    ]
    settings = [
        (down.__dict__.get("beside"), adapter.dropout_p) for down, adapter in zip(running, plan.adapters, strict=True)
    ]
    return grouping.Reading(plan.weight, plan.bias, plan.adapters, sources, tuple(settings))


def why_not_arguments(args: tuple, kwargs: dict[str, Any]) -> str | None:
    if args:
        return "positional arguments beside the input"
    for name, value in kwargs.items():
        if value is not None:
            return f"keyword argument {name}"
    return None


def _plan(layer: PeftLinear, x: Tensor | None, mixed: Sequence[str] | None = None) -> Plan | str:
    """What to run, read off PEFT's attributes now, or why the call is left to PEFT. Without x: as far as is known.
    `mixed`: the adapters of a batch that mixes them, rather than the active ones."""
    modules = layer._modules
    base = modules["base_layer"]
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
    plan = Plan(weight.t() if type(base) is Conv1D else weight, bias, [])
    reason = add_adapters(plan, layer, x, mixed, dora=True)
    if reason is not None:
        return reason
    if plan.bias is not None and plan.bias.dtype != weight.dtype:
        plan.bias = plan.bias.to(weight.dtype)
    return plan


def add_adapters(
    plan: Plan, layer: Any, x: Tensor | None, mixed: Sequence[str] | None = None, dora: bool = False
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


def _add_magnitude(plan: Plan, layer: Any, name: str) -> str | None:
    """Makes the plan's last adapter DoRA's, or says why the call is left to PEFT."""
    holder = layer.lora_magnitude_vector[name]
    if type(holder) is not DoraLinearLayer or is_overridden(holder):
        return f"the magnitudes are in a {type(holder).__name__}, or there are hooks on it"
    magnitude, weight = holder.weight, plan.weight
    if type(magnitude) not in PLAIN_TENSORS or magnitude.shape != weight.shape[:1] or magnitude.device != weight.device:
        return "magnitudes that are sharded or offloaded"
    adapter, norm = plan.adapters[-1], None
    if isinstance(layer, FusedPeftLinear) and layer.kept_norms is not None:
        sources = [weight, adapter.lora_A, adapter.lora_B]
        arguments = (weight, adapter.lora_A, adapter.lora_B, adapter.scaling, layer.backend)
        make = functools.partial(dora_functional.weight_norm, *arguments)
        norm = layer.kept_norms.of(name, sources, adapter.scaling, make)
    plan.adapters[-1] = adapter._replace(magnitude=magnitude, norm=norm)
    return None


def _add_adapter(
    plan: Plan, layer: Any, down: Any, up: Any, dropout: Any, scaling: Any, x: Tensor | None
) -> str | None:
    if type(down) not in FACTORS or type(up) not in FACTORS:
        return f"lora_A or lora_B is a {type(down).__name__}, {type(up).__name__}"
    if type(dropout) is nn.Identity:
        dropout_p = 0.0
    elif type(dropout) is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    else:
        return f"lora_dropout is a {type(dropout).__name__}"
    if is_overridden(down) or is_overridden(up) or is_overridden(dropout):
        return "hooks on lora_A, lora_B or lora_dropout, or their forward replaced"
    (lora_a, lora_a_bias), (lora_b, lora_b_bias) = parameters(down), parameters(up)
    if type(lora_a) not in PLAIN_TENSORS or type(lora_b) not in PLAIN_TENSORS:
        return f"adapter weights of class {type(lora_a).__name__}, {type(lora_b).__name__}"
    if lora_a.dim() != 2 or lora_b.dim() != 2:
        return "adapter weights are sharded or offloaded"
    if lora_a_bias is not None:
        return "lora_A has a bias"
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}"
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in DTYPES:
        return f"adapter dtypes {lora_a.dtype}, {lora_b.dtype}"
    if x is not None and lora_a.dtype != x.dtype and not layer.cast_input_dtype_enabled:
        return f"casting the input is disabled, and the adapter is {lora_a.dtype} for a {x.dtype} input"
    plan.adapters.append(functional.Adapter(lora_a, lora_b, float(scaling), dropout_p))
    if lora_b_bias is not None and x is not None:  # lora_bias=True: s·(S Bᵀ + c) + b = s·S Bᵀ + (b + s·c)
        addition = lora_b_bias * scaling
        plan.bias = addition if plan.bias is None else plan.bias + addition
    return None


def _why_not_input(x: Tensor, weight: Tensor) -> str | None:
    if type(x) not in PLAIN_TENSORS:
        return f"input of class {type(x).__name__}"
    if torch.is_autocast_enabled(x.device.type):
        if x.dtype not in AUTOCAST_DTYPES or weight.dtype not in AUTOCAST_DTYPES:
            return f"{x.dtype} input and {weight.dtype} base weight under autocast"
    elif x.dtype != weight.dtype:
        return f"{x.dtype} input into a {weight.dtype} base layer"
    return None
