"""GaLore's parameter groups: which weights of a model are projected, and what a group's values may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...introspect import sharding, targets
from ...runtime.checks import check_integer, check_module
from ..lora_plus import undecayed
from .adam import ARITHMETICS, BITS, MAXIMA, bitsandbytes
from .projector import PROJ_TYPES, REFRESHES

_WHERE = "fastlora.optim.galore_param_groups"
GRADIENTS = ("plain", "hook", "factored")
MOMENTS = ("rotate_first", "rotate", "keep")
_CHOICES = {
    "proj_type": PROJ_TYPES,
    "refresh": REFRESHES,
    "moments": MOMENTS,
    "arithmetic": ARITHMETICS,
    "optim_bits": BITS,
}


def galore_param_groups(
    model: nn.Module,
    rank: int = 128,
    *,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `GaLoreAdamW`: the trainable weights of linear layers, projected, and all other trainable
    parameters.

    The groups, of which those without parameters are left out, have a `name`:

    | name | holds | |
    |---|---|---|
    | `galore` | weights (n, m) of linear layers whose shorter side is longer than `rank` | projected |
    | `other` | embeddings, heads, smaller weights | AdamW |
    | `other_no_decay` | biases, the parameters of norms, any other of at most one dimension | AdamW, no decay |

    Args:
        model: with the parameters to train; frozen ones are left out. Not one with LoRA layers, nor one inside
            DistributedDataParallel; `fully_shard` comes first.
        rank: r, the columns of a basis.
        update_proj_gap: T, the steps from one refresh of a basis to the next.
        scale: α, by which the projected weights' steps are multiplied.
        proj_type: "std" projects the shorter side, "reverse_std" the longer one, "left" the columns of G (PᵀG), "right"
            its rows (GQ), "full" both (PᵀGQ).
        target_modules, exclude_modules: as in `fastlora.patch`. "all-linear" leaves the output head alone.
        weight_decay: of the decaying groups; None leaves it to the optimiser's own argument.

    Returns:
        A list of dictionaries, for `GaLoreAdamW`, or the official optimisers.

    Raises:
        ValueError: a value out of range; a name that no module has; nothing is trainable, or nothing is left to
            project; LoRA layers, a wrapped model.

    Examples:
        ```python
        groups = fastlora.optim.galore_param_groups(model, rank=128, scale=0.25)
        optimizer = fastlora.optim.GaLoreAdamW(groups, lr=1e-3)
        ```

    Source: Zhao et al. 2024, GaLore, arXiv 2403.03507.
    """
    settings = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    _check_values(settings | ({} if weight_decay is None else {"weight_decay": weight_decay}), _WHERE)
    _check_model(model)
    decay = {} if weight_decay is None else {"weight_decay": float(weight_decay)}
    groups: dict[str, dict[str, Any]] = {
        "galore": {"name": "galore", "params": [], **settings, **decay},
        "other": {"name": "other", "params": [], **decay},
        "other_no_decay": {"name": "other_no_decay", "params": [], "weight_decay": 0.0},
    }
    projected, no_decay = _projected(model, rank, target_modules, exclude_modules), undecayed(model)
    for parameter in model.parameters():  # a tied one comes once
        if parameter.requires_grad:
            rest = "other_no_decay" if parameter in no_decay else "other"
            groups["galore" if parameter in projected else rest]["params"].append(parameter)
    if not groups["galore"]["params"]:
        trainable = sum(parameter.requires_grad for parameter in model.parameters())
        raise ValueError(
            f"{_WHERE}: model: got one with {trainable} trainable parameters, want some that are weights of linear "
            f"layers among target_modules={target_modules!r}, with both sides longer than rank={rank}"
        )
    return [group for group in groups.values() if group["params"]]


