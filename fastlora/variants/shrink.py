"""`shrink_to_ranks`: AdaLoRA's layers cut to the triplets that are left, once that is final."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.peft import ranks as peft_ranks
from ..layers.linear import FusedLoraLinear
from ..layers.schedule import Allocation
from ..optim import moments
from .adalora import RankAllocator
from .factors import FACTORS, adalora_layers, factors_of

_WHERE = "shrink_to_ranks"
_RANK_DIMS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


def shrink_to_ranks(
    model: nn.Module,
    pattern: RankAllocator | Mapping[str, Sequence[bool]],
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str = "default",
) -> dict[str, int]:
    """Cuts every layer's P, Λ and Q to the triplets that are kept. The model computes what it did before, to rounding
    of sums of fewer terms, for the cost of the ranks that are left; every scale stays.

    A layer that keeps none loses its adapter and costs what the frozen layer costs; PEFT's keep one of rank 0, as PEFT
    makes them. Parameters are new objects and have no gradients: call this between `zero_grad()` and the next forward,
    and wrap the model in DistributedDataParallel afterwards. The allocator goes on counting steps, and does no more.

    Args:
        model: patched with `use_adalora=True`, or with PEFT's AdaLoRA layers.
        pattern: a `RankAllocator` of this model, after step `total_steps - t_final`; or for each layer, by name, which
            of its ranks are kept, as `RankAllocator.rank_pattern`. Layers that are not in it stay as they are.
        optimizer: what trains the model. It gets the new parameters in place of the old, and their states cut likewise
            (torch's SGD, Adam, AdamW, NAdam, RAdam; another's are reset, which a warning says).
        adapter_name: which adapter, where `pattern` is no allocator.

    Returns:
        The rank of each layer.

    Raises:
        ValueError: a pattern that is not final, of other layers or of other ranks; λ that are to go and are not zero;
            merged adapters; parameters sharded over processes; an optimiser that trains none of them. Nothing is
            changed then.

    Examples:
        >>> if allocator.is_final:
        ...     fastlora.variants.shrink_to_ranks(model, allocator, optimizer)
    """
    allocator = pattern if isinstance(pattern, RankAllocator) else None
    if allocator is not None:
        adapter_name = allocator.adapter_name
        if not allocator.is_final:
            raise ValueError(
                f"{_WHERE}: pattern: the allocator is at step {allocator.steps}, want it after step "
                f"{allocator.schedule.last}, when the pattern is final"
            )
        pattern = allocator.rank_pattern
    assert not isinstance(pattern, RankAllocator)
    layers = adalora_layers(model, adapter_name, _WHERE)
    kept = {name: [bool(keep) for keep in keeps] for name, keeps in pattern.items()}
    _check(layers, kept, adapter_name)
    if optimizer is not None:
        factors = [factor for name in kept for factor in factors_of(layers[name], adapter_name)]
        moments.check_optimizer(optimizer, factors, _WHERE)
        optimizer = moments.unwrapped(optimizer)
    peft_ranks.cut(model, adapter_name, {layers[name]: keeps for name, keeps in kept.items()})
    with torch.inference_mode(False), torch.no_grad():  # a parameter made in inference mode could never be trained
        for name, keeps in kept.items():
            _cut_layer(layers[name], adapter_name, keeps, optimizer)
    if allocator is not None:
        allocator.was_cut()
    return {name: sum(kept[name]) if name in kept else layer.r[adapter_name] for name, layer in layers.items()}


def _check(layers: dict[str, Any], kept: dict[str, list[bool]], adapter_name: str) -> None:
    unknown = [name for name in kept if name not in layers]
    if unknown:
        raise ValueError(
            f"{_WHERE}: pattern: got {unknown[0]!r} and {len(unknown) - 1} other names that are no layers with an "
            f"AdaLoRA adapter {adapter_name!r}; these are {', '.join(list(layers)[:5])}, ..."
        )
    leaving = []
    for name, keeps in kept.items():
        e = factors_of(layers[name], adapter_name)[2]
        if len(keeps) != e.numel():
            raise ValueError(f"{_WHERE}: pattern: got {len(keeps)} ranks for {name!r}, which has {e.numel()}")
        if layers[name].merged_adapters:
            raise ValueError(f"{_WHERE}: model: adapters are merged into {name!r}; call fastlora.unmerge(model) first")
        leaving.append(e.detach().flatten()[[i for i, keep in enumerate(keeps) if not keep]].any())
    for name, nonzero in zip(kept, torch.stack([flag.cpu() for flag in leaving]).tolist() if leaving else ()):
        if nonzero:
            raise ValueError(
                f"{_WHERE}: pattern: some ranks of {name!r} that are to go have singular values that are not zero; "
                "want this after the allocator's step (or set them to zero, which changes the model)"
            )


def _cut_layer(layer: Any, adapter_name: str, keeps: list[bool], optimizer: Any) -> None:
    rank = sum(keeps)
    ours = isinstance(layer, FusedLoraLinear)
    index = torch.tensor([i for i, keep in enumerate(keeps) if keep], dtype=torch.int64)
    old = dict(zip(FACTORS.values(), factors_of(layer, adapter_name), strict=True))
    if ours and rank == 0:
        layer.delete_adapter(adapter_name)
        for parameter in old.values():
            _replace(optimizer, parameter, None, None, 0)
        return
    for key, parameter in old.items():
        where = index.to(parameter.device)
        values = parameter.detach().index_select(_RANK_DIMS[key], where)
        new = nn.Parameter(values, requires_grad=parameter.requires_grad)
        layer._modules[key][adapter_name] = new
        _replace(optimizer, parameter, new, where, _RANK_DIMS[key])
    if ours:
        layer.lora_alpha[adapter_name] = layer.alpha_at(adapter_name, rank)
        before = layer.allocation.get(adapter_name, Allocation())
        layer.allocation[adapter_name] = Allocation(before.schedule, tuple(keeps))
    layer.r[adapter_name] = rank  # PEFT's scale is alpha over `ranknum`, which stays


def _replace(optimizer: Any, old: nn.Parameter, new: nn.Parameter | None, index: Tensor | None, dim: int) -> None:
    """Puts a parameter in another's place, with its state cut likewise; None takes it out."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        if new is None and "param_names" in group:
            named = zip(group["param_names"], group["params"], strict=True)
            group["param_names"] = [name for name, p in named if p is not old]
        group["params"] = [new if p is old else p for p in group["params"] if new is not None or p is not old]
    state = optimizer.state.pop(old, None)
    if not state or new is None:
        return
    if not moments.is_known(optimizer, state):
        warnings.warn(
            f"fastlora: how a {type(optimizer).__name__} keeps its state is not known here, so the cut factors' states "
            "are reset",
            UserWarning,
            stacklevel=4,
        )
        return
    optimizer.state[new] = {
        key: value.index_select(dim, index.to(value.device))
        if isinstance(value, Tensor) and value.shape == old.shape and index is not None
        else value
        for key, value in state.items()
    }
