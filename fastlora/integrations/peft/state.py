"""The state of a PEFT model's adapter, where its parameters are sharded over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...introspect import sharding
from ...runtime.messages import some


def gathered_state(model: Any, adapter_name: str) -> dict[str, Any]:
    """The model's state, of which what PEFT saves of this adapter is whole; the base stays in its shards."""
    state = model.state_dict()
    saved = {id(value) for value in get_peft_model_state_dict(model, state, adapter_name).values()}
    return {key: sharding.whole(value) if id(value) in saved else value for key, value in state.items()}


def load_sharded(model: Any, root: Path, changes_base: bool, tensors: dict[str, Tensor], adapter_name: str) -> None:
    """Overwrites an adapter that is there: its tensors are laid out as the model's are, and the rest is PEFT's."""
    there = get_peft_model_state_dict(model, adapter_name=adapter_name)
    shapes = [{key: tuple(value.shape) for key, value in some_of.items()} for some_of in (tensors, there)]
    wrong = [key for key in {*tensors, *there} if shapes[0].get(key) != shapes[1].get(key)]
    if wrong or changes_base:
        why = f"keys or shapes differ: {some(wrong)}" if wrong else "it changes the base weights, which are sharded"
        raise ValueError(f"load_adapter: {str(root)!r} does not fit this PeftModel: {why}")
    set_peft_model_state_dict(
        model, {key: sharding.spread(value, there[key]) for key, value in tensors.items()}, adapter_name
    )


def load_injected(model: Any, config: dict[str, Any], tensors: dict[str, Tensor], adapter_name: str, root: str) -> None:
    """Into a model that has PEFT's layers and no PeftModel around them. A new adapter is inactive."""
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    configs: Any = getattr(model, "peft_config", {})
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
        keys = {*tensors, *there}
        wrong = [
            key for key in keys if key not in tensors or key not in there or tensors[key].shape != there[key].shape
        ]
        if wrong:
            raise ValueError(f"load_adapter: {root!r} does not fit this model: keys or shapes differ: {some(wrong)}")
        set_peft_model_state_dict(model, tensors, adapter_name)
    except BaseException:
        if new:
            _take_out(model, adapter_name, set(layers))
        raise
    finally:
        if new:
            for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
                layer.set_adapter(active.get(layer, running))
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def _take_out(model: nn.Module, adapter_name: str, layers: set[Any]) -> None:
    cast(Any, model).peft_config.pop(adapter_name)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if module in layers:
                module.delete_adapter(adapter_name)
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, cast(Any, module).get_base_layer())
