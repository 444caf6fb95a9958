"""Layers that are never called are never trained: a look at a model's first training forward, and none afterwards.

Two hooks on the model compare its layers' counts of calls before and after that forward, and are removed then. Nothing
is counted in compiled code: what is compiled is left out. The hooks are plain functions, so that copies and pickles of
the model have them too.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from ..introspect.fused import FusedPeftLayer, OwnLayer, remove_hooks
from ..introspect.names import unwrapped
from ..introspect.targets import check_holder, lora_layers
from ..layers.head import output_head
from ..runtime.messages import some

_BEFORE = "_fastlora_calls"  # on a model during that forward: (name, layer, its calls before)
_OWNERS = "_fastlora_owners"  # of a layer's counts: the layer and the model that was patched
_LOOKS = "_fastlora_looks"  # of a layer's counts: whether it looks for PEFT's adapters in evaluation too (the first)


def watch(model: nn.Module) -> None:
    """Warns, after the model's first training forward, of patched layers that it did not call; for an output head that
    is a RuntimeError, since no other batch would call it."""
    model = unwrapped(model)
    if isinstance(model, (OwnLayer, FusedPeftLayer)):
        return
    forget(model)
    model.register_forward_pre_hook(_before)
    model.register_forward_hook(_after, always_call=True)
    for number, layer in enumerate(_own_layers(model)):
        layer.calls.__dict__[_OWNERS] = weakref.ref(layer), weakref.ref(model)
        layer.calls.__dict__[_LOOKS] = number == 0
        layer.calls.__class__ = _noticing(type(layer.calls))


def _own_layers(model: nn.Module) -> list[Any]:
    return [layer for _, layer in lora_layers(model) if isinstance(layer, OwnLayer)]


@functools.cache
def _noticing(plain: Any) -> Any:
    """The class of counts that notice a layer's first call in training: PEFT's models call the forward, not the hooks,
    of a model that they were put around. A copy, or a pickle, is of the plain class."""

    class Noticing(plain):
        @property
        def fused(self) -> int:
            return self.__dict__["fused"]

        @fused.setter
        def fused(self, value: int) -> None:
            self.__dict__["fused"] = value
            layer, model = (reference() for reference in self.__dict__[_OWNERS])
            if layer is None or model is None or not _differentiates(layer):
                return
            if layer.training:
                _check_own(model)
                _stop_noticing(model)
            elif self.__dict__[_LOOKS]:  # a loop without model.train(), or an evaluation: a warning
                try:
                    _check_own(model)
                except ValueError as error:
                    self.__dict__[_LOOKS] = False
                    warnings.warn(f"fastlora: {error}", UserWarning, stacklevel=2)

        def __reduce__(self) -> Any:
            kept = {key: value for key, value in self.__dict__.items() if key not in (_OWNERS, _LOOKS)}
            return _restored, (plain, kept)

    return Noticing


def _restored(cls: Any, values: dict[str, Any]) -> Any:
    calls = cls()
    calls.__dict__.update(values)
    return calls


def _stop_noticing(model: nn.Module) -> None:
    for layer in _own_layers(model):
        layer.calls.__dict__.pop(_LOOKS, None)
        if layer.calls.__dict__.pop(_OWNERS, None) is not None:
            layer.calls.__class__ = type(layer.calls).__base__


def forget(model: nn.Module) -> None:
    """Takes the hooks away."""
    _stop_noticing(model)
    remove_hooks(model, (_before, _after))


def _trains(module: nn.Module) -> bool:
    return module.training and _differentiates(module)


def _differentiates(module: nn.Module) -> bool:
    replica = module.__dict__.get("_is_replica", False)  # DataParallel's
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and not replica


def _check_own(model: nn.Module) -> None:
    """Raises ValueError where PEFT's adapters are around fastlora's."""
    if _own_layers(model):
        check_holder(model, "FusedLoraLinear.forward")


def _before(model: nn.Module, args: Any) -> None:
    if not _trains(model):
        return
    _check_own(model)
    compiled = _compiled(model)
    layers = [(name, layer) for name, layer in lora_layers(model) if _runs(layer) and id(layer) not in compiled]
    trained = [(name, layer, _calls(layer)) for name, layer in layers if _is_trained(layer)]
    _stop_noticing(model)
    if layers and not trained and "peft" in sys.modules and isinstance(layers[0][1], OwnLayer):
        warnings.warn(
            "fastlora: this model trains, and all adapters of its patched layers are frozen. Where get_peft_model was "
            "called after fastlora.patch, it has frozen them: call fastlora.unpatch(model) before get_peft_model",
            UserWarning,
            stacklevel=2,
        )
    model.__dict__[_BEFORE] = trained


def _after(model: nn.Module, args: Any, output: Any) -> None:
    before = model.__dict__.pop(_BEFORE, None) if not torch.compiler.is_compiling() else None
    if before is None or output is None:  # not a training forward, or an exception
        return
    forget(model)
    uncalled = [name for name, layer, calls in before if _calls(layer) == calls]
    heads = {id(output_head(module)) for module in model.modules()}
    if passed_by := [name for name, layer, _ in before if name in uncalled and id(layer) in heads]:
        raise RuntimeError(
            f"fastlora: the model's first training forward did not call its output head {passed_by[0]!r}, whose "
            "adapter would never be trained: something multiplies by the head's weight itself (a fused loss of Liger's "
            f"or TRL's). Turn that off, or leave {passed_by[0]!r} out of target_modules"
        )
    if uncalled:
        warnings.warn(
            f"fastlora: the model's first training forward did not call {len(uncalled)} of its {len(before)} patched "
            f"layers: {some(uncalled)}. Their adapters get no gradient from it. Something reads their weight itself (a "
            "fused loss or kernel: leave them out with exclude_modules), or they have been replaced since. Experts "
            "that got no token, and parts that this batch did not need, are no fault",
            UserWarning,
            stacklevel=2,
        )


def _runs(layer: Any) -> bool:
    known = isinstance(layer, (OwnLayer, FusedPeftLayer))
    disabled = known and (layer.disable_adapters or layer.merged_adapters)  # type: ignore[attr-defined]
    return known and not disabled and not set(layer.active_adapters).isdisjoint(layer.lora_A)  # type: ignore[attr-defined]


def _is_trained(layer: Any) -> bool:
    factors = [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
    return any(factor.requires_grad for factor in factors)


def _calls(layer: Any) -> int:
    return layer.calls.fused + layer.calls.base + sum(layer.calls.fallback.values())


def _compiled(model: nn.Module) -> set[int]:
    """The modules that run compiled, or may: there nothing is counted."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return set()
    here = torch._C._dynamo.eval_frame.get_eval_frame_callback()  # type: ignore[attr-defined]
    found: set[int] = set()
    for module in model.modules():
        forward = module.__dict__.get("forward", None)
        inside = module.__dict__.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules
        if here not in (None, False) or inside or hasattr(forward, "_torchdynamo_orig_callable"):
            found.update(id(part) for part in module.modules())
    return found
