"""AdaLoRA's penalty, which keeps P's columns and Q's rows orthonormal: Λ is then what says how much a triplet does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..introspect import sharding
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
        ValueError: no such adapter; γ negative or not finite; parameters sharded otherwise than by `fully_shard`, under
            which every process calls this: PᵀP (r, r) is summed, and Q gathered, as in a forward pass.

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
    for layer in adalora_layers(model, adapter_name, caller, shards=True).values():
        q, p, _ = factors_of(layer, adapter_name)
        for factor, of_p in ((q, False), (p, True)):
            mesh = getattr(factor, "device_mesh", None)
            shapes.setdefault((of_p, factor.shape, factor.device, factor.dtype, mesh), []).append(factor)
    parts = [_DistanceFromOrthonormal.apply(key[0], *factors) for key, factors in shapes.items()]
    return gamma * sum((part.to(parts[0].device) for part in parts[1:]), start=parts[0])  # type: ignore[union-attr]


class _DistanceFromOrthonormal(torch.autograd.Function):
    """Σ ‖D‖² over factors of one shape, with D = PᵀP − I or QQᵀ − I, all of whose gradients 4 P D, or 4 D Q, are one
    product more: half of what autograd would do with the two sides of a Gram matrix."""

    @staticmethod
    def forward(ctx: Any, of_p: bool, *factors: Any) -> Tensor:
        stacked = _stacked(factors, whole=not of_p)
        with torch.autocast(stacked.device.type, enabled=False):
            gram = stacked.mT @ stacked if of_p else stacked @ stacked.mT
        if of_p and sharding.is_sharded(factors[0]):
            gram = sharding.whole(sharding.of_parts(gram, factors[0].device_mesh, tuple(gram.shape), None))
        gram.diagonal(dim1=1, dim2=2).sub_(1.0)
        ctx.of_p = of_p
        ctx.stacked = stacked if sharding.is_sharded(factors[0]) else None  # nothing is sent during the backward pass
        ctx.save_for_backward(gram, *factors)
        return gram.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        gram, *factors = ctx.saved_tensors
        stacked, scaled = _stacked(factors) if ctx.stacked is None else ctx.stacked, gram * (4.0 * grad)
        with torch.autocast(stacked.device.type, enabled=False):
            grads = (stacked @ scaled if ctx.of_p else scaled @ stacked).to(factors[0].dtype).unbind()
        if not sharding.is_sharded(factors[0]):
            return (None, *grads)
        if not ctx.of_p:
            return (None, *map(sharding.spread, grads, factors))
        return (None, *(sharding.of_parts(g, f.device_mesh, tuple(f.shape)) for g, f in zip(grads, factors)))


def _stacked(factors: Sequence[Any], whole: bool = False) -> Tensor:
    """(layers, *shape), of sharded factors this process's rows, or the whole of them."""
    parts = torch.stack([sharding.local(factor) for factor in factors])
    if whole and sharding.is_sharded(factors[0]):
        shape = (len(factors), *factors[0].shape)
        parts = sharding.whole(sharding.of_parts(parts, factors[0].device_mesh, shape, dim=1))
    return parts.to(torch.promote_types(factors[0].dtype, torch.float32))
