"""AdaLoRA's importances of many layers at once: Ī and Ū in place, and a score for every triplet.

For every number w of P, Λ and Q, with g its gradient and I = |w·g|:

    Ī ← Ī + (1 − β₁)(I − Ī)      Ū ← Ū + (1 − β₂)(|I − Ī| − Ū), with the new Ī      s = Ī·Ū
    S_i = s(λ_i) + mean over N of s(P_·i) + mean over K of s(Q_i·)

Three launches whatever the number of layers: a pass over every Q and one over every P, which also write each tile's
sums of s by rank, and one over the λ, which adds those sums up in a fixed order. Ī and Ū are flat (importance_plan.py);
P, Λ, Q and the gradients stay where they are, and the kernels get their addresses. A product that is not finite counts
as 0: one overflow would otherwise stay in Ī for good.

Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, equations 7 to 10.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import configs
from .importance_plan import Layout
from .launch import launch

MAX_BLOCK_R = 64
_PARTS = 16  # of a layer's sums, added up at a time


@dataclass(frozen=True)
class ImportanceConfig:
    """A program owns block_r ranks by block_l columns of a Q, or rows of a P."""

    block_r: int
    block_l: int
    num_warps: int


@triton.jit
def _smoothed(w, g, rate, sensitivity_ptrs, uncertainty_ptrs, mask, weight1, weight2):
    """s = Ī·Ū (fp32) of new averages, which are written."""
    product = tl.abs(w.to(tl.float32) * g.to(tl.float32) * rate)
    product = tl.where(product < float("inf"), product, 0.0)  # false for NaN too
    sensitivity = tl.load(sensitivity_ptrs, mask=mask, other=0.0)
    uncertainty = tl.load(uncertainty_ptrs, mask=mask, other=0.0)
    sensitivity += weight1 * (product - sensitivity)
    uncertainty += weight2 * (tl.abs(product - sensitivity) - uncertainty)
    tl.store(sensitivity_ptrs, sensitivity, mask=mask)
    tl.store(uncertainty_ptrs, uncertainty, mask=mask)
    return sensitivity * uncertainty


@triton.jit
def _update_kernel(
    layers_ptr,  # (layers, 8) int64: Tables.layers
    addresses_ptr,  # (layers, 6) int64: of Q, its gradient, P, its gradient, Λ, its gradient
    tiles_ptr,  # (tiles, 3) int32: layer, first rank, first column of Q or row of P
    like_ptr,  # of the factors' dtype, not read
    sensitivity_ptr,  # flat, fp32
    uncertainty_ptr,  # flat, fp32
    partials_ptr,  # (tiles, BLOCK_R) fp32
    rate_ptr,  # (1,) fp32: what gradients are multiplied by
    weight1,  # 1 − β₁
    weight2,  # 1 − β₂
    OF_P: tl.constexpr,  # P (N, r), else Q (r, K)
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One tile of a Q or a P: Ī and Ū in place, partials[tile] (BLOCK_R,) = Σ s over the tile's columns, or rows."""
    tile = tl.program_id(0)
    layer = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    rank = tl.load(tiles_ptr + 3 * tile + 1)
    position = tl.load(tiles_ptr + 3 * tile + 2)
    row = layers_ptr + 8 * layer
    r = tl.load(row).to(tl.int32)  # 32 bits do within a factor: `Layout` has none of 2^31 numbers
    length = tl.load(row + (2 if OF_P else 1)).to(tl.int32)
    start = tl.load(row + (5 if OF_P else 4))
    w_ptr = tl.load(addresses_ptr + 6 * layer + (2 if OF_P else 0)).to(like_ptr.dtype)
    g_address = tl.load(addresses_ptr + 6 * layer + (3 if OF_P else 1))
    g_ptr = g_address.to(like_ptr.dtype)
    if ALIGNED:  # then the loads and stores are 16 bytes wide, or 8 in half precision
        w_ptr = tl.multiple_of(w_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        r = tl.multiple_of(r, 4)
        length = tl.multiple_of(length, 4)
        start = tl.multiple_of(start, 4)
        rank = tl.multiple_of(rank, 4)
        position = tl.multiple_of(position, 4)
    ranks = rank + tl.arange(0, BLOCK_R)
    positions = position + tl.arange(0, BLOCK_L)
    known = tl.where(g_address != 0, length, 0)  # as far as there is a gradient
    if OF_P:
        offs = positions[:, None] * r + ranks[None, :]
        mask = (positions < length)[:, None] & (ranks < r)[None, :]
        g_mask = (positions < known)[:, None] & (ranks < r)[None, :]
    else:
        offs = ranks[:, None] * length + positions[None, :]
        mask = (ranks < r)[:, None] & (positions < length)[None, :]
        g_mask = (ranks < r)[:, None] & (positions < known)[None, :]
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    g = tl.load(g_ptr + offs, mask=g_mask, other=0.0)
    sensitivity_ptr += start
    uncertainty_ptr += start
    rate = tl.load(rate_ptr)
    s = _smoothed(w, g, rate, sensitivity_ptr + offs, uncertainty_ptr + offs, mask, weight1, weight2)
    tl.store(partials_ptr + tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.sum(s, axis=0 if OF_P else 1))


@triton.jit
def _mean(partials_ptr, first, rank, r, length, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, PARTS: tl.constexpr):
    """(BLOCK_R,) the tiles' sums of one layer's ranks from `rank` on, added from the first to the last, over length."""
    tiles = tl.cdiv(length, BLOCK_L)
    first += rank // BLOCK_R * tiles
    acc = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for part in range(0, tl.where(rank < r, tiles, 0), PARTS):
        parts = part + tl.arange(0, PARTS)
        pointers = partials_ptr + (first + parts)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        acc += tl.sum(tl.load(pointers, mask=(parts < tiles)[:, None], other=0.0), axis=0)
    return acc / length.to(tl.float32)


@triton.jit
def _score_kernel(
    layers_ptr,  # (layers, 8) int64: Tables.layers
    addresses_ptr,  # (layers, 6) int64, as above
    like_ptr,  # of the factors' dtype, not read
    sensitivity_ptr,  # flat, fp32
    uncertainty_ptr,  # flat, fp32
    q_partials_ptr,  # (tiles of Q, BLOCK_R) fp32
    p_partials_ptr,  # (tiles of P, BLOCK_R) fp32
    scores_ptr,  # (total rank,) fp32
    rate_ptr,  # (1,) fp32
    weight1,  # 1 − β₁
    weight2,  # 1 − β₂
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PARTS: tl.constexpr,
):
    """BLOCK_R ranks of one layer: the averages of their λ in place, and S."""
    layer = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1) * BLOCK_R
    row = layers_ptr + 8 * layer
    r = tl.load(row)
    start = tl.load(row + 3)
    e_ptr = tl.load(addresses_ptr + 6 * layer + 4).to(like_ptr.dtype)
    g_address = tl.load(addresses_ptr + 6 * layer + 5)
    ranks = rank + tl.arange(0, BLOCK_R)
    inside = ranks < r
    e = tl.load(e_ptr + ranks, mask=inside, other=0.0)
    g = tl.load(g_address.to(like_ptr.dtype) + ranks, mask=ranks < tl.where(g_address != 0, r, 0), other=0.0)
    offs = start + ranks
    rate = tl.load(rate_ptr)
    score = _smoothed(e, g, rate, sensitivity_ptr + offs, uncertainty_ptr + offs, inside, weight1, weight2)
    score += _mean(p_partials_ptr, tl.load(row + 7), rank, r, tl.load(row + 2), BLOCK_R, BLOCK_L, PARTS)
    score += _mean(q_partials_ptr, tl.load(row + 6), rank, r, tl.load(row + 1), BLOCK_R, BLOCK_L, PARTS)
    tl.store(scores_ptr + offs, score, mask=inside)


