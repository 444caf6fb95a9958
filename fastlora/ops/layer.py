"""A layer with any number of adapters, plain or DoRA's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .call import Adapter, check_call, check_probability, concatenate
from .dora.dora import run
from .lora.linear import fused_linear, low_rank_term


def multi_dora_linear(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], bias: Tensor | None, backend: str
) -> Tensor:
    """Any number of adapters, some with a magnitude, whose arguments are checked: each of those adds its own output's
    difference from the frozen layer's."""
    if len(adapters) == 1:
        return run(x, weight, adapters[0], bias, backend)
    plain = [adapter for adapter in adapters if adapter.magnitude is None]
    y = multi_lora_linear(x, weight, plain, bias, backend=backend)
    frozen = F.linear(x, weight)
    for adapter in adapters:
        if adapter.magnitude is not None:
            y = y + (run(x, weight, adapter, None, backend) - frozen)
    return y


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    bias: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with any number of adapters: y = x W0ᵀ + b + Σ sᵢ·(dropᵢ(x) Aᵢᵀ) Bᵢᵀ.

    Arguments as in `lora_linear`. Without adapters it is the frozen layer. Adapters that drop nothing run as one, of
    rank Σ rᵢ; each of the others has a mask of its own, drawn in the order given (as PEFT does); all but one of those
    add their term in eager PyTorch. Adapters with a magnitude each add what `dora_linear` makes of the frozen layer's
    output.
    """
    if not training:
        for adapter in adapters:
            check_probability(adapter.dropout_p)
        adapters = [adapter._replace(dropout_p=0.0) for adapter in adapters]
    if len(adapters) == 1 and adapters[0].magnitude is None:
        return fused_linear(x, weight, adapters[0], bias, backend)
    if not adapters:
        return F.linear(x, weight, bias)
    for adapter in adapters:
        check_call(x, weight, adapter, bias)
    if any(adapter.magnitude is not None for adapter in adapters):
        return multi_dora_linear(x, weight, adapters, bias, backend)
    plain = [adapter for adapter in adapters if adapter.dropout_p == 0.0]
    dropped = [adapter for adapter in adapters if adapter.dropout_p > 0.0]
    first = concatenate(plain) if plain else dropped.pop(0)
    y = fused_linear(x, weight, first, bias, backend)
    for adapter in dropped:
        y = y + low_rank_term(x, adapter, y.dtype)
    return y
