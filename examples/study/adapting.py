"""Adapters in a model: train and eval mode, and the starts that look at gradients. For finetune.py and compare.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def set_training(model: nn.Module, training: bool) -> None:
    """Train or eval mode for the adapters; everything else stays in eval mode, in every method.

    A pretrained model's own dropout is off, that is: a run sees each text twice or so, too little to overfit, and
    without it two ways to compute LoRA compute the very same function of the batch.
    """
    model.eval()
    if training:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.train()


def start_from_gradients(
    start: str,
    adapted: nn.Module,
    passes: Callable[[], object],
    r: int,
    gamma: float,
    seed: int,
    targets: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Sets the adapters of the patched module `adapted` from the gradient of `passes`, which runs backward passes of
    equal weight: "lora_ga", "sign" (`fastlora.sign_factors` by direct minimisation) or "sign_svd" (by the SVD of
    sign(G)). `targets`: which layers, as `fastlora.patch` was told. Returns `init_lora_ga`'s relative sizes.
    """
    import fastlora

    # The loss is a mean over equally many examples in each batch, and not every model is called with its labels.
    chosen = {**(targets or {}), "r": r, "seed": seed, "weighting": "equal"}
    if start == "lora_ga":
        with fastlora.GradientSketch(adapted, **chosen) as found:
            passes()
    else:
        method = "svd" if start == "sign_svd" else "direct"
        every_layer = sum(1 for _ in adapted.modules())  # their gradients fit side by side in models of this size
        found = fastlora.sign_factors(adapted, passes, method=method, layers_at_once=every_layer, **chosen)
    return fastlora.init_lora_ga(adapted, found, gamma=gamma, seed=seed)
