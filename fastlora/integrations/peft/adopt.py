"""PEFT's LoRA layer on our kernels, in place: `patch` swaps the class of an instance, `unpatch` swaps it back.

PEFT changes its layers at run time (merging, disabling, switching and deleting adapters, changing scales), so nothing
is remembered between calls: every forward reads PEFT's own attributes and takes the fused path, or leaves the call to
PEFT's forward and counts the reason. A class swap, unlike a bound `forward`, survives deepcopy and pickle, and keeps
identity, hooks and references.

Merging is in merge.py. docs/peft.md lists what is fused, what is not, and the reasons' wording.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...layers.checks import keep_off_the_fast_path
from ...layers.fused import CallCounts
from .adalora import FusedSVDLinear
from .lora import QUANTISED_LAYERS, FusedForward, FusedPeftLinear, PeftFusedLayer, class_name
from .merge import why_not_base

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


def _quantised(layer: nn.Module) -> Any:
    """quantised.py, where the layer is one of its; it is imported only then."""
    if class_name(layer) not in QUANTISED_LAYERS and (
        not isinstance(layer, PeftFusedLayer) or isinstance(layer, FusedForward)
    ):
        return None
    from . import quantised as peft_quantised

    return peft_quantised
