"""AdaLoRA's ranks in PEFT's models: what `AdaLoraConfig.rank_pattern` says, so that files hold what the model does.

When PEFT loads, it makes `init_r` ranks in a layer and cuts them to those of its pattern; when it saves, it takes the
pattern's out of every layer that has another number of ranks, which must be `init_r` then, whatever their λ is. Here
the pattern says only what has been cut off. What an allocator has masked is noted in another attribute, which PEFT
writes to no file: training may go on without the allocator. `as_saved` looks at λ.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ...introspect import sharding
from ...introspect.names import named_modules
from ...layers.schedule import composed, with_nonzero

_MASKED = "fastlora_masked"  # of a configuration: by layer, which of its ranks are not masked


def mask(model: nn.Module, adapter_name: str, kept: Mapping[nn.Module, Sequence[bool]]) -> None:
    """Notes which of their ranks an allocator has left to layers; without a layer, that there are no masks yet."""
    for tuner in _tuners(model, adapter_name):
        config, layers = tuner.peft_config[adapter_name], _layers(tuner, adapter_name)
        patterns = _patterns(config)
        _write(config, adapter_name, {n: _there(config, patterns.get(n), m.r[adapter_name]) for n, m in layers.items()})
        setattr(config, _MASKED, {name: list(kept[layer]) for name, layer in layers.items() if layer in kept})


def cut(model: nn.Module, adapter_name: str, kept: Mapping[nn.Module, Sequence[bool]]) -> None:
    """Notes that layers are about to lose the ranks that are not kept."""
    for tuner in _tuners(model, adapter_name):
        config, layers = tuner.peft_config[adapter_name], _layers(tuner, adapter_name)
        patterns = _patterns(config)
        for name, layer in layers.items():
            there = _there(config, patterns.get(name), layer.r[adapter_name])
            if layer in kept:
                patterns[name] = composed(there, kept[layer])
                getattr(config, _MASKED, {}).pop(name, None)
            else:
                patterns.setdefault(name, there)
        _write(config, adapter_name, patterns)


@contextlib.contextmanager
def as_saved(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Within it the pattern leaves masked ranks out too, but for those whose λ is not zero. For sharded adapters all
    processes call this."""
    configs = [tuner.peft_config[adapter_name] for tuner in _tuners(model, adapter_name)]
    before = [config.rank_pattern for config in configs]
    try:
        for tuner, config in zip(_tuners(model, adapter_name), configs, strict=True):
            patterns = _patterns(config)
            masked = getattr(config, _MASKED, {})
            for name, layer in _layers(tuner, adapter_name).items():
                kept, values = masked.get(name, patterns.get(name)), layer.lora_E[adapter_name]
                r = layer.r[adapter_name]
                if kept is not None and len(kept) == config.init_r == r == values.numel() and not values.is_meta:
                    patterns[name] = with_nonzero(kept, sharding.whole(values.detach()))
            _write(config, adapter_name, patterns)
        yield
    finally:
        for config, pattern in zip(configs, before, strict=True):
            config.rank_pattern = pattern


def _tuners(model: nn.Module, adapter_name: str) -> list[Any]:
    """The `AdaLoraModel`s in a model that have this adapter."""
    peft: Any = sys.modules.get("peft.tuners.adalora.model")
    tuners: list[Any] = [m for m in model.modules() if peft is not None and isinstance(m, peft.AdaLoraModel)]
    return [tuner for tuner in tuners if adapter_name in tuner.peft_config]


def _layers(tuner: Any, adapter_name: str) -> dict[str, Any]:
    """By the names that the pattern has for them."""
    layers: dict[str, Any] = dict(named_modules(tuner.model))
    return {name: m for name, m in layers.items() if adapter_name in (m._modules.get("lora_E") or ())}


def _patterns(config: Any) -> dict[str, list[bool]]:
    """By layer. In a model the keys are of lora_E and the adapter, in a file, and after saving, of lora_E only."""
    pattern = config.rank_pattern or {}
    return {key.rpartition(".lora_E")[0]: [bool(keep) for keep in kept] for key, kept in pattern.items()}


def _write(config: Any, adapter_name: str, patterns: dict[str, list[bool]]) -> None:
    whole = all(all(kept) for kept in patterns.values())
    pattern = {f"{name}.lora_E.{adapter_name}": kept for name, kept in patterns.items()}
    config.rank_pattern = None if whole else pattern


def _there(config: Any, pattern: list[bool] | None, r: int) -> list[bool]:
    """Which of `init_r` ranks a layer that has r still has. Where nothing says so the first: only their number counts
    for what a file's tensors mean."""
    if pattern is not None and len(pattern) == config.init_r and sum(pattern) == r:
        return pattern
    return [i < r for i in range(config.init_r)]
