"""The low-rank path where rows use different adapters: each pass in one launch, whatever the number of adapters.

    S  = drop(x) Aᵀ      `segment_shrink`, with the A of each row's adapter; also dS = s·dY B where dB is made apart
    y += s·S Bᵀ          `segment_expand`, with its B; also dX += drop′(dS A)

Rows are sorted by adapter into segments (segment_plan.py), and no program's rows lie in two of them. x, dY and what is
written of y and dX stay in their own order and are reached through `rows`; S and dS (positions, largest rank) lie in
the sorted one, zero beyond an adapter's rank. A's and B's are where they are: the kernels get their addresses. Dropout
counts positions. A segment of rank 0 is written as zeros: routed tokens that no expert takes. `segment_expand` weights
a mixture's rows as it puts them into the order of the tokens.
The gradients of A and B: segment_grads.py.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import keep_mask
from .launch import launch
from .segment_factors import Factors
from .segment_plan import Plan
from .tiling import dot, is_wide, load_tile, reduce_partials, store_tile


@triton.jit
def rows_of_chunk(rows_ptr, start, end, BLOCK_M: tl.constexpr):
    """(rows of x in int32, which of them are there) for the positions from `start` on, up to `end`."""
    positions = start + tl.arange(0, BLOCK_M)
    inside = positions < end
    return tl.load(rows_ptr + positions, mask=inside, other=0), inside


@triton.jit
def tile_pointers(ptr, rows, column, stride_row, stride_column, COLUMNS: tl.constexpr):
    columns = column + tl.arange(0, COLUMNS)
    return ptr + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def tile_mask(inside, column, num_columns, COLUMNS: tl.constexpr):
    return inside[:, None] & (column + tl.arange(0, COLUMNS) < num_columns)[None, :]


@triton.jit
def load_address(addresses_ptr, ranks_ptr, segment, like_ptr, ALIGNED: tl.constexpr):
    """(pointer to a segment's A or B, its rank)."""
    ptr = tl.load(addresses_ptr + segment).to(like_ptr.dtype)
    rank = tl.load(ranks_ptr + segment).to(tl.int32)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
        rank = tl.multiple_of(rank, 8)
    return ptr, rank


@triton.jit
def _load_factor(ptr, r, column, rank, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The block (ROWS of the rank, COLUMNS of the width) at (r, column) of A (rank, width), or of Bᵀ for TRANSPOSED."""
    if TRANSPOSED:
        return load_tile(ptr, r, column, rank, width, 1, rank, ROWS, COLUMNS, False)
    return load_tile(ptr, r, column, rank, width, width, 1, ROWS, COLUMNS, False)


@triton.jit(do_not_specialize=["P"])
def _segment_shrink_kernel(
    x_ptr,  # (rows, K)
    rows_ptr,  # (P,) int32
    tiles_ptr,  # (tiles, 3) int32: segment, first position, position after the last
    addresses_ptr,  # (segments,) int64: of A (R, K), or with TRANSPOSED of B (K, R)
    ranks_ptr,  # (segments,) int64
    scales_ptr,  # (segments,)
    thresholds_ptr,  # (segments,) int64, read only with DROPOUT
    seed_ptr,  # (1,) int64, read only with DROPOUT
    like_ptr,  # of A's dtype, not read
    out_ptr,  # (splits, P, R_MAX) contiguous: the result where there is one split, else fp32 partials
    P,
    K,
    R_MAX,
    stride_xm,
    stride_xk,
    k_per_split,  # a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[split] (P, R) = scale · (x ∘ mask)[rows, split's columns] A[:, split's columns]ᵀ, accumulated in fp32."""
    tile = tiles_ptr + 3 * tl.program_id(0)
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R
    segment = tl.load(tile)
    start = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if start == end:  # a table whose sizes the host does not know is as long as it may have to be
        return
    a_ptr, rank = load_address(addresses_ptr, ranks_ptr, segment, like_ptr, ALIGNED)
    rows, inside = rows_of_chunk(rows_ptr, start, end, BLOCK_M)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = tl.load(thresholds_ptr + segment).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    k_start = split * k_per_split
    k_end = min(K, k_start + k_per_split)
    k_end = tl.where(r < rank, k_end, k_start)  # beyond this adapter's rank the result is zero
    for k in range(k_start, k_end, BLOCK_K):
        mask = tile_mask(inside, k, K, BLOCK_K)
        x = tl.load(tile_pointers(x_ptr, rows, k, stride_xm, stride_xk, BLOCK_K), mask=mask, other=0.0)
        a = _load_factor(a_ptr, r, k, rank, K, BLOCK_R, BLOCK_K, TRANSPOSED)
        if DROPOUT:
            x = tl.where(keep_mask(seed, start, k, threshold, BLOCK_M, BLOCK_K), x, tl.zeros_like(x))
        acc = dot(x, tl.trans(a), acc, WIDE, INPUT_PRECISION)
    acc *= tl.load(scales_ptr + segment)
    out_ptr += split.to(tl.int64) * P * R_MAX
    store_tile(out_ptr, acc, start, r, end, R_MAX, R_MAX, 1, False)


@triton.jit
def _segment_expand_kernel(
    s_ptr,  # (P, R_MAX) contiguous
    rows_ptr,  # (P,) int32
    tiles_ptr,  # (tiles, 3) int32: segment, first position, position after the last
    addresses_ptr,  # (segments,) int64: of W (R, N), or with TRANSPOSED of W (N, R)
    ranks_ptr,  # (segments,) int64
    scales_ptr,  # (segments,)
    thresholds_ptr,  # (segments,) int64, read only with DROPOUT
    seed_ptr,  # (1,) int64, read only with DROPOUT
    like_ptr,  # of W's dtype, not read
    bias_ptr,  # (N,), or with a stride a (N,) for each segment; read only with HAS_BIAS
    base_ptr,  # (P, N) contiguous: what ACCUMULATE reads; None: out
    weights_ptr,  # (P,), or None
    x_ptr,  # (P, N) contiguous, or None; with weights
    dots_ptr,  # (P, programs a row) fp32, written where there is x
    out_ptr,  # (rows, N)
    N,
    R_MAX,
    stride_bs,
    stride_bn,
    stride_om,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # onto what out holds
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[rows] (P, N) = weights · ([base +] mask ∘ (scale · S W) + bias), accumulated in fp32 and rounded once; dots,
    summed over a row, = ⟨x, the same unweighted⟩."""
    tile = tiles_ptr + 3 * tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N
    segment = tl.load(tile)
    start = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if start == end:  # a table whose sizes the host does not know is as long as it may have to be
        return
    w_ptr, rank = load_address(addresses_ptr, ranks_ptr, segment, like_ptr, ALIGNED)
    rows, inside = rows_of_chunk(rows_ptr, start, end, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(0, rank, BLOCK_R):
        s = load_tile(s_ptr, start, r, end, R_MAX, R_MAX, 1, BLOCK_M, BLOCK_R, False)
        w = _load_factor(w_ptr, r, column, rank, N, BLOCK_R, BLOCK_N, TRANSPOSED)
        acc = dot(s, w, acc, WIDE, INPUT_PRECISION)
    acc *= tl.load(scales_ptr + segment)
    if DROPOUT:
        threshold = tl.load(thresholds_ptr + segment).to(tl.int32)
        acc = tl.where(keep_mask(tl.load(seed_ptr), start, column, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    width = tl.where(rank > 0, N, 0)  # rows that no adapter takes become zero
    if HAS_BIAS:
        columns = column + tl.arange(0, BLOCK_N)
        bias_ptr += segment.to(tl.int64) * stride_bs
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bn, mask=columns < width, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    pointers = tile_pointers(out_ptr, rows, column, stride_om, stride_on, BLOCK_N)
    positions = start + tl.arange(0, BLOCK_M)
    mask = tile_mask(inside, column, width, BLOCK_N)
    if ACCUMULATE:
        base = pointers if base_ptr is None else tile_pointers(base_ptr, positions, column, N, 1, BLOCK_N)
        acc += tl.load(base, mask=mask, other=0.0).to(tl.float32)
    if weights_ptr is not None:
        if x_ptr is not None:
            x = tl.load(tile_pointers(x_ptr, positions, column, N, 1, BLOCK_N), mask=mask, other=0.0)
            dots_ptr += positions.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
            tl.store(dots_ptr, tl.sum(acc * x.to(tl.float32), axis=1), mask=inside)
        acc *= tl.load(weights_ptr + positions, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=tile_mask(inside, column, N, BLOCK_N))


def _shrink_config(x: torch.Tensor, segments: Plan, factors: Factors) -> configs.ShrinkConfig:
    P, K = segments.num_positions, x.shape[1]
    dtype = factors.like.dtype
    config = configs.shrink(P, K, factors.max_rank, x.dtype, dtype, x.device, configs.vectorised(x))
    block_m = _rows_per_tile(segments, config.block_m)
    tiles = segments.chunks(block_m, x.device).count
    programs = tiles * configs.cdiv(factors.max_rank, config.block_r)
    splits = configs._parts(programs, configs.cdiv(K, config.block_k), configs.num_sms(x.device))
    return replace(config, block_m=block_m, num_splits=splits)


def _rows_per_tile(segments: Plan, block_m: int) -> int:
    """16 where no segment is longer, as when each sequence adds one token: most of a larger tile would be empty."""
    return min(block_m, 16) if segments.longest <= 16 else block_m


def segment_shrink_workspace(x: torch.Tensor, segments: Plan, factors: Factors) -> int:
    """How many fp32 elements `segment_shrink` needs as its workspace."""
    splits = _shrink_config(x, segments, factors).num_splits
    return splits * segments.num_positions * factors.max_rank if splits > 1 else 0


def segment_shrink(
    x: torch.Tensor,
    segments: Plan,
    factors: Factors,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
    *,
    by_b: bool = False,
    seed: torch.Tensor | None = None,
) -> None:
    """out (positions, largest rank) = S = drop(x) Aᵀ for x (rows, K), or dS = s·dY B for x = dY with `by_b`.

    x has any strides, out is contiguous; its dtype selects the arithmetic, as in `shrink`. Without `seed` nothing is
    dropped. `workspace`: fp32, at least `segment_shrink_workspace` elements.
    """
    P, R, K = segments.num_positions, factors.max_rank, x.shape[1]
    assert out.shape == (P, R) and out.is_contiguous(), (out.shape, (P, R))
    config = _shrink_config(x, segments, factors)
    splits = config.num_splits
    target = out
    if splits > 1:
        assert workspace is not None and workspace.numel() >= splits * P * R
        target = workspace
    tiles = segments.chunks(config.block_m, x.device)
    launch(
        _segment_shrink_kernel,
        (tiles.count, splits, configs.cdiv(R, config.block_r)),
        x,
        segments.rows(x.device),
        tiles.table,
        factors.b if by_b else factors.a,
        factors.ranks,
        factors.scalings if by_b else factors.dropout_scales,
        factors.thresholds,
        seed,
        factors.like,
        target,
        P,
        K,
        R,
        *x.stride(),
        configs.cdiv(configs.cdiv(K, config.block_k), splits) * config.block_k,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        TRANSPOSED=by_b,
        ALIGNED=factors.aligned,
        DROPOUT=seed is not None,
        WIDE=is_wide(out, x),
        INPUT_PRECISION=configs.input_precision(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        reduce_partials(target, out, splits)


def _expand_config(s: torch.Tensor, segments: Plan, factors: Factors, out: torch.Tensor) -> configs.ExpandConfig:
    R, N = factors.max_rank, out.shape[1]
    config = configs.expand(s.shape[0], N, R, s.dtype, factors.like.dtype, s.device)
    if s.dtype != torch.float32 and not configs.vectorised(out):
        # Element by element, 18 to 297 stores and loads spill with wider blocks.
        config = replace(config, block_n=min(config.block_n, 64), block_r=min(config.block_r, 32))
    block_m = _rows_per_tile(segments, config.block_m)
    if block_m < config.block_m:
        config = replace(config, block_m=block_m, block_r=min(config.block_r, 32))  # with 64 two stores spill on sm_80
    return config


def segment_expand(
    s: torch.Tensor,
    segments: Plan,
    factors: Factors,
    out: torch.Tensor,
    *,
    by_a: bool = False,
    bias: torch.Tensor | None = None,
    accumulate: bool = True,
    seed: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """out (rows, N) [+]= s·S Bᵀ + bias in the adapted rows; or drop′(dS A) for S = dS with `by_a`. The bias is (N,), or
    (segments, N).

    s (positions, largest rank) is contiguous and selects the arithmetic, as in `expand`; out has any strides. Rows
    without an adapter are not touched. Needs no workspace. With `base` (positions, N), contiguous, out is written and
    not read: base + … . `weights` (positions,) then multiply each row, and where x (positions, N), contiguous, is given
    too, ⟨x, row⟩ before that is returned (positions,) in fp32.
    """
    R, N = factors.max_rank, out.shape[1]
    assert s.shape == (segments.num_positions, R) and s.is_contiguous(), (s.shape, segments.num_positions, R)
    assert all(t is None or (t.shape == (len(s), N) and t.is_contiguous()) for t in (base, x)), (len(s), N)
    config = _expand_config(s, segments, factors, out)
    if x is not None and s.dtype != torch.float32:
        config = replace(config, num_warps=8)  # with 4, two spill on sm_80 where rows are odd and r = 64
    tiles = segments.chunks(config.block_m, s.device)
    strips = configs.cdiv(N, config.block_n)
    dots = None if x is None else torch.empty(len(s), strips, dtype=torch.float32, device=s.device)
    launch(
        _segment_expand_kernel,
        (tiles.count, strips),
        s,
        segments.rows(s.device),
        tiles.table,
        factors.a if by_a else factors.b,
        factors.ranks,
        factors.dropout_scales if by_a else factors.scalings,
        factors.thresholds,
        seed,
        factors.like,
        bias,
        base,
        weights,
        x,
        dots,
        out,
        N,
        R,
        *((0, 0, 0) if bias is None else (0, *bias.stride()))[-2:],
        *out.stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        TRANSPOSED=not by_a,
        ALIGNED=factors.aligned,
        HAS_BIAS=bias is not None,
        ACCUMULATE=accumulate,
        DROPOUT=seed is not None,
        WIDE=is_wide(s, out),
        INPUT_PRECISION=configs.input_precision(s.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return None if dots is None else dots.sum(1)
