"""The state of a PEFT model's adapter, where its parameters are sharded over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

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
