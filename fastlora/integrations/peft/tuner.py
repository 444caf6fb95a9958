"""PEFT's `LoraModel` and `AdaLoraModel`, which add adapters to a model, followed by `patch`: layers that a later
adapter brings run fused like those that were there.

A class swap, as with the layers: `follow(model, ...)` swaps the tuners found in a model, `leave(tuner)` swaps one back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from peft.tuners.adalora.model import AdaLoraModel
from peft.tuners.lora.model import LoraModel
from torch import nn

from ...introspect.fused import FusedPeftTuner
from ...introspect.names import named_modules
from ...introspect.targets import Selection, peft_lora_layers
from . import adopt


@dataclass(frozen=True)
class _Patch:
    """What `patch` was asked for, and the tuner's name in the model that it was given."""

    selection: Selection
    backend: str
    prefix: str


class FusedTuner(FusedPeftTuner, LoraModel):
    """What adopts the layers of adapters added after `patch`, before a tuner's own class. Never constructed: see
    `follow`."""

    STATE = ("patched_by",)
    patched_by: _Patch

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        patch = self.patched_by
        for name, layer in peft_lora_layers(self):
            name = f"{patch.prefix}.{name}" if patch.prefix else name
            chosen = patch.selection.all_linear or patch.selection.names(name)
            if chosen and not patch.selection.excludes(name) and adopt.unsupported(layer) is None:
                adopt.adopt(layer, patch.backend)


class FusedLoraModel(FusedTuner):
    """`LoraModel`, followed."""


class FusedAdaLoraModel(FusedTuner, AdaLoraModel):
    """`AdaLoraModel`, followed."""


FUSED: dict[type, type[FusedTuner]] = {LoraModel: FusedLoraModel, AdaLoraModel: FusedAdaLoraModel}
for _peft, _fused in FUSED.items():
    _fused.__name__ = _peft.__name__  # what PEFT's model status calls a tuner; pickle goes by __qualname__


def follow(model: nn.Module, selection: Selection, backend: str) -> None:
    """Swaps every tuner in a model. PEFT's functions that inject adapters without one leave nothing to follow."""
    for name, tuner in named_modules(model):
        if type(tuner) in (*FUSED, *FUSED.values()):
            tuner.__class__ = FUSED.get(type(tuner), type(tuner))  # type: ignore[assignment]
            cast(FusedTuner, tuner).patched_by = _Patch(selection, backend, name)


def leave(tuner: FusedTuner) -> None:
    """Makes it PEFT's own class again."""
    for name in FusedTuner.STATE:
        delattr(tuner, name)
    cast(Any, tuner).__class__ = next(peft for peft, fused in FUSED.items() if type(tuner) is fused)
