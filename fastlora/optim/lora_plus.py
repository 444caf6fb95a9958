"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): a learning rate for B that is a multiple of A's, by parameter groups.

What a parameter is, is read from the name of the dictionary that holds it, `lora_A`, `lora_B` and so on, which are the
same in our layers and in PEFT's. Its shape, and the name of the adapter or of a layer further up, say nothing about it.
Nothing of PEFT is imported. docs/answers.md compares the groups with PEFT's, which are those of the paper's code.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

_WHERE = "fastlora.optim.lora_plus_param_groups"
# The names of the groups, by what holds a parameter: PEFT's modules, or the parameters of our layers, by adapter.
_HOLDERS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_embedding",
    "lora_embedding_B": "lora_embedding",
}
_OTHER = "other"
_MAGNITUDE = "lora_magnitude_vector"


def lora_plus_param_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    *,
    embedding_lr: float = 1e-6,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for LoRA+, for any optimiser: B learns at `ratio` times the rate of A.

    Every parameter of the model that has `requires_grad` is in exactly one group, a tied one too. The groups, of which
    those without parameters are left out, have a `name` next to `params` and `lr`:

    | name | holds | rate |
    |---|---|---|
    | `lora_A` | A | `lr` |
    | `lora_embedding` | A and B of LoRA on embeddings | `embedding_lr` |
    | `lora_B`, `lora_B_no_decay` | B; the biases of `lora_bias=True` | `ratio * lr` |
    | `other`, `other_no_decay` | what else is trained: heads, `modules_to_save`, DoRA's magnitudes | `lr` |

    The groups whose name ends in `_no_decay` (biases, the parameters of norms and any other with at most one dimension,
    DoRA's magnitudes) have a weight decay of 0.

    Args:
        model: patched, or with PEFT's LoRA layers, patched or not. Call this last: after `patch`, after freezing and
            unfreezing, and after FSDP2's `fully_shard`, which replaces parameters.
        lr: the learning rate of A, and of all that is neither B nor LoRA on an embedding.
        ratio: B's learning rate over A's, above 1 as a rule: the paper advises about 16. 1 is LoRA.
        embedding_lr: for LoRA on embedding layers.
        weight_decay: of the other groups; None leaves it to the optimiser's own argument.

    Raises:
        ValueError: nothing is trainable, or no LoRA parameter is; `ratio` is not positive; a rate or the weight decay
            is negative; one of them is not finite.

    Examples:
        ```python
        fastlora.patch(model, r=16)
        groups = fastlora.optim.lora_plus_param_groups(model, lr=1e-4, ratio=16)
        optimizer = torch.optim.AdamW(groups, fused=True)
        ```
    """
    lr, embedding_lr = _rate("lr", lr), _rate("embedding_lr", embedding_lr)
    decay = {} if weight_decay is None else {"weight_decay": _rate("weight_decay", weight_decay)}
    ratio = float(ratio)
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"{_WHERE}: ratio: got {ratio}, want a positive number")
    rates = {"lora_A": lr, "lora_embedding": embedding_lr, "lora_B": ratio * lr, _OTHER: lr}

    holders, no_decay = _lora_parameters(model), undecayed(model)
    groups: dict[str, dict[str, Any]] = {}
    for kind, rate in rates.items():
        groups[kind] = {"name": kind, "params": [], "lr": rate, **decay}
        name = f"{kind}_no_decay"
        groups[name] = {"name": name, "params": [], "lr": rate, "weight_decay": 0.0}
    for parameter in model.parameters():  # a tied one comes once
        if parameter.requires_grad:
            kind = holders.get(parameter, _OTHER)
            groups[f"{kind}_no_decay" if parameter in no_decay else kind]["params"].append(parameter)

    found = [group for group in groups.values() if group["params"]]
    advice = "want one after fastlora.patch(model) or peft.get_peft_model(model, config)"
    if not found:
        raise ValueError(f"{_WHERE}: model: got one without trainable parameters, {advice}")
    if all(group["name"].startswith(_OTHER) for group in found):
        raise ValueError(f"{_WHERE}: model: got one whose trainable parameters have no LoRA's among them, {advice}")
    return found


def _rate(argument: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{_WHERE}: {argument}: got {value}, want a number that is not negative")
    return value


def _lora_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """The group of every parameter of an adapter. One that is tied between two goes where it is met first."""
    found: dict[nn.Parameter, str] = {}
    for module in model.modules():
        for name, child in module.named_children():
            if name in _HOLDERS and isinstance(child, (nn.ModuleDict, nn.ParameterDict)):
                for parameter in child.parameters():
                    found.setdefault(parameter, _HOLDERS[name])
    return found


def undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Biases, norms and scales: a decay would draw them towards zero, where nothing of the layer is left."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        keyed = isinstance(module, nn.ParameterDict)  # the names are then adapters', and one may be called "bias"
        for name, parameter in module.named_parameters(recurse=False):
            if norm or parameter.dim() <= 1 or ("bias" in name and not keyed):
                found.add(parameter)
        for name, child in module.named_children():
            if name == _MAGNITUDE:  # of a convolution it has four dimensions
                found.update(child.parameters())
    return found
