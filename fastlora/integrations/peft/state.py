"""Adapters that go in and out of PEFT's models, by PEFT's own code, all or nothing."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...introspect import sharding, targets
from ...runtime.messages import some


def gathered_state(model: Any, adapter_name: str) -> dict[str, Any]:
    """The model's state, of which what PEFT saves of this adapter is whole; the base stays in its shards."""
    state = model.state_dict()
    saved = {id(value) for value in get_peft_model_state_dict(model, state, adapter_name).values()}
    return {key: sharding.whole(value) if id(value) in saved else value for key, value in state.items()}


def load(
    model: Any, root: Path, config: dict[str, Any], tensors: dict[str, Tensor], adapter_name: str, changes_base: bool
) -> None:
    """Puts what was read from `root` into a PeftModel, sharded or not, or into a model that has PEFT's layers and no
    PeftModel around them. `changes_base`: making the adapter changes the base weights."""
    if not isinstance(model, PeftModel):
        _load_injected(model, root, config, tensors, adapter_name)
    elif sharding.has_shards(model):
        _load_sharded(model, root, changes_base, tensors, adapter_name)
    else:
        _load(model, root, adapter_name, changes_base)


def _load(model: Any, root: Path, adapter_name: str, changes_base: bool) -> None:
    """PEFT's own `load_adapter`. It adds first and checks later: where the file does not fit, it is all taken back, the
    base weights too where PEFT changes them (they are kept on the host meanwhile)."""
    bases = [module for module in model.modules() if isinstance(module, nn.Linear) or targets.is_conv1d(module)]
    weights = [(b.weight, b.weight.detach().to("cpu", copy=True)) for b in bases] if changes_base else []
    existed = adapter_name in model.peft_config
    marker = f".{adapter_name}."
    before = {k: v.detach().clone() for k, v in model.state_dict().items() if marker in k} if existed else {}
    modules_before = set(model.modules())
    try:
        with _readable(root) as place:
            result = model.load_adapter(place, adapter_name)
        if wrong := [*result.missing_keys, *result.unexpected_keys]:
            raise ValueError(f"keys missing or unexpected: {some(wrong)}")
    except BaseException as error:
        if existed:
            model.load_state_dict(before, strict=False)
        elif adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        with torch.no_grad():
            for weight, bits in weights:
                weight.copy_(bits)
        _unwrap_new_layers(model, modules_before)
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise ValueError(f"load_adapter: {str(root)!r} does not fit this PeftModel: {error}") from error


@contextlib.contextmanager
def _readable(root: Path) -> Iterator[str]:
    """The directory's name, or that of a copy where it is not UTF-8, which safetensors wants to read a file."""
    try:
        str(root).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            for path in root.glob("adapter_*"):
                shutil.copy(path, folder)
            yield folder
        return
    yield str(root)


def _unwrap_new_layers(model: nn.Module, before: set[nn.Module]) -> None:
    """Puts what was in the model before back in the place of the layers that PEFT has put around it."""
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if module not in before and base in before:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base)


def _load_sharded(model: Any, root: Path, changes_base: bool, tensors: dict[str, Tensor], adapter_name: str) -> None:
    """Overwrites an adapter that is there: its tensors are laid out as the model's are, and the rest is PEFT's."""
    there = get_peft_model_state_dict(model, adapter_name=adapter_name)
    _check_keys(root, tensors, there)
    if changes_base:
        raise ValueError(f"load_adapter: {str(root)!r} changes the base weights, which are sharded in this PeftModel")
    set_peft_model_state_dict(
        model, {key: sharding.spread(value, there[key]) for key, value in tensors.items()}, adapter_name
    )


def _check_keys(root: Path, tensors: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    shapes = [{key: value.shape for key, value in state.items()} for state in (tensors, there)]
    if wrong := {key for key, _ in shapes[0].items() ^ shapes[1].items()}:
        raise ValueError(f"load_adapter: {str(root)!r} does not fit this model: keys or shapes differ: {some(wrong)}")


def _load_injected(
    model: Any, root: Path, config: dict[str, Any], tensors: dict[str, Tensor], adapter_name: str
) -> None:
    """A new adapter is inactive."""
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    configs: Any = getattr(model, "peft_config", {})
    modules_before = set(model.modules())
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = {layer: list(layer.active_adapters) for layer in layers}
    running = next(iter(active.values()))
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    new = adapter_name not in configs
    if new:
        settings = PeftConfig.from_peft_type(**config)
        settings.inference_mode = False
        inject_adapter_in_model(settings, model, adapter_name)
    try:
        there = get_peft_model_state_dict(model, adapter_name=adapter_name)
        _check_keys(root, tensors, there)
        set_peft_model_state_dict(model, tensors, adapter_name)
    except BaseException:
        if new:
            model.peft_config.pop(adapter_name)
            for layer in layers:
                layer.delete_adapter(adapter_name)
            _unwrap_new_layers(model, modules_before)
        raise
    finally:
        if new:
            for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
                layer.set_adapter(active.get(layer, running))
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
