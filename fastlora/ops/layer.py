"""A layer with any number of adapters, plain or DoRA's, and several layers on one x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .call import Adapter, GroupLayer, as_one_adapter, check_call, check_probability, concatenate
from .dora.dora import run
from .group.group import Member, known_group, open_group
from .lora.linear import fused_linear


def multi_dora_linear(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], bias: Tensor | None, backend: str, caller: str
) -> Tensor:
    """Any number of adapters, some with a magnitude, whose arguments are checked: each of those adds its own output's
    difference from the frozen layer's."""
    if len(adapters) == 1:
        return run(x, weight, adapters[0], bias, backend, caller)
    plain = [adapter for adapter in adapters if adapter.magnitude is None]
    y = run_layer(x, weight, plain, bias, backend, caller)
    frozen = F.linear(x, weight)
    for adapter in adapters:
        if adapter.magnitude is not None:
            y = y + (run(x, weight, adapter, None, backend, caller) - frozen)
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
    rank Σ rᵢ; each of the others has a mask of its own, drawn in the order given (as PEFT does). Adapters with a
    magnitude each add what `dora_linear` makes of the frozen layer's output.
    """
    if not training:
        for adapter in adapters:
            check_probability(adapter.dropout_p, "multi_lora_linear")
        adapters = [adapter._replace(dropout_p=0.0) for adapter in adapters]
    return run_layer(x, weight, adapters, bias, backend, "multi_lora_linear")


def run_layer(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], bias: Tensor | None, backend: str, caller: str
) -> Tensor:
    """`multi_lora_linear` with the dropout probabilities in force; `caller` is named by what it raises."""
    if len(adapters) == 1 and adapters[0].magnitude is None:
        return fused_linear(x, weight, adapters[0], bias, backend, caller)
    if not adapters:
        return F.linear(x, weight, bias)
    for adapter in adapters:
        check_call(x, weight, adapter, bias, caller)
    if any(adapter.magnitude is not None for adapter in adapters):
        return multi_dora_linear(x, weight, adapters, bias, backend, caller)
    plain = [adapter for adapter in adapters if adapter.dropout_p == 0.0]
    dropped = [adapter for adapter in adapters if adapter.dropout_p > 0.0]
    terms = ([concatenate(plain)] if plain else []) + dropped
    if len(terms) == 1:
        return fused_linear(x, weight, terms[0], bias, backend, caller)
    shared = open_group(x, [Member(weight, bias, *term[:4], backend) for term in terms], 0)
    if shared is None:
        return _composed(x, weight, terms, bias)
    return shared.sum(weight, bias, [term.lora_B for term in terms], [term.scaling for term in terms])


def _composed(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], bias: Tensor | None, keep_mask: Tensor | None = None
) -> Tensor:
    """The layer in eager PyTorch, rounded once."""
    y = F.linear(x, weight, bias)
    total = y
    for lora_A, lora_B, scaling, dropout_p, *_ in adapters:
        total = total + reference.low_rank_term(x, lora_A, lora_B, scaling, dropout_p, keep_mask)
    return total.to(y.dtype)


def lora_group(
    x: Tensor,
    layers: Sequence[GroupLayer],
    training: bool = True,
    backend: str = "auto",
    shared_mask: bool = False,
) -> tuple[Tensor, ...]:
    """Several LoRA layers on the same x, as q, k and v or gate and up are: x is read once for the S of all of them and
    once for every dA, and dX is accumulated instead of made once a layer and added.

    Equivalent to:

        tuple(multi_lora_linear(x, layer.weight, layer.adapters, layer.bias, training) for layer in layers)

    Args:
        x: (..., K). layers: `GroupLayer`s with weight (Nᵢ, K) and adapters as in `lora_linear`; ranks, scales, dropout
            probabilities and the adapters' dtypes may differ.
        training, backend: as in `lora_linear`.
        shared_mask: one dropout mask for all adapters, which then need one probability; otherwise each has its own, as
            in PEFT.

    Returns:
        A tuple of (..., Nᵢ). One whose gradient is not asked for costs nothing in the backward pass.

    Layers without adapters, or with several that drop something, run alone; so do all of them where sharing cannot help
    or be right: small x on a CPU, inside torch.compile and torch.func, tensor subclasses, layers that run on different
    backends.

    Raises:
        ValueError: as `lora_linear`; with `shared_mask`, probabilities that differ, or an adapter with a magnitude.
    """
    return run_group(x, layers, training, backend, shared_mask, "lora_group")


def run_group(
    x: Tensor, layers: Sequence[GroupLayer], training: bool, backend: str, shared_mask: bool, caller: str
) -> tuple[Tensor, ...]:
    """`lora_group`; `caller` is named by what it raises."""
    if not shared_mask and (ys := known_group(x, layers, training, backend)) is not None:
        return ys
    layers = [
        layer if training else layer._replace(adapters=[a._replace(dropout_p=0.0) for a in layer.adapters])
        for layer in layers
    ]
    for layer in layers:
        for adapter in layer.adapters:
            check_call(x, layer.weight, adapter, layer.bias, caller)
            if shared_mask and adapter.magnitude is not None:
                raise ValueError(f"{caller}: shared_mask: got True and an adapter with a magnitude (DoRA), want False")
    probabilities = {adapter.dropout_p for layer in layers for adapter in layer.adapters}
    if shared_mask and len(probabilities) > 1:
        raise ValueError(f"{caller}: shared_mask: got dropout probabilities {sorted(probabilities)}, want one for all")
    shared_mask = shared_mask and probabilities != {0.0}
    merged = [as_one_adapter(layer.adapters) for layer in layers]
    members = {
        i: Member(layer.weight, layer.bias, *adapter[:4], backend)
        for i, (layer, adapter) in enumerate(zip(layers, merged, strict=True))
        if adapter is not None
    }
    whole = len(members) == len(layers) or not shared_mask
    shared = open_group(x, list(members.values()), len(members), shared_mask) if whole else None
    if shared is None and shared_mask:
        return tuple(_with_one_mask(x, layers, probabilities.pop()))
    ys = iter(() if shared is None else shared.ys)
    return tuple(
        run_layer(x, layer.weight, layer.adapters, layer.bias, backend, caller)
        if shared is None or adapter is None
        else next(ys)
        for layer, adapter in zip(layers, merged, strict=True)
    )


def _with_one_mask(x: Tensor, layers: Sequence[GroupLayer], dropout_p: float) -> Iterator[Tensor]:
    keep = F.dropout(torch.ones_like(x), dropout_p) != 0
    for layer in layers:
        yield _composed(x, layer.weight, layer.adapters, layer.bias, keep)