def _check_model(model: nn.Module) -> None:
    check_module(_WHERE, model)
    if any(True for _ in targets.lora_layers(model)):
        raise ValueError(
            f"{_WHERE}: model: got one with LoRA layers, want a plain one, whose weights train as a whole "
            "(fastlora.unpatch, or PEFT's merge_and_unload, first)"
        )
    wrapped = sharding.wrapper(model)
    if sharding.has_shards(model):
        sharding.reshard(model)
    elif wrapped is not None:
        raise ValueError(
            f"{_WHERE}: model: got one in {wrapped}, want the plain model, which DistributedDataParallel wraps after "
            "the optimiser is made, or one that fully_shard has sharded"
        )


def _projected(
    model: nn.Module, rank: int, target_modules: str | Sequence[str], exclude_modules: str | Sequence[str] | None
) -> set[nn.Parameter]:
    selection = targets.Selection(model, target_modules, exclude_modules, caller="galore_param_groups")
    found = set()
    for name, module in targets.candidates(model, selection):
        weight = module._parameters.get("weight")  # None where it is computed (weight_norm)
        linear = isinstance(module, nn.Linear) or targets.is_conv1d(module)
        if selection.why_not(name, module) is None and linear and weight is not None and min(weight.shape) > rank:
            found.add(weight)
    if selection.unused and not selection.all_linear:
        names = ", ".join(map(repr, sorted(selection.unused)))
        raise ValueError(f"{_WHERE}: target_modules: no module is called {names}")
    return found


# What a group may say.
def check_group(group: dict[str, Any], gradients: str, reduced: bool) -> None:
    """Raises ValueError for a group that `GaLoreAdamW` cannot take with these gradients, or where it adds them up over
    processes."""
    where = "GaLoreAdamW"
    _check_values(group, where)
    if group["optim_bits"] == 8:
        if any(map(sharding.is_sharded, group["params"])):
            raise ValueError(
                f"{where}: optim_bits: got 8 for parameters sharded over processes, want 32: a block of 256 entries "
                "would lie in two processes, and change with their number"
            )
        bitsandbytes()
    if group.get("rank") is None:
        return
    for parameter in group["params"]:
        _check_projected(parameter, group["rank"])
        if sharding.is_sharded(parameter):
            _check_sharded(parameter, group["refresh"], gradients, reduced)
    if gradients == "factored" and group["refresh"] == "svd":
        raise ValueError(
            f"{where}: refresh: got 'svd' with gradients='factored', where no gradient is ever whole; want 'streamed' "
            "or 'subspace'"
        )
    if reduced and group["refresh"] == "svd":
        raise ValueError(
            f"{where}.reduce_across_ranks: refresh: got 'svd', which needs the whole gradient of all processes; want "
            "'subspace' or 'streamed', or leave the reduction to DistributedDataParallel"
        )
    if reduced and gradients != "plain" and group["refresh"] != "streamed":
        raise ValueError(
            f"{where}.reduce_across_ranks: refresh: got {group['refresh']!r} with gradients={gradients!r}, want "
            "'streamed': the others would have to add up over the processes in the middle of a backward pass"
        )


def check_saved(
    saved: Sequence[Mapping[str, Any]],
    states: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    gradients: str,
    reduced: bool,
) -> None:
    """Raises ValueError where these groups of a `state_dict` cannot take the place of an optimiser's own."""
    for theirs, ours in zip(saved, groups):
        if gradients != "plain" and bool(theirs.get("rank")) != bool(ours.get("rank")):
            raise ValueError(
                f"GaLoreAdamW.load_state_dict: rank: got {theirs.get('rank')} for a group that has "
                f"{ours.get('rank')}, want the same groups projected with gradients={gradients!r}"
            )
        group = {**defaults, **theirs, "params": ours["params"]}
        check_group(group, gradients, reduced)
        for number, parameter in zip(theirs["params"], ours["params"]):
            if state := states.get(number):
                _check_state(number, parameter, state, group)


