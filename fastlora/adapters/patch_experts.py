"""`target_parameters`: which weights of experts `patch` adapts, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..introspect.names import as_integer, from_pattern
from ..introspect.targets import Selection, target_parameters, why_not_experts
from ..layers.experts import LORA, ExpertWeight, check_start
from .report import ModuleReport

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk", "moe_k")


def check(targets: Sequence[str] | None, rank_per_token: bool, settings: dict, init: bool | str) -> None:
    """Raises ValueError for what no expert weight can have."""
    if not isinstance(rank_per_token, bool):
        raise ValueError(f"patch: rank_per_token: got {rank_per_token!r}, want True or False")
    for key in ("use_dora", "use_adalora") if targets is not None else ():
        if settings[key]:
            raise ValueError(
                f"patch: {key}: got True with target_parameters, and experts have neither DoRA nor AdaLoRA; patch the "
                "linear layers and the experts under two adapter names"
            )
    if targets is not None:
        check_start(init, "patch")


def find(
    model: nn.Module, targets: Sequence[str] | None, selection: Selection, backend: str
) -> tuple[dict[str, ExpertWeight], list[ModuleReport]]:
    """By name the layers of the weights that are asked for, those that there are already and new ones that are not in
    the model yet; and a line for each that is left alone."""
    found, left = {}, []
    for name, module, key in target_parameters(model, targets):
        excluded = selection.excludes(name)
        if (why_not := "in exclude_modules" if excluded else why_not_experts(module, key)) is not None:
            left.append(ModuleReport(name, "Parameter", False, why_not, not excluded))
        else:
            there: Any = module._modules.get(f"{LORA}{key}")
            found[name] = ExpertWeight(module, key, backend) if there is None else there
    return found, left


def settings_of(
    name: str, layer: ExpertWeight, settings: dict, rank_per_token: bool, ranks: Any, alphas: Any
) -> dict[str, Any]:
    """An expert weight's settings: with `rank_per_token` r ÷ top-k at the same scale, where no pattern names it.
    Raises ValueError for a rank above a side."""
    r, alpha = from_pattern(ranks, name, None), from_pattern(alphas, name, settings["lora_alpha"])
    if r is None:
        r = settings["r"]
        if rank_per_token:
            own = max(1, r // _top_k(name, layer.experts))
            alpha = alpha * (own / r) ** (0.5 if settings["use_rslora"] else 1)
            r = own
    most = min(layer.in_features, layer.out_features)
    if r > most:
        raise ValueError(
            f"patch: r: got {r} for {name!r}, want at most {most}, the smaller side of an expert's weight "
            f"{layer.out_features}×{layer.in_features} (rank_pattern gives it a rank of its own)"
        )
    return settings | {"r": r, "lora_alpha": as_integer(alpha)}


def _top_k(name: str, experts: Any) -> int:
    config = getattr(experts, "config", None)
    for key in _TOP_K:
        if isinstance(value := getattr(config, key, None), int) and value > 0:
            return value
    raise ValueError(
        f"patch: rank_per_token: the configuration of {name!r} does not say how many experts a token meets; want "
        "rank_pattern instead"
    )
