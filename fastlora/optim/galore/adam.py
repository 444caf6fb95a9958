"""AdamW's arithmetic on one tensor, with the moments in full or in 8 bits.

`arithmetic="torch"` is torch.optim.AdamW's, to the bit; "official" that of the GaLore authors' code (which was once
transformers'): ε next to the uncorrected √v, and the decay after the step.

    torch       W ← (1 − lr·λ) W;  W ← W − lr/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε)
    official    W ← W − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε);  W ← (1 − lr·λ) W

8 bits: blocks of 256 entries with a maximum each, in bitsandbytes' dynamic data type (Dettmers et al. 2022, arXiv
2110.02861). The moments of R (l, r) are quantised along l, so that a block holds one direction of the basis: their
sizes decay as the singular values do, and a block of all of them has few codes for the small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...introspect import sharding
from ..moments import Mixing, carried_over

ARITHMETICS = ("torch", "official")
BITS = (32, 8)
BLOCK = 256
MIN_8BIT_SIZE = 4096  # smaller tensors keep 32 bits, as bitsandbytes' optimisers do
MAXIMA = "_maxima"

State = dict[str, Any]


def learning_rate(group: Mapping[str, Any]) -> Any:
    """A number; in groups without a rank a tensor stays one, because torch computes with it in its dtype."""
    rate = group["lr"]
    return rate.squeeze() if isinstance(rate, Tensor) and not group.get("rank") else float(rate)


def moments_of(state: State, group: Mapping[str, Any], gradient: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Takes a gradient into the moments. The step is −size·m / denominator: (m, denominator, size)."""
    if "exp_avg" not in state:
        _start(state, group, gradient)
    state["step"] += 1
    (beta1, beta2), step, eps, size = group["betas"], state["step"], group["eps"], learning_rate(group)
    m = read(state, "exp_avg", gradient.dtype).lerp_(gradient, 1 - beta1)
    v = read(state, "exp_avg_sq", gradient.dtype).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    write(state, "exp_avg", m)
    write(state, "exp_avg_sq", v)
    first, second = (1 - beta1**step, 1 - beta2**step) if group["correct_bias"] else (1.0, 1.0)
    if group["arithmetic"] == "official":
        return m, v.sqrt().add_(eps), size * math.sqrt(second) / first
    return m, (v.sqrt() / second**0.5).add_(eps), size / first


def clip_(max_norm: float, gradients: list[list[Tensor]]) -> Tensor:
    """Scales what there is of each parameter's gradient as the norm over the first of each asks. Returns the norm."""
    kinds = {sharding.is_sharded(first): [] for first, *_ in gradients}
    for first, *_ in gradients:
        kinds[sharding.is_sharded(first)].append(first)
    norms = [sharding.whole(nn.utils.get_total_norm(kind)) for kind in kinds.values()]
    total = nn.utils.get_total_norm(norms) if len(norms) > 1 else norms[0]
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)  # as nn.utils.clip_grad_norm_
    for gradient in gradients:
        for tensor in gradient:
            tensor.mul_(factor.to(tensor.device))
    return total


def decay_(weight: Tensor, group: Mapping[str, Any], before: bool) -> None:
    """The decoupled weight decay, in its place before or after the step."""
    if group["weight_decay"] and before == (group["arithmetic"] == "torch"):
        weight.mul_(1 - learning_rate(group) * group["weight_decay"])


def carry_over(state: State, change: Mixing, dim: int, both: bool) -> None:
    """Rotates the first moment, or both, into a new basis."""
    for key, squared in (("exp_avg", False), ("exp_avg_sq", True)):
        if key in state and (both or not squared):
            write(state, key, carried_over(sharding.local(read(state, key)), change, dim, squared))


# How the moments are kept.
def _start(state: State, group: Mapping[str, Any], gradient: Tensor) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(gradient)
        if group["optim_bits"] == 8 and gradient.numel() >= MIN_8BIT_SIZE:
            _quantise(state, key, state[key])


def read(state: State, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A moment: the state's own tensor, or what its 8 bits stand for."""
    kept = state[key]
    if kept.dtype != torch.uint8:
        return kept
    code = _code(key == "exp_avg", kept.device)
    value = bitsandbytes().dequantize_blockwise(kept, absmax=state[key + MAXIMA], code=code, blocksize=BLOCK).to(dtype)
    return value.mT if "basis" in state else value


def write(state: State, key: str, value: Tensor) -> None:
    """Keeps a moment the way it was kept before."""
    if state[key].dtype == torch.uint8:
        _quantise(state, key, value)
    elif state[key] is not value:
        sharding.local(state[key]).copy_(value)


def _quantise(state: State, key: str, value: Tensor) -> None:
    if "basis" in state:
        value = value.mT
    code = _code(key == "exp_avg", value.device)
    kept, details = bitsandbytes().quantize_blockwise(value.float().contiguous(), code=code, blocksize=BLOCK)
    state[key], state[key + MAXIMA] = kept, details.absmax


@lru_cache(maxsize=16)
def _code(signed: bool, device: torch.device) -> Tensor:
    return bitsandbytes().create_dynamic_map(signed=signed).to(device)


def bitsandbytes() -> Any:
    """bitsandbytes.functional. Raises ValueError where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            "GaLoreAdamW: optim_bits: got 8, which needs bitsandbytes (pip install bitsandbytes); want 32 where it "
            f"cannot be imported: {error}"
        ) from error
    return functional
