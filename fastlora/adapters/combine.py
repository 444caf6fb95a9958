"""New adapters out of others: weighted sums of their deltas, exact, or the best of a given rank.

    ΔW = Σ wᵢ·sᵢ·Bᵢ Aᵢ = B̂ Â     Â = [A₁; A₂; …] (R, in), B̂ = [w₁s₁B₁, w₂s₂B₂, …] (out, R), R = Σ rᵢ

That is an adapter of rank R already. For a lower one: B̂ = Q_B R_B, Âᵀ = Q_A R_A, and the SVD of the R×R core R_B R_Aᵀ
is that of ΔW, whose leading r triplets are the best adapter of rank r (Eckart and Young). Nothing of W0's size is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..introspect import sharding
from ..layers.checks import check_adapter_arguments
from ..layers.experts import ExpertWeight, as_stored, by_expert
from ..layers.state import AdapterState
from ..linalg.lowrank import balanced
from ..runtime import progress
from ..runtime.checks import is_number
from .switch import require_layers


class Combined(NamedTuple):
    """What became of one layer: the new adapter's rank, and which share of ‖ΔW‖_F² it holds (1 where it is exact)."""

    r: int
    captured: float


def add_weighted_adapter(
    model: nn.Module, weights: Mapping[str, float], adapter_name: str, r: int | None = None
) -> dict[str, Combined]:
    """Adds an adapter whose delta is the weighted sum of others': tasks mixed, added, or taken away with a negative
    weight. The others stay as they are, and the new one is inactive until `set_adapter`.

    Args:
        model: patched, with fastlora's own layers. (PEFT's models have `add_weighted_adapter` of their own.)
        weights: adapter -> weight. A layer takes those that it has; one with none of them stays without the new one.
        adapter_name: the new adapter's name.
        r: its rank in every layer: the best approximation of the sum, by a truncated SVD. None: the sum itself, of
            the ranks' sum. Never more than that sum, nor than the layer's smaller side.

    Returns:
        Per layer the new adapter's rank and the captured share of ‖ΔW‖_F².

    Scales are those in force now (`scaling`), rsLoRA's too; the new adapter's own is 1 (lora_alpha = r). LoRA-GA's
    exact starts and AdaLoRA's adapters go in as the plain adapters that they are.

    Raises:
        ValueError: an unknown name, a name that is taken, no weights or one that is not finite, r < 1; DoRA's
            adapters, whose delta is no product; adapters merged, parameters sharded, or a weight that one of the
            adapters has shifted ("pissa", "olora", base="offset"); PEFT's layers. The model is then as it was.

    Examples:
        >>> fastlora.add_weighted_adapter(model, {"french": 0.5, "polite": 0.5}, "french-polite", r=16)
        >>> fastlora.set_adapter(model, "french-polite")
    """
    caller = "add_weighted_adapter"
    layers = require_layers(model, caller)
    _check(model, layers, weights, adapter_name, r)
    done: dict[str, Combined] = {}
    added: list[AdapterState] = []
    try:
        for name, layer in progress.bar(layers, "combine adapters", len(layers)):
            mine = {adapter: weight for adapter, weight in weights.items() if adapter in layer.r}
            if not mine:
                continue
            a, b = _stacked(layer, mine)
            total = a.shape[-2]
            rank = total if r is None else min(r, total, layer.in_features, layer.out_features)
            captured = 1.0
            if rank < total:
                a, b, captured = truncated(a, b, rank)
            added.append(layer)
            dtype = layer.lora_A[next(iter(mine))].dtype
            layer.add_adapter(adapter_name, rank, lora_alpha=rank, dtype=dtype)
            a, b = as_stored(a, b) if a.dim() == 3 else (a, b)
            with torch.no_grad():
                layer.lora_A[adapter_name].copy_(a)
                layer.lora_B[adapter_name].copy_(b)
            done[name] = Combined(rank, captured)
    except BaseException:
        for layer in added:
            layer._forget_adapter(adapter_name)
        raise
    return done


def truncated(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """(A (r, in), B (out, r), captured share) of the best approximation of b a of rank r, for a (R, in) and b (out, R),
    by the SVD of the R×R core in float64; the singular values' roots go to either side. Experts' (E, R, in) and
    (E, out, R) one by one."""
    if a.dim() == 3:
        new_a, new_b, sigma = map(torch.stack, zip(*(balanced(*pair, r) for pair in zip(a, b)), strict=True))
    else:
        new_a, new_b, sigma = balanced(a, b, r)
    energy = sigma.square()
    return new_a, new_b, float(energy[..., :r].sum() / energy.sum()) if bool(energy.any()) else 1.0


def _stacked(layer: AdapterState, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """(Â (R, in), B̂ (out, R)) of the sum, in the adapters' own precision or float32; of each expert where there are."""
    downs, ups = [], []
    for name, weight in weights.items():
        a, b, *_ = layer.as_plain_adapter(name)
        if isinstance(layer, ExpertWeight):
            a, b = by_expert(a, b, layer.num_experts)
        wide = torch.promote_types(a.dtype, torch.float32)
        downs.append(a.detach().to(wide))
        ups.append(b.detach().to(wide) * (weight * layer.scaling[name]))
    return torch.cat(downs, dim=-2), torch.cat(ups, dim=-1)


def _check(
    model: nn.Module, layers: list[tuple[str, Any]], weights: Mapping[str, float], adapter_name: str, r: int | None
) -> None:
    where = "add_weighted_adapter"
    check_adapter_arguments(adapter_name, 1 if r is None else r, 1.0, 0.0, caller=where)
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{where}: weights: got {weights!r}, want a dict of adapter names and weights")
    known = set().union(*(layer.r for _, layer in layers))
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"{where}: weights: got {name!r}, want some of {sorted(known)}")
        if not is_number(weight) or not math.isfinite(weight):
            raise ValueError(f"{where}: weights: got {weight!r} for {name!r}, want a finite number")
    if adapter_name in known:
        raise ValueError(f"{where}: adapter_name: {adapter_name!r} is taken; this model has {sorted(known)}")
    if sharding.has_shards(model):
        raise ValueError(f"{where}: model: its parameters are sharded over processes, want this {sharding.BEFORE}")
    for name, layer in layers:
        if not isinstance(layer, AdapterState):
            raise ValueError(
                f"{where}: model: {name!r} is PEFT's layer, want a model patched without PEFT; the PeftModel has "
                "add_weighted_adapter itself"
            )
        if layer.merged_adapters:
            raise ValueError(
                f"{where}: adapters {layer.merged_adapters} are merged into {name!r}; call fastlora.unmerge(model) "
                "first"
            )
        magnitudes = [adapter for adapter in weights if adapter in layer.lora_magnitude_vector]
        if magnitudes:
            raise ValueError(
                f"{where}: weights: {magnitudes[0]!r} is DoRA, whose delta is no product of two factors; want LoRA"
            )
        if layer.shifted_by is not None:
            raise ValueError(
                f"{where}: model: adapter {layer.shifted_by!r} has shifted the weight of {name!r}, on which another "
                "would not be right; save it, and load it into a fresh model as the plain adapter that it is saved as"
            )