def importance_config(layout: Layout, device: torch.device) -> ImportanceConfig:
    """The launch for these layers. Tiles of 1024 numbers, each with its w, g, Ī and Ū: 16 KiB of fp32 on the way to a
    program, in 64 registers at most, so that eight programs fit a multiprocessor."""
    block_r = min(MAX_BLOCK_R, configs.power_of_two_at_least(max(r for r, _, _ in layout.sizes)))
    if configs.capability(device) == configs.INTERPRETER:
        return ImportanceConfig(min(block_r, 8), 16, 4)
    return ImportanceConfig(block_r, 1024 // block_r, 4)


def partials_size(layout: Layout, device: torch.device) -> tuple[int, int]:
    """How many fp32 numbers of workspace `update` wants for the sums of the Q's tiles, and of the P's."""
    config = importance_config(layout, device)
    tables = layout.tables(device, config.block_r, config.block_l)
    return len(tables.q_tiles) * config.block_r, len(tables.p_tiles) * config.block_r


def update(
    layout: Layout,
    addresses: torch.Tensor,
    like: torch.Tensor,
    sensitivity: torch.Tensor,
    uncertainty: torch.Tensor,
    scores: torch.Tensor,
    q_partials: torch.Tensor,
    p_partials: torch.Tensor,
    rate: torch.Tensor,
    beta1: float,
    beta2: float,
    aligned: bool,
) -> None:
    """A step of all layers: sensitivity and uncertainty (layout.numel,) in place, scores (layout.total_rank,) written.

    addresses: (layers, 6) int64 on the device, of contiguous tensors of like's dtype, 0 for a gradient that is None.
    sensitivity, uncertainty, scores and rate (1,): fp32. aligned: all addresses are multiples of 16.
    """
    device = like.device
    config = importance_config(layout, device)
    tables = layout.tables(device, config.block_r, config.block_l)
    assert sensitivity.dtype == uncertainty.dtype == scores.dtype == rate.dtype == torch.float32
    assert sensitivity.numel() == uncertainty.numel() == layout.numel and scores.numel() == layout.total_rank
    assert (q_partials.numel(), p_partials.numel()) == partials_size(layout, device)
    weights = (1.0 - beta1, 1.0 - beta2)
    aligned = aligned and all(size % 4 == 0 for sizes in layout.sizes for size in sizes)
    for tiles, partials, of_p in ((tables.q_tiles, q_partials, False), (tables.p_tiles, p_partials, True)):
        launch(
            _update_kernel,
            (len(tiles),),
            tables.layers,
            addresses,
            tiles,
            like,
            sensitivity,
            uncertainty,
            partials,
            rate,
            *weights,
            OF_P=of_p,
            ALIGNED=aligned,
            BLOCK_R=config.block_r,
            BLOCK_L=config.block_l,
            num_warps=config.num_warps,
        )
    blocks = configs.cdiv(max(r for r, _, _ in layout.sizes), config.block_r)
    launch(
        _score_kernel,
        (len(layout.sizes), blocks),
        tables.layers,
        addresses,
        like,
        sensitivity,
        uncertainty,
        q_partials,
        p_partials,
        scores,
        rate,
        *weights,
        BLOCK_R=config.block_r,
        BLOCK_L=config.block_l,
        PARTS=_PARTS,
        num_warps=1,
    )
