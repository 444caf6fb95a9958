"""The layers of a model that have an AdaLoRA adapter, fastlora's and PEFT's, and their factors."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..introspect import sharding, targets

FACTORS = {"q": "lora_A", "p": "lora_B", "e": "lora_E"}


def adalora_layers(model: nn.Module, adapter_name: str, caller: str, shards: bool = False) -> dict[str, Any]:
    """Layer by name, as in the model without DistributedDataParallel around it.

    Raises ValueError where there is none, or where parameters are sharded; with `shards`, but for factors that FSDP2
    has split by their rows.
    """
    inner = targets.unwrap(model, caller)
    wrapped = sharding.wrapper(model)
    layers = {
        name: layer
        for name, layer in targets.lora_layers(inner)
        if adapter_name in (layer._modules.get("lora_E") or ())
    }
    if not layers:
        found = sorted({name for _, layer in targets.lora_layers(inner) for name in layer._modules.get("lora_E") or ()})
        known = f"its AdaLoRA adapters are {found}" if found else "it has no AdaLoRA adapters"
        raise ValueError(
            f"{caller}: adapter_name: got {adapter_name!r}, and {known}; want one after "
            "fastlora.patch(model, use_adalora=True), or of PEFT's AdaLoraConfig"
        )
    factors = [factor for layer in layers.values() for factor in factors_of(layer, adapter_name)]
    if shards and all(sharding.by_rows(factor) for factor in factors if sharding.is_sharded(factor)):
        wrapped = None if sharding.has_shards(model) else wrapped
    for name, layer in layers.items():
        if any(hasattr(parameter, "ds_id") for parameter in factors_of(layer, adapter_name)):
            wrapped = f"parameters partitioned by ZeRO-3 ({name!r})"
    if wrapped not in (None, "DistributedDataParallel"):
        raise ValueError(
            f"{caller}: model: got {wrapped}, want one whose adapters are whole in every process "
            f"(DistributedDataParallel, or ZeRO-1 and 2){', or split by rows (fully_shard)' if shards else ''}"
        )
    return layers


def factors_of(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """(Q (r, in), P (out, r), Λ (r, 1)). From the dicts of the ParameterDicts, which takes a tenth of the time."""
    modules = layer._modules
    return tuple(modules[key]._parameters[adapter_name] for key in FACTORS.values())  # type: ignore[return-value]
