"""One of PEFT's layers as `Adapted`, whether it runs fused or not. Nothing of PEFT is imported here: a model that has
such a layer has brought it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...introspect.fused import OwnLayer
from ...layers.fused import Adapted
from .starts import SHIFT, take_back_shift


def adapted(layer: Any) -> Adapted:
    """The layer as `Adapted`: itself, or, where it is PEFT's, what speaks for it."""
    return layer if isinstance(layer, OwnLayer) else PeftLayer(layer)  # type: ignore[return-value]


class PeftLayer:
    """A tuner layer of PEFT's, or a wrapper of a module that is trained whole. Attributes are PEFT's own: `r`,
    `active_adapters`, `merged_adapters`."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def base_weight(self) -> Tensor | None:
        base: nn.Module = self.layer.get_base_layer()
        return base._parameters.get("weight")

    def activate(self, names: list[str], trainable: bool) -> None:
        if trainable:
            self.layer.set_adapter(names)
        else:
            self.layer._active_adapter = list(names)

    def disable(self) -> Callable[[], None]:
        layer = self.layer
        before = layer.__dict__.get("_disable_adapters")
        layer._disable_adapters = True

        def enable() -> None:
            if before is None:  # it was the class's
                del layer._disable_adapters
            else:
                layer._disable_adapters = before

        return enable

    def merge_adapters(self, names: list[str] | None, untie: bool) -> None:
        from . import merge

        merge.merge(self.layer, names, untie)

    def unmerge(self) -> None:
        from . import merge

        merge.unmerge(self.layer)

    def holds(self, name: str) -> bool:
        merged = self.layer.merged_adapters
        return name in merged or (self.layer.__dict__.get(SHIFT, ("",))[0] == name and bool(merged))

    def delete_adapter(self, name: str) -> None:
        take_back_shift(self.layer, name)
        self.layer.delete_adapter(name)


def why_not_fused(layer: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Of a layer that does not run on our kernels: why, and what would change it."""
    peft_layer = sys.modules.get("peft.tuners.lora.layer")
    if peft_layer is None or not isinstance(layer, peft_layer.LoraLayer):
        return "not a layer of fastlora's, nor a LoRA layer of PEFT's", ("fastlora.patch(model)",)
    from . import adopt

    reason = adopt.prediction(layer)
    if reason is None:
        return "PEFT's own layer", ("fastlora.patch(model)",)
    return f"PEFT's own layer, which cannot be fused: {reason}", ()
