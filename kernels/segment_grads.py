"""The gradients of several adapters in one batch, each pass in one launch (segments.py has the layout).

    dS = s·dY B and dB = s·dYᵀ S      `segment_ds_db`: dY read once, a dB for each adapter
    dA = dSᵀ drop(x)                  `segment_weight_grad`: a dA for each adapter

The parts that programs make leave as fp32 partials and are added in a fixed order: the same bits on every run. A step
reads the next step's row numbers: asked for in the step that needs them, Triton would give two of the four stages of
asynchronous copies to the wait for them.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import keep_mask
from .launch import launch
from .segment_factors import Factors
from .segment_plan import Chunks, Plan
from .segments import load_address, rows_of_chunk, segment_shrink, segment_shrink_workspace, tile_mask, tile_pointers
from .tiling import BLOCK, dot, is_wide, load_tile, reduce_partials, store_tile


@triton.jit(do_not_specialize=["P"])
def _segment_ds_db_kernel(
    dy_ptr,  # (rows, N)
    rows_ptr,  # (P,) int32
    chunks_ptr,  # (chunks, 3) int32: segment, first position, position after the last
    addresses_ptr,  # (segments,) int64: of B (N, R)
    ranks_ptr,  # (segments,) int64
    scales_ptr,  # (segments,)
    like_ptr,  # of B's dtype, not read
    s_ptr,  # (P, R_MAX) contiguous
    ds_ptr,  # (strips, P, R_MAX) contiguous: dS where there is one strip, else fp32 partials
    db_ptr,  # (chunks, N, R_MAX) fp32 contiguous
    P,
    N,
    R_MAX,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dS[strip] (P, R) = scale · dY[rows, strip] B[strip]; dB[chunk] (N, R) = scale · dY[rows of chunk]ᵀ S[chunk]."""
    strip = tl.program_id(0)
    chunk = tl.program_id(1)
    column = strip * BLOCK_N
    segment = tl.load(chunks_ptr + 3 * chunk)
    start = tl.load(chunks_ptr + 3 * chunk + 1)
    end = tl.load(chunks_ptr + 3 * chunk + 2)
    if start == end:  # a table whose sizes the host does not know is as long as it may have to be
        return
    b_ptr, rank = load_address(addresses_ptr, ranks_ptr, segment, like_ptr, ALIGNED)
    scale = tl.load(scales_ptr + segment)
    b = load_tile(b_ptr, column, 0, N, rank, rank, 1, BLOCK_N, BLOCK_R, False)
    ds_ptr += strip.to(tl.int64) * P * R_MAX
    db_ptr += chunk.to(tl.int64) * N * R_MAX
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    rows, inside = rows_of_chunk(rows_ptr, start, end, BLOCK_M)
    for position in range(start, end, BLOCK_M):
        mask = tile_mask(inside, column, N, BLOCK_N)
        dy = tl.load(tile_pointers(dy_ptr, rows, column, stride_ym, stride_yn, BLOCK_N), mask=mask, other=0.0)
        s = load_tile(s_ptr, position, 0, end, R_MAX, R_MAX, 1, BLOCK_M, BLOCK_R, False)
        rows, inside = rows_of_chunk(rows_ptr, position + BLOCK_M, end, BLOCK_M)
        ds = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), WIDE, INPUT_PRECISION)
        db = dot(tl.trans(dy), s, db, WIDE, INPUT_PRECISION)
        store_tile(ds_ptr, ds * scale, position, 0, end, R_MAX, R_MAX, 1, False)
    store_tile(db_ptr, db * scale, column, 0, N, R_MAX, R_MAX, 1, False)


