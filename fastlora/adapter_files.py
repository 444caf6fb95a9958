"""What is written for an adapter: PEFT's two files, from our layers or by PEFT itself. checkpoint.py decides where."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from . import peft_format, sharding
from .layers import FusedLoraLinear
from .targets import lora_layers


def contents(model: nn.Module, adapter_name: str) -> dict[str, bytes]:
    """The two files' contents."""
    modules = dict(modules_outside_adapters(model))
    layers = {name: m for name, m in modules.items() if isinstance(m, FusedLoraLinear) and adapter_name in m.lora_A}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_A, lora_B, r, _ = layer.as_plain_adapter(adapter_name)
        found: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "lora_A": (lora_A, (r, layer.in_features)),
            "lora_B": (lora_B, (layer.out_features, r)),
        }
        if layer.use_dora[adapter_name]:
            found["lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter_name], (layer.out_features,)
        for factor, (parameter, wanted) in found.items():
            tensor = sharding.whole(parameter.detach())
            if tuple(tensor.shape) != wanted or tensor.is_meta:
                raise ValueError(
                    f"save_adapter: model: {factor} of {name!r} is a {tuple(tensor.shape)} tensor on "
                    f"{tensor.device}, want {wanted}: gather sharded parameters before saving"
                )
            key = f"{peft_format.PREFIX}{name}{'.' if name else ''}{factor}{peft_format.FACTORS[factor][0]}"
            tensors[key] = tensor.cpu().contiguous()
    config = _config(model, modules, layers, adapter_name)
    return {
        peft_format.CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        peft_format.WEIGHTS_NAME: safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }


def most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _config(
    model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, FusedLoraLinear], adapter_name: str
) -> dict[str, Any]:
    use_rslora = most_common(layer.use_rslora[adapter_name] for layer in layers.values())
    kinds = {layer.use_dora[adapter_name] for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"save_adapter: adapter_name: {adapter_name!r} is DoRA in some layers and not in others, want one "
            "kind: the format holds one setting"
        )
    plain = {name: layer.as_plain_adapter(adapter_name) for name, layer in layers.items()}
    ranks = {name: r for name, (_, _, r, _) in plain.items()}
    alphas = {}
    for name, layer in layers.items():
        alpha = plain[name][3]
        if layer.use_rslora[adapter_name] != use_rslora:  # one flag for all: the same scale by another alpha
            alpha = alpha / math.sqrt(ranks[name]) if not use_rslora else alpha * math.sqrt(ranks[name])
            alpha = alpha * ranks[name] if not use_rslora else alpha / ranks[name]
        alphas[name] = alpha
    dropouts = {layer.lora_dropout[adapter_name] for layer in layers.values()}
    dropout = most_common(layer.lora_dropout[adapter_name] for layer in layers.values())
    if len(dropouts) > 1:
        warnings.warn(
            f"fastlora.save_adapter: adapter {adapter_name!r} has lora_dropout {sorted(dropouts)} in different layers, "
            f"and the format holds one number: {dropout} is saved",
            UserWarning,
            stacklevel=4,
        )
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": peft_format.target_modules(set(layers), set(modules)),
        "exclude_modules": None,
        "rank_pattern": {peft_format.pattern(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {peft_format.pattern(name): value for name, value in alphas.items() if value != alpha},
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
        "use_rslora": use_rslora,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": kinds.pop(),
        "lora_bias": False,
    }


def peft_contents(model: Any, adapter_name: str, root: Path) -> dict[str, bytes]:
    """What PEFT's own `save_pretrained` writes for one adapter (and its README.md), without touching the directory."""
    with tempfile.TemporaryDirectory() as folder:
        card = root / "README.md"
        if card.is_file():  # PEFT updates a model card that is there
            shutil.copy(card, folder)
        state = _gathered_state(model, adapter_name) if sharding.has_shards(model) else None
        model.save_pretrained(folder, selected_adapters=[adapter_name], state_dict=state)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in paths}


def _gathered_state(model: Any, adapter_name: str) -> dict[str, Any]:
    """The model's state, of which what PEFT saves of this adapter is whole; the base stays in its shards."""
    from peft import get_peft_model_state_dict  # the model brought it

    state = model.state_dict()
    saved = {id(value) for value in get_peft_model_state_dict(model, state, adapter_name).values()}
    return {key: sharding.whole(value) if id(value) in saved else value for key, value in state.items()}


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, but for what a LoRA layer holds inside."""
    inside: set[int] = set()
    for _, layer in lora_layers(model):
        inside.update(id(module) for module in layer.modules() if module is not layer)
    for name, module in model.named_modules():
        if id(module) not in inside:
            yield name, module
