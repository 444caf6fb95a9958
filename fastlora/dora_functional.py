"""`dora_linear`: a LoRA layer whose rows are scaled to a learnt length. Part of functional.py, which it belongs to; the
maths is one floor down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, dora_autograd, functional, reference
from .functional import Adapter


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with DoRA, computed on the LoRA kernels: y = x W′ᵀ + b, W′ = m ∘ (W0 + s·B A)/‖W0 + s·B A‖.

    Equivalent to:

        norm = (weight + scaling * lora_B @ lora_A).detach().norm(dim=1)
        factor = magnitude / norm
        dropped = F.dropout(x, dropout_p, training)
        low_rank = scaling * F.linear(F.linear(dropped, lora_A), lora_B)
        y = F.linear(x, weight, bias) + (factor - 1) * F.linear(dropped, weight) + factor * low_rank

    Neither B A nor W0 + s·B A is ever formed: the norms come from one pass over W0, in float32. They are made anew at
    every call. Dropout acts on W0's input too, as in the paper's code and in PEFT, which takes a second product by W0.

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, training, backend: as in `lora_linear`.
        magnitude: m (N,), of any float dtype.

    Returns:
        (..., N) in x's dtype (autocast's dtype under autocast). Differentiable once in x, weight, bias, lora_A, lora_B
        and magnitude, the norms taken for constants (section 4.3 of the paper).

    Raises:
        ValueError: as `lora_linear`; a magnitude that is not (N,) or lies on another device.

    Example:
        >>> x, weight = torch.randn(4, 32, 64), torch.randn(128, 64)
        >>> lora_A, lora_B = torch.randn(8, 64), torch.zeros(128, 8)
        >>> dora_linear(x, weight, lora_A, lora_B, weight.norm(dim=1), scaling=2.0).shape
        torch.Size([4, 32, 128])

    Source: Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, equations 5 and 11.
    """
    functional._check_probability(dropout_p)
    adapter = Adapter(lora_A, lora_B, scaling, dropout_p if training else 0.0, magnitude)
    functional._check(x, weight, adapter, bias)
    return run(x, weight, adapter, bias, backend)


def run(x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, backend: str) -> Tensor:
    """`dora_linear` of an adapter with a magnitude; all but the magnitude is checked."""
    lora_A, lora_B, scaling, dropout_p, magnitude, norm = adapter
    assert magnitude is not None
    _check_magnitude(weight, magnitude)
    unrounded = weight
    if autograd.autocast_enabled(x):
        x, weight, bias = functional._autocast(x, weight, bias)
    functional._check_one_dtype(x, weight, bias)
    tensors = (x, weight, bias, lora_A, lora_B, magnitude)
    if weight.numel() == 0 or x.is_nested or not functional._takes_fused_path(*tensors):
        return reference.dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias, dropout_p)
    if norm is None:
        norm = dora_autograd.weight_norm(unrounded, lora_A, lora_B, scaling, backend)
    rest = None
    if dropout_p > 0.0:
        # W0 x + (m/n − 1) ∘ W0 drop(x) + (m/n) ∘ s·B A drop(x): what is dropped keeps the frozen layer's length.
        dropped = F.dropout(x, dropout_p)
        rest, x = F.linear(x - dropped, weight), dropped
    z = autograd.lora_linear(x, weight, None, lora_A, lora_B, scaling, 0.0, backend)
    y = dora_autograd.scale(z, magnitude, norm, bias, lora_A, backend)
    return y if rest is None else rest + y


def multi_dora_linear(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], bias: Tensor | None, backend: str
) -> Tensor:
    """Any number of adapters, some with a magnitude, whose arguments are checked: each of those adds its own output's
    difference from the frozen layer's."""
    if len(adapters) == 1:
        return run(x, weight, adapters[0], bias, backend)
    plain = [adapter for adapter in adapters if adapter.magnitude is None]
    y = functional.multi_lora_linear(x, weight, plain, bias, backend=backend)
    frozen = F.linear(x, weight)
    for adapter in adapters:
        if adapter.magnitude is not None:
            y = y + (run(x, weight, adapter, None, backend) - frozen)
    return y


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str = "auto") -> Tensor:
    """‖W0 + s·B A‖ of every row (N,) of weight (N, K), in float32 (float64 for float64), without a gradient."""
    if not functional._takes_fused_path(weight, lora_A, lora_B) or weight.is_meta:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + scaling * (lora_B.to(wide) @ lora_A.to(wide))).detach().norm(dim=1)
    return dora_autograd.weight_norm(weight, lora_A, lora_B, scaling, backend)


def _check_magnitude(weight: Tensor, magnitude: Tensor) -> None:
    if magnitude.shape != weight.shape[:1] or magnitude.device != weight.device or not magnitude.is_floating_point():
        raise ValueError(
            f"dora_linear: magnitude: got {tuple(magnitude.shape)} {magnitude.dtype} on {magnitude.device}, want "
            f"floating-point ({weight.shape[0]},) on {weight.device}, a length for every row of weight"
        )