@triton.jit
def _segment_weight_grad_kernel(
    x_ptr,  # (rows, K)
    rows_ptr,  # (P,) int32
    chunks_ptr,  # (chunks, 3) int32: segment, first position, position after the last
    ranks_ptr,  # (segments,) int64
    scales_ptr,  # (segments,)
    thresholds_ptr,  # (segments,) int64, read only with DROPOUT
    seed_ptr,  # (1,) int64, read only with DROPOUT
    g_ptr,  # (P, R_MAX) contiguous
    out_ptr,  # (chunks, R_MAX, K) fp32 contiguous, or with TRANSPOSED (chunks, K, R_MAX)
    K,
    R_MAX,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[chunk] = scale · G[chunk]ᵀ (x ∘ mask)[rows of chunk], accumulated in fp32 with K along the rows."""
    r = tl.program_id(0) * BLOCK_R
    k = tl.program_id(1) * BLOCK_K
    chunk = tl.program_id(2)
    segment = tl.load(chunks_ptr + 3 * chunk)
    start = tl.load(chunks_ptr + 3 * chunk + 1)
    end = tl.load(chunks_ptr + 3 * chunk + 2)
    if start == end:  # a table whose sizes the host does not know is as long as it may have to be
        return
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = tl.load(thresholds_ptr + segment).to(tl.int32)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    last = tl.where(r < tl.load(ranks_ptr + segment), end, start)  # beyond this adapter's rank nothing is read
    rows, inside = rows_of_chunk(rows_ptr, start, end, BLOCK_M)
    for position in range(start, last, BLOCK_M):
        mask = tile_mask(inside, k, K, BLOCK_K)
        x = tl.load(tile_pointers(x_ptr, rows, k, stride_xm, stride_xk, BLOCK_K), mask=mask, other=0.0)
        g = load_tile(g_ptr, position, r, end, R_MAX, R_MAX, 1, BLOCK_M, BLOCK_R, False)
        rows, inside = rows_of_chunk(rows_ptr, position + BLOCK_M, end, BLOCK_M)
        if DROPOUT:
            x = tl.where(keep_mask(seed, position, k, threshold, BLOCK_M, BLOCK_K), x, tl.zeros_like(x))
        acc = dot(tl.trans(x), g, acc, WIDE, INPUT_PRECISION)
    acc *= tl.load(scales_ptr + segment)
    out_ptr += chunk.to(tl.int64) * K * R_MAX
    if TRANSPOSED:
        store_tile(out_ptr, acc, k, r, K, R_MAX, R_MAX, 1, False)
    else:
        store_tile(out_ptr, acc, k, r, K, R_MAX, 1, K, False)


@triton.jit
def _segment_reduce_kernel(
    partials_ptr,  # (chunks, R_MAX, width) fp32 contiguous, or with TRANSPOSED (chunks, width, R_MAX)
    first_ptr,  # (segments + 1,) int32: each segment's first chunk
    ranks_ptr,  # (segments,) int64
    rank_starts_ptr,  # (segments,) int64
    out_ptr,  # each segment's (R, width), or (width, R), one after the other
    width,
    R_MAX,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[segment] = the sum of its chunks, from the first to the last."""
    segment = tl.program_id(1)
    rank = tl.load(ranks_ptr + segment)
    if rank == 0:
        return
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < rank * width
    source = offs
    if TRANSPOSED:
        source = offs // rank * R_MAX + offs % rank
    size = tl.cast(width, tl.int64) * R_MAX
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for chunk in range(tl.load(first_ptr + segment), tl.load(first_ptr + segment + 1)):
        acc += tl.load(partials_ptr + chunk * size + source, mask=inside, other=0.0)
    out_ptr += tl.load(rank_starts_ptr + segment) * width
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def _chunk_length(segments: Plan, block_m: int, num_chunks: int) -> int:
    return configs.cdiv(configs.cdiv(segments.num_positions, block_m), num_chunks) * block_m


def _ds_db_config(dy: torch.Tensor, segments: Plan, factors: Factors) -> configs.DsDbConfig | None:
    N, R, dtype = dy.shape[1], factors.max_rank, factors.like.dtype
    vectorised = configs.vectorised(dy)
    config = configs.ds_db(segments.num_positions, N, R, dy.dtype, dtype, dy.device, vectorised)
    if config is None:
        return None
    wide = dtype.itemsize > dy.dtype.itemsize and (config.block_r > 16 or configs.capability(dy.device)[0] == 10)
    if not vectorised or wide:
        config = replace(config, block_n=min(config.block_n, 128))  # with 256, eight or ten spill on sm_100
    return config


def _ds_db_sizes(dy: torch.Tensor, segments: Plan, factors: Factors, config: configs.DsDbConfig) -> tuple[int, int]:
    """fp32 elements of dS's partials (none where the kernel writes dS itself), and of dB's."""
    strips = configs.cdiv(dy.shape[1], config.block_n)
    ds = configs.cdiv(strips * segments.num_positions * factors.max_rank, 4) * 4 if strips > 1 else 0
    length = _chunk_length(segments, config.block_m, config.num_chunks)
    return ds, segments.chunks(length, dy.device).count * dy.shape[1] * factors.max_rank


def segment_ds_db_workspace(dy: torch.Tensor, segments: Plan, factors: Factors) -> int:
    """How many fp32 elements `segment_ds_db` needs as its workspace."""
    config = _ds_db_config(dy, segments, factors)
    if config is not None:
        return sum(_ds_db_sizes(dy, segments, factors, config))
    return max(segment_shrink_workspace(dy, segments, factors), segment_weight_grad_workspace(dy, segments, factors))


def segment_ds_db(
    dy: torch.Tensor,
    segments: Plan,
    factors: Factors,
    s: torch.Tensor,
    ds: torch.Tensor,
    db: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """ds (positions, largest rank) = s·dY B, and db, each segment's dB = s·dYᵀ S (N, r) one after the other.

    dy (rows, N) has any strides; s and ds are contiguous and select the arithmetic (`tiling.dot`), db is flat. Where
    the partials of dS would cost more than a second pass over dY (`configs.ds_db`), two passes run. `workspace`: at
    least `segment_ds_db_workspace` elements.
    """
    config = _ds_db_config(dy, segments, factors)
    if config is None:
        segment_shrink(dy, segments, factors, ds, workspace, by_b=True)
        segment_weight_grad(dy, segments, factors, s, db, workspace, of_b=True)
        return
    P, R, N = segments.num_positions, factors.max_rank, dy.shape[1]
    assert s.shape == ds.shape == (P, R) and db.numel() == factors.total_rank * N, (s.shape, ds.shape, db.shape)
    ds_size, db_size = _ds_db_sizes(dy, segments, factors, config)
    assert workspace.numel() >= ds_size + db_size
    ds_target, db_target = workspace[:ds_size] if ds_size else ds, workspace[ds_size:]
    strips = configs.cdiv(N, config.block_n)
    chunks = segments.chunks(_chunk_length(segments, config.block_m, config.num_chunks), dy.device)
    launch(
        _segment_ds_db_kernel,
        (strips, chunks.count),
        dy,
        segments.rows(dy.device),
        chunks.table,
        factors.b,
        factors.ranks,
        factors.scalings,
        factors.like,
        s,
        ds_target,
        db_target,
        P,
        N,
        R,
        *dy.stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        ALIGNED=factors.aligned,
        WIDE=is_wide(s, dy),
        INPUT_PRECISION=configs.input_precision(dy.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if ds_size:
        reduce_partials(ds_target, ds, strips)
    _reduce(db_target, chunks, factors, db, N, transposed=True)


def _weight_grad_plan(
    x: torch.Tensor, segments: Plan, factors: Factors, wide: bool
) -> tuple[configs.WeightGradConfig, Chunks]:
    config = configs.weight_grad(segments.num_positions, x.shape[1], factors.max_rank, x.dtype, x.device, wide)
    if x.dtype.itemsize == 2 and (configs.capability(x.device)[0] == 10 or not configs.vectorised(x)):
        config = replace(config, num_warps=8)  # with 4, two spill under a mask; on sm_90 31 where rows are odd
    return config, segments.chunks(_chunk_length(segments, config.block_m, config.num_chunks), x.device)


def segment_weight_grad_workspace(x: torch.Tensor, segments: Plan, factors: Factors) -> int:
    """How many fp32 elements `segment_weight_grad` needs as its workspace."""
    either = [_weight_grad_plan(x, segments, factors, wide)[1].count for wide in (False, x.dtype.itemsize == 2)]
    return max(either) * x.shape[1] * factors.max_rank


def segment_weight_grad(
    x: torch.Tensor,
    segments: Plan,
    factors: Factors,
    g: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    *,
    of_b: bool = False,
    seed: torch.Tensor | None = None,
) -> None:
    """out, flat: each segment's dA = dSᵀ drop(x) (r, K) for g = dS, one after the other; or with `of_b` each dB =
    s·dYᵀ S (N, r) for x = dY and g = S.

    x (rows, K) has any strides, g (positions, largest rank) is contiguous and selects the arithmetic. `workspace`: at
    least `segment_weight_grad_workspace` elements.
    """
    K, R = x.shape[1], factors.max_rank
    assert g.shape == (segments.num_positions, R) and g.is_contiguous(), (g.shape, segments.num_positions, R)
    assert out.numel() == factors.total_rank * K, (out.shape, factors.total_rank, K)
    config, chunks = _weight_grad_plan(x, segments, factors, is_wide(g, x))
    assert workspace.numel() >= chunks.count * K * R
    launch(
        _segment_weight_grad_kernel,
        (configs.cdiv(R, config.block_r), configs.cdiv(K, config.block_k), chunks.count),
        x,
        segments.rows(x.device),
        chunks.table,
        factors.ranks,
        factors.scalings if of_b else factors.dropout_scales,
        factors.thresholds,
        seed,
        g,
        workspace,
        K,
        R,
        *x.stride(),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        TRANSPOSED=of_b,
        DROPOUT=seed is not None,
        WIDE=is_wide(g, x),
        INPUT_PRECISION=configs.input_precision(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _reduce(workspace, chunks, factors, out, K, transposed=of_b)


def _reduce(
    partials: torch.Tensor, chunks: Chunks, factors: Factors, out: torch.Tensor, width: int, transposed: bool
) -> None:
    segments = factors.ranks.shape[0]
    launch(
        _segment_reduce_kernel,
        (configs.cdiv(factors.max_rank * width, BLOCK), segments),
        partials,
        chunks.first,
        factors.ranks,
        factors.rank_starts,
        out,
        width,
        factors.max_rank,
        TRANSPOSED=transposed,
        BLOCK=BLOCK,
        num_warps=4,
    )
