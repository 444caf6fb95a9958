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
from typing import Any, cast

from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import dora_functional, functional
from .kept_norms import KeptNorms
from .layers import is_overridden, keep_off_the_fast_path
from .peft_adalora import FusedSVDLinear
from .peft_fused import CallCounts, FusedForward, FusedLayer, Plan, read_dropout, why_not_dtype
from .peft_merge import DTYPES, PLAIN_TENSORS, ExactMergeLinear, parameters, why_not_base
from .peft_starts import StartedLinear

FACTORS = (nn.Linear, StartedLinear)
# PEFT's layers on quantised bases -> where their fused forms are.
QUANTISED_LAYERS = {
    "peft.tuners.lora.bnb.Linear4bit": ("peft_bnb", "FusedLinear4bit"),
    "peft.tuners.lora.bnb.Linear8bitLt": ("peft_bnb", "FusedLinear8bitLt"),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": ("peft_quantized", "FusedTorchaoLinear"),
}


class FusedPeftLinear(FusedForward, ExactMergeLinear):
    """PEFT's LoRA `Linear` whose forward runs `functional.multi_lora_linear` wherever that computes the same thing.

    Never constructed: `adopt(layer)` turns a PEFT layer into one, `release(layer)` turns it back. Everything PEFT does
    to its layers goes on working. `calls` counts what happened; `prediction(layer)` says what would happen now.
    """

    kept_norms: KeptNorms | None = None  # set on the instance within `fastlora.variants.kept_norms`

    @staticmethod
    def read_adapters(layer: Any, plan: Plan, x: Tensor | None, mixed: Sequence[str] | None) -> str | None:
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


# PEFT's classes, and what their instances become.
FUSED: dict[type[nn.Module], Any] = {PeftLinear: FusedPeftLinear, SVDLinear: FusedSVDLinear}


def unsupported(layer: nn.Module) -> str | None:
    """None where `adopt` takes this layer, or why it is left to PEFT as it is (docs/peft.md)."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.unsupported(layer)
    if type(layer) not in (*FUSED, *FUSED.values()):
        only = "only peft.tuners.lora.layer.Linear and AdaLoRA's SVDLinear are fused"
        return f"PEFT layer class {class_name(layer)}: {only}"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    base = cast(Any, layer).base_layer
    if isinstance(base, BaseTunerLayer):
        return f"nested in another PEFT layer ({type(base).__name__})"
    return why_not_base(base)


def prediction(layer: Any) -> str | None:
    """None where a call would be fused now, or why it would be left to PEFT's forward. Inputs may add reasons."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.prediction(layer)
    reason = unsupported(layer)
    if reason is not None or layer._disable_adapters or layer.merged_adapters:
        return reason
    plan = FUSED.get(type(layer), type(layer)).plan_of(layer, None)
    return plan if isinstance(plan, str) else None


def adopt(layer: nn.Module, backend: str = "auto") -> Any:
    """Makes a PEFT LoRA layer its fused form, in place. Raises ValueError with `unsupported`'s reason."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.adopt(layer, backend)
    reason = unsupported(layer)
    if reason is not None:
        raise ValueError(f"fastlora: adopt: layer: {reason}")
    fused = cast(Any, layer)
    if type(layer) in FUSED:
        fused.__class__ = FUSED[type(layer)]
        fused.calls, fused.undos, fused.group = CallCounts(), [], None
        fused.lora_A.register_forward_pre_hook(keep_off_the_fast_path)
    fused.backend = backend
    return fused


def release(layer: Any) -> None:
    """Makes it PEFT's own layer again, as if it had never been adopted: what was merged is merged again by PEFT."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.release(layer)
    merged = list(layer.merged_adapters)
    layer._restore()
    again = merged[len(layer.merged_adapters) :]
    for name in FusedForward.STATE:
        delattr(layer, name)
    hooks = layer.lora_A._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is keep_off_the_fast_path]:
        del hooks[key]
    layer.__class__ = next(peft for peft, fused in FUSED.items() if type(layer) is fused)
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
        not isinstance(layer, FusedLayer) or isinstance(layer, FusedForward)
    ):
        return None
    from . import peft_quantized

    return peft_quantized


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
    wanted = ((layer.out_features,), weight.device)
    if type(magnitude) not in PLAIN_TENSORS or (tuple(magnitude.shape), magnitude.device) != wanted:
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
    dropout_p = read_dropout(dropout)
    if isinstance(dropout_p, str):
        return dropout_p
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
    if (reason := why_not_dtype(layer, x, lora_a.dtype)) is not None:
        return reason
    plan.adapters.append(functional.Adapter(lora_a, lora_b, float(scaling), dropout_p))
    if lora_b_bias is not None and x is not None:  # lora_bias=True: s·(S Bᵀ + c) + b = s·S Bᵀ + (b + s·c)
        addition = lora_b_bias * scaling
        plan.bias = addition if plan.bias is None else plan.bias + addition
    return None
