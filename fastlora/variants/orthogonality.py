"""AdaLoRA's penalty, which keeps P's columns and Q's rows orthonormal: Λ is then what says how much a triplet does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .adalora_layers import adalora_layers, factors_of


def orthogonality_penalty(model: nn.Module, gamma: float = 0.1, adapter_name: str = "default") -> Tensor:
    """γ Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²) over the layers with an AdaLoRA adapter, to be added to the loss.

    Frobenius norms, in float32 (float64 for float64 factors) whatever autocast says, with one product for all layers of
    a shape. Ranks that are masked count too: they may come back.

    Args:
        model: patched with `use_adalora=True`, or with PEFT's AdaLoRA layers; inside DistributedDataParallel or not.
        gamma: the paper's γ: 0.1, and 0.3 or 0.5 for its smallest data sets.
        adapter_name: which adapter.

    Returns:
        A scalar, on the first layer's device. Differentiable in P and Q.

    Raises:
        ValueError: no such adapter; γ negative or not finite; parameters sharded over processes.

    Example:
        >>> loss = model(**batch).loss + fastlora.variants.orthogonality_penalty(model)
        >>> loss.backward()

    Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, equation 4.
    """
    caller = "orthogonality_penalty"
    gamma = float(gamma)
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"{caller}: gamma: got {gamma}, want a number that is not negative")
    shapes: dict[tuple, list[Tensor]] = {}
    for layer in adalora_layers(model, adapter_name, caller).values():
        q, p, _ = factors_of(layer, adapter_name)
        for factor, of_p in ((q, False), (p, True)):
            shapes.setdefault((of_p, factor.shape, factor.device, factor.dtype), []).append(factor)
    total: Tensor | None = None
    for (of_p, _, device, dtype), factors in shapes.items():
        with torch.autocast(device.type, enabled=False):
            stacked = torch.stack(factors).to(torch.promote_types(dtype, torch.float32))
            gram = stacked.mT @ stacked if of_p else stacked @ stacked.mT
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=device)
            part = (gram - eye).square().sum()
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return gamma * total
