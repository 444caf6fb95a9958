"""What PEFT's adapters have besides their LoRA layers: modules that are trained whole (`modules_to_save`), tokens
(`trainable_token_indices`), and the models that say which adapter is active. adapters/switch.py takes them along.

Nothing of PEFT is imported here: a model that has any of it has brought it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...introspect.fused import OwnLayer
from ...introspect.targets import modules_of


class Beside:
    """The wrappers of a model's modules (`.wrappers`, by name) and its tuners and PeftModels (`.owners`)."""

    def __init__(self, model: nn.Module, layers: Sequence[tuple[str, Any]]) -> None:
        self.wrappers: dict[str, Any] = {}
        self.owners: list[Any] = []
        other = sys.modules.get("peft.utils.other")
        if other is None or all(isinstance(layer, OwnLayer) for _, layer in layers):
            return
        tuners, models = sys.modules["peft.tuners.tuners_utils"], sys.modules["peft.peft_model"]
        wrapper = other.AuxiliaryTrainingWrapper
        for name, module in modules_of(model, (wrapper, tuners.BaseTuner, models.PeftModel)):
            if isinstance(module, wrapper):
                self.wrappers[name] = module
            else:
                self.owners.append(module)

    @property
    def adapters(self) -> set[str]:
        """The names that some wrapper knows."""
        return set().union(*(wrapper._adapters for wrapper in self.wrappers.values()))

    @property
    def token_layers(self) -> list[tuple[str, Any]]:
        """(name, layer) of those within the wrappers that train tokens: PEFT merges them along with LoRA layers."""
        return [
            (f"{name}.token_adapter", tokens)
            for name, wrapper in self.wrappers.items()
            if (tokens := wrapper._modules.get("token_adapter")) is not None
        ]

    def check(self, names: Sequence[str], caller: str) -> None:
        """Raises ValueError where `activate` would leave open which of several runs."""
        for name, wrapper in self.wrappers.items():
            found = [adapter for adapter in names if adapter in wrapper._adapters]
            if len(found) > 1:
                raise ValueError(
                    f"{caller}: adapter_name: got {list(names)}, and {name!r} (modules_to_save, "
                    f"trainable_token_indices) is another one in each of {found}; want one of them"
                )

    def delete(self, name: str) -> bool:
        """Has PEFT's outermost model delete an adapter, with its configuration; False where none knows it."""
        owner = next((owner for owner in self.owners if name in owner.peft_config), None)
        if owner is not None:
            owner.delete_adapter(name)
        return owner is not None

    def activate(self, names: list[str], trainable: bool) -> None:
        """PEFT's `set_adapter` of a model but for its LoRA layers. What knows none of the names runs as in the base
        model."""
        for wrapper in self.wrappers.values():
            found: Any = next((adapter for adapter in names if adapter in wrapper._adapters), [])
            if trainable:
                wrapper.set_requires_grad(list(wrapper._adapters), False)  # PEFT freezes only what was active
                wrapper.set_adapter(found)
            else:
                wrapper._active_adapter = found
        for _, layer in () if trainable else self.token_layers:
            layer._active_adapter = [adapter for adapter in names if adapter in layer.trainable_tokens_delta]
        for owner in self.owners:
            known = [name for name in names if name in owner.peft_config]
            if known and isinstance(owner, sys.modules["peft.peft_model"].PeftModel):
                owner.active_adapter = known[0]  # one, always: the key of its configuration
            elif known:
                owner.active_adapter = known[0] if len(known) == 1 else known
