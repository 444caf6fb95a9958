"""AdaLoRA's penalty, which keeps P's columns and Q's rows orthonormal: Λ is then what says how much a triplet does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .factors import adalora_layers, factors_of


def orthogonality_penalty(model: nn.Module, gamma: float = 0.1, adapter_name: str = "default") -> Tensor:
    """γ Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²) over the layers with an AdaLoRA adapter, to be added to the loss.

    Frobenius norms, in float32 (float64 for float64 factors) whatever autocast says, with one product for all layers of
    a shape. Ranks that are masked count too: they may come back.

    Args:
        model: patched with `use_adalora=True`, or with PEFT's AdaLoRA layers; inside DistributedDataParallel or not.
        gamma: the paper's γ: 0.1, and 0.3 or 0.5 for its smallest data sets.
        adapter_name: which adapter.

    Returns:
        A scalar, on the first layer's device. Differentiable once in P and Q.

    Raises:
        ValueError: no such adapter; γ negative or not finite; parameters sharded over processes.

    Examples:
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
    parts = [_DistanceFromOrthonormal.apply(key[0], *factors) for key, factors in shapes.items()]
    return gamma * sum((part.to(parts[0].device) for part in parts[1:]), start=parts[0])  # type: ignore[union-attr]


class _DistanceFromOrthonormal(torch.autograd.Function):
    """Σ ‖D‖² over factors of one shape, with D = PᵀP − I or QQᵀ − I, all of whose gradients 4 P D, or 4 D Q, are one
    product more: half of what autograd would do with the two sides of a Gram matrix."""

    @staticmethod
    def forward(ctx: Any, of_p: bool, *factors: Tensor) -> Tensor:
        stacked = _stacked(factors)
        with torch.autocast(stacked.device.type, enabled=False):
            gram = stacked.mT @ stacked if of_p else stacked @ stacked.mT
        gram.diagonal(dim1=1, dim2=2).sub_(1.0)
        ctx.of_p = of_p
        ctx.save_for_backward(gram, *factors)
        return gram.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        gram, *factors = ctx.saved_tensors
        stacked, scaled = _stacked(factors), gram * (4.0 * grad)
        with torch.autocast(stacked.device.type, enabled=False):
            grads = stacked @ scaled if ctx.of_p else scaled @ stacked
        return (None, *grads.to(factors[0].dtype).unbind())


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(factors)).to(torch.promote_types(factors[0].dtype, torch.float32))