def _check_state(number: int, parameter: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raises ValueError for one parameter's state that another optimiser made, or that is not all there."""
    where = f"GaLoreAdamW.load_state_dict: state_dict: the state of parameter {number} {tuple(parameter.shape)}"
    rank, begun = group.get("rank"), not isinstance(state.get("step"), int) or state["step"] > 0
    wanted = ["step", *(("exp_avg", "exp_avg_sq") if begun else ())]
    if rank:
        wanted += ["basis", "bases", "refresh_at", "halves", "window"]
        wanted += ["basis_right"] if group.get("proj_type") == "full" else []
    wanted += [key + MAXIMA for key in ("exp_avg", "exp_avg_sq") if key in state and state[key].dtype == torch.uint8]
    missing = [key for key in wanted if key not in state]
    if missing:
        kind = f"a group with rank={rank}" if rank else "a group without a rank"
        raise ValueError(f"{where} has {', '.join(sorted(state))} and lacks {', '.join(missing)}, want that of {kind}")
    if not isinstance(state["step"], int):
        raise ValueError(
            f"{where}: step: got a {type(state['step']).__name__}, as of another optimiser, want an integer"
        )
    for key in ("exp_avg", "exp_avg_sq"):
        moment = state.get(key)
        if (
            not rank
            and moment is not None
            and moment.dtype != torch.uint8
            and moment.shape[: parameter.dim()] != parameter.shape
        ):
            raise ValueError(f"{where}: {key}: got shape {tuple(moment.shape)}, want the parameter's")


def _check_sharded(parameter: Any, refresh: str, gradients: str, reduced: bool) -> None:
    """Raises ValueError for what cannot be done with a weight whose rows are spread over processes."""
    kind, where = "for weights that fully_shard has sharded", "GaLoreAdamW"
    if not sharding.by_rows(parameter):
        raise ValueError(
            f"{where}: params: got a DTensor of placements {tuple(parameter.placements)} in a group with a rank, want "
            "one sharded by its rows over one dimension of processes, as fully_shard does by default"
        )
    if gradients != "plain":
        raise ValueError(
            f"{where}: gradients: got {gradients!r} {kind}, want 'plain': fully_shard takes and spreads the gradients "
            "itself, and leaves a process its rows alone"
        )
    if refresh != "subspace":
        why = {"svd": "svd needs the whole gradient", "streamed": "its sums over several steps are in no checkpoint"}
        raise ValueError(f"{where}: refresh: got {refresh!r} {kind}, want 'subspace': {why[refresh]}")
    if reduced:
        raise ValueError(f"{where}.reduce_across_ranks: params: got weights that fully_shard reduces, want no call")


def _check_projected(parameter: torch.Tensor, rank: int) -> None:
    if parameter.dim() != 2 or not parameter.is_floating_point():
        raise ValueError(
            f"GaLoreAdamW: params: got {parameter.dtype} of shape {tuple(parameter.shape)} in a group with a rank, "
            "want floating-point matrices (n, m); others belong in a group without one"
        )
    if rank > min(parameter.shape):
        raise ValueError(
            f"GaLoreAdamW: rank: got {rank} for a weight {tuple(parameter.shape)}, want at most "
            f"{min(parameter.shape)}: put it in a group without a rank (galore_param_groups does)"
        )


def _check_values(group: dict[str, Any], where: str) -> None:
    for key, choices in _CHOICES.items():
        if key in group and group[key] not in choices:
            raise ValueError(f"{where}: {key}: got {group[key]!r}, want one of {', '.join(map(repr, choices))}")
    for key in ("rank", "update_proj_gap", "refresh_iterations", "refresh_steps"):
        value = group.get(key, 1)
        if key != "rank" or value is not None:
            check_integer(where, key, value)
    for key in ("lr", "eps", "weight_decay", "scale"):
        if key in group and not (math.isfinite(value := float(group[key])) and value >= 0):
            raise ValueError(f"{where}: {key}: got {value}, want a number that is not negative")
    for beta in group.get("betas", ()):
        if not 0 <= beta < 1:
            raise ValueError(f"{where}: betas: got {tuple(group['betas'])}, want two numbers in [0, 1)")
