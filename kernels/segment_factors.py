"""What the segment kernels must know of the adapters in a batch: where they lie, their ranks and scales."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import threshold_and_scale
from .segment_plan import Place, is_capturing, places_of, to_device


class Factors(NamedTuple):
    """What the kernels must know of the segments' adapters: tensors of one number per segment, on the device."""

    a: Tensor  # int64, the addresses of lora_A (r, K), contiguous
    b: Tensor  # int64, the addresses of lora_B (N, r), contiguous
    ranks: Tensor  # int64
    rank_starts: Tensor  # int64, the sum of the ranks before it
    thresholds: Tensor  # int64, of dropout
    scalings: Tensor  # fp32
    dropout_scales: Tensor  # fp32
    like: Tensor  # of the factors' dtype; never read
    max_rank: int
    total_rank: int
    aligned: bool  # every address is a multiple of 16 bytes and every rank of 8
    any_dropout: bool


@functools.lru_cache(maxsize=256)
def _count(place: Place, experts: int, rank: int, scaling: float, dropout_p: float) -> tuple[Tensor, ...]:
    """Of every segment: its number, rank, rank_start, threshold, scaling, dropout_scale."""
    threshold, scale = threshold_and_scale(dropout_p)
    number, ones = torch.arange(experts + 1, device=place[0]), torch.ones(experts + 1, device=place[0])
    ranks = (number < experts) * rank
    return number, ranks, number * rank, torch.full_like(number, threshold), ones * scaling, ones * scale


def expert_factors(lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float) -> Factors:
    """The factors of a mixture's adapter, lora_A (E, r, K) and lora_B (E, N, r) of one dtype and contiguous, for the
    segments of `segment_plan.Routed`: the last has rank 0. Nothing is sent to the device: it counts for itself."""
    experts, rank, _ = lora_A.shape
    steps = [factor[0].numel() * factor.element_size() for factor in (lora_A, lora_B)]
    bases = [factor.data_ptr() for factor in (lora_A, lora_B)]
    places = places_of(lora_A.device)
    count = _count.__wrapped__ if is_capturing(places) else _count
    number, *numbers = count(places[0], experts, rank, scaling, dropout_p)
    return Factors(
        *(number * step + base for step, base in zip(steps, bases, strict=True)),
        *numbers,
        like=lora_A,
        max_rank=rank,
        total_rank=experts * rank,
        aligned=rank % 8 == 0 and all(number % 16 == 0 for number in (*bases, *steps)),
        any_dropout=dropout_p > 0.0,
    )


_MOST_KEPT = 8192  # sets of adapters, under two places each; a 7B model has 224 layers
_kept: dict[tuple[object, ...], Factors] = {}


def factors_of(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
) -> Factors:
    """The factors of one adapter per segment, all of one dtype and contiguous.

    Addresses, ranks and scales are sent to the device once for every set of them: a parameter keeps its address from
    step to step. What a cached entry says follows from its key alone, so it cannot be out of date.
    """
    like = lora_As[0]
    device = like.device
    places = places_of(device)
    key = (
        like.dtype,
        *(a.data_ptr() for a in lora_As),
        *(b.data_ptr() for b in lora_Bs),
        *(a.shape[0] for a in lora_As),
        *scalings,
        *dropout_ps,
    )
    found = _kept.get((places[0], *key))
    if found is not None:
        return found._replace(like=like)
    ranks = [a.shape[0] for a in lora_As]
    rank_starts = [sum(ranks[:i]) for i in range(len(ranks))]
    dropout = [threshold_and_scale(p) for p in dropout_ps]
    addresses = [[a.data_ptr() for a in lora_As], [b.data_ptr() for b in lora_Bs]]
    integers = torch.tensor([*addresses, ranks, rank_starts, [threshold for threshold, _ in dropout]])
    numbers = torch.tensor([list(scalings), [scale for _, scale in dropout]], dtype=torch.float32)
    factors = Factors(
        *to_device(integers, device).unbind(),
        *to_device(numbers, device).unbind(),
        like=like,
        max_rank=max(ranks),
        total_rank=sum(ranks),
        aligned=all(address % 16 == 0 for row in addresses for address in row) and all(r % 8 == 0 for r in ranks),
        any_dropout=any(p > 0.0 for p in dropout_ps),
    )
    if not is_capturing(places):
        kept = factors._replace(like=like.new_empty(0))  # not the adapter itself: it would stay alive
        for place in places:
            if len(_kept) >= _MOST_KEPT:
                _kept.pop(next(iter(_kept)))
            _kept[(place, *key)] = kept
    return factors
