"""PEFT's LoRA layer on our kernels, in place: `patch` swaps the class of an instance, `unpatch` swaps it back.

PEFT changes its layers at run time (merging, disabling, switching and deleting adapters, changing scales), so nothing
is remembered between calls: every forward reads PEFT's own attributes and takes the fused path, or leaves the call to
PEFT's forward and counts the reason. A class swap, unlike a bound `forward`, survives deepcopy and pickle, and keeps
identity, hooks and references.

Merging is in merge.py. docs/details/peft.md lists what is fused, what is not, and the reasons' wording.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, cast

from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ...introspect.fused import class_name, has_own_forward, rebind_forward
from ...layers.checks import keep_off_the_fast_path
from ...layers.fused import CallCounts
from .adalora import FusedSVDLinear
from .experts import FusedParamWrapper
from .lora import QUANTISED_LAYERS, FusedPeftLinear, PeftFusedLayer, why_not
from .merge import take_back

# PEFT's classes, and what their instances become; those on quantised bases are imported where a model has them.
FUSED: dict[type[nn.Module], Any] = {
    PeftLinear: FusedPeftLinear,
    SVDLinear: FusedSVDLinear,
    ParamWrapper: FusedParamWrapper,
}


def _fused_class(layer: nn.Module) -> Any:
    """What an instance becomes or is; None for a class that stays with PEFT."""
    if isinstance(layer, PeftFusedLayer):
        return type(layer)
    if class_name(layer) in QUANTISED_LAYERS:
        module, name = QUANTISED_LAYERS[class_name(layer)]
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return FUSED.get(type(layer))


def unsupported(layer: nn.Module) -> str | None:
    """None where `adopt` takes this layer, or why it is left to PEFT as it is: docs/details/peft.md, qlora.md."""
    fused = _fused_class(layer)
    if fused is None:
        only = "only peft.tuners.lora.layer's Linear and ParamWrapper and AdaLoRA's SVDLinear are fused"
        return f"PEFT layer class {class_name(layer)}: {only}"
    if not has_own_forward(layer):
        hooked = "accelerate's hook offloads its weights" if hasattr(layer, "_hf_hook") else None
        return hooked or "its forward was replaced on the instance"
    if isinstance(layer, ParamWrapper):
        return fused.why_not_base(layer)
    return why_not(cast(Any, layer).base_layer, fused.why_not_base)


def prediction(layer: Any) -> str | None:
    """None where a call (with gradients) would be fused now, or why it would be left to PEFT's forward. Inputs may add
    reasons."""
    reason = unsupported(layer)
    if reason is not None or layer._disable_adapters or layer.merged_adapters:
        return reason
    plan = _fused_class(layer).plan_of(layer, None)
    return plan if isinstance(plan, str) else None


def adopt(layer: nn.Module, backend: str = "auto") -> Any:
    """Makes a PEFT LoRA layer its fused form, in place. Raises ValueError with `unsupported`'s reason."""
    reason = unsupported(layer)
    if reason is not None:
        raise ValueError(f"fastlora: adopt: layer: {reason}")
    fused, cls = cast(Any, layer), _fused_class(layer)
    if type(layer) is not cls:
        rebind_forward(layer, cls)
        fused.__class__ = cls
        fused.calls, fused.group = CallCounts(), None
        fused.lora_A.register_forward_pre_hook(keep_off_the_fast_path)
    fused.backend = backend
    return fused


def release(layer: Any) -> None:
    """Makes it PEFT's own layer again, as if it had never been adopted: what was merged is merged again by PEFT."""
    again = take_back(layer)
    for name in PeftFusedLayer.STATE:
        delattr(layer, name)
    hooks = layer.lora_A._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is keep_off_the_fast_path]:
        del hooks[key]
    rebind_forward(layer, layer.PLAIN)
    layer.__class__ = layer.PLAIN
    if again:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of merging on top of others
            layer.merge(adapter_names=again)
