"""The marks of what fastlora has put into a model, by which the lower floors know it without importing it; and what a
class swap must know of a module's forward."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any

from torch import nn


class OwnLayer:
    """The mark of `FusedLoraLinear`, and of expert weights: a layer of fastlora's, that holds its adapters itself."""

    def called(self, name: str) -> str:
        """What reports and files call the layer that is registered under this name."""
        return name


class FusedPeftLayer:
    """The mark of a PEFT layer whose forward runs fastlora's ops."""


PATCHED = "_fastlora_patched"  # on a model: the names of the layers that `patch` has given adapters


class FusedPeftTuner:
    """The mark of a PEFT tuner that fuses the adapters it adds later."""


def class_name(thing: Any) -> str:
    """The full name of an object's class: a class can be known by it without its library."""
    return f"{type(thing).__module__}.{type(thing).__name__}"


def has_own_forward(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward: nothing on the instance replaces it but accelerate's hook that
    only moves inputs to the weight's device (`device_map`), or what such a hook leaves when it is removed."""
    attributes = module.__dict__
    forward = attributes.get("forward")
    if forward is None or _is_own(forward, module):
        return True
    hook = attributes.get("_hf_hook")
    placed = type(hook).__name__ == "AlignDevicesHook" and not hook.offload  # type: ignore[union-attr]
    return placed and _is_own(attributes.get("_old_forward"), module)


def rebind_forward(module: nn.Module, cls: type[nn.Module]) -> None:
    """Before an instance gets another class: a forward kept on it becomes that class's."""
    attributes = module.__dict__
    if _is_own(attributes.get("forward"), module):
        del attributes["forward"]
    if _is_own(attributes.get("_old_forward"), module):
        attributes["_old_forward"] = types.MethodType(cls.forward, module)


def _is_own(forward: Any, module: nn.Module) -> bool:
    own = getattr(forward, "__func__", None) is type(module).forward
    return own and forward.__self__ is module  # type: ignore[union-attr]


def remove_hooks(model: nn.Module, functions: Collection[Callable[..., Any]]) -> None:
    """Takes these functions out of the forward hooks of a model's modules; a copy has no handles."""
    for module in model.modules():
        tables = [value for name, value in vars(module).items() if name.startswith("_forward_") and "hooks" in name]
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in functions]:
                for table in tables:
                    table.pop(key, None)
