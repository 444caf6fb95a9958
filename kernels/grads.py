"""The low-rank gradients: dS = s·dY B and dB = s·dYᵀ S in one pass over dY, and dA = dSᵀ drop(x).

`ds_and_db` reads dY once. A program owns a strip of columns and a chunk of rows: it keeps its part of dB in registers
over the chunk, and writes a strip's contribution to dS for every row. Both leave as fp32 partials that are added in a
fixed order. The partials of dS are 8·r bytes per row and strip, written and read; above the rank where that costs
about as much as reading dY again (`configs.ds_db` decides), dS is a `shrink` of dY and dB a `weight_grad`, each with
a pass of its own.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import keep_mask, threshold_and_scale
from .launch import launch, parts
from .shrink import shrink, shrink_workspace
from .tiling import dot, is_wide, load_tile, reduce_partials, store_sum, store_tile


@triton.jit(do_not_specialize=["M"])
def _ds_db_kernel(
    dy_ptr,  # (M, N)
    b_ptr,  # (N, R), of dY's dtype or another
    s_ptr,  # (M, R)
    ds_ptr,  # (strips, M, R): dS where there is one strip, else fp32 partials
    db_ptr,  # (N, R)
    db_partials_ptr,  # (chunks, N, R) fp32, contiguous; None where there is one chunk
    counters_ptr,  # (strips,) int32, zeros
    M,
    N,
    R,
    stride_ym,
    stride_yn,
    stride_bn,
    stride_br,
    stride_sm,
    stride_sr,
    stride_ds_strip,
    stride_ds_m,
    stride_ds_r,
    stride_db_n,
    stride_db_r,
    rows_per_chunk,  # a multiple of BLOCK_M
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dS[strip] (M, R) = scaling · dY[:, strip] B[strip] and dB (N, R) = scaling · dYᵀ S, summed over the chunks."""
    strip = tl.program_id(0)
    chunk = tl.program_id(1)
    column = strip * BLOCK_N
    b = load_tile(b_ptr, column, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False)
    ds_ptr += strip.to(tl.int64) * stride_ds_strip
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    row_start = chunk * rows_per_chunk
    for row in range(row_start, min(M, row_start + rows_per_chunk), BLOCK_M):
        dy = load_tile(dy_ptr, row, column, M, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N, False)
        s = load_tile(s_ptr, row, 0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
        ds = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), WIDE, INPUT_PRECISION)
        db = dot(tl.trans(dy), s, db, WIDE, INPUT_PRECISION)
        store_tile(ds_ptr, ds * scaling, row, 0, M, R, stride_ds_m, stride_ds_r, False)
    if db_partials_ptr is not None:
        counters_ptr += strip
    store_sum(
        db * scaling,
        db_ptr,
        db_partials_ptr,
        counters_ptr,
        chunk,
        tl.num_programs(1),
        column,
        0,
        N,
        R,
        stride_db_n,
        stride_db_r,
    )


@triton.jit(do_not_specialize=["M", "threshold"])
def _weight_grad_kernel(
    x_ptr,  # (M, K)
    g_ptr,  # (M, R)
    out_ptr,  # (K, R)
    partials_ptr,  # (chunks, K, R) fp32, contiguous; None where there is one chunk
    counters_ptr,  # (blocks of out,) int32, zeros
    seed_ptr,  # (1,) int64, read only with DROPOUT
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_gm,
    stride_gr,
    stride_ok,
    stride_or,
    rows_per_chunk,  # a multiple of BLOCK_M
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out (K, R) = scale · (x ∘ mask)ᵀ G, accumulated in fp32 over each chunk of the rows, then over the chunks.

    The long side K is the one that fills the 64 rows of a tensor-core instruction on Hopper; r as rows would waste
    most of them.
    """
    r = tl.program_id(0) * BLOCK_R  # innermost: the programs that share a block of x run together and find it in L2
    k = tl.program_id(1) * BLOCK_K
    chunk = tl.program_id(2)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    row_start = chunk * rows_per_chunk
    for row in range(row_start, min(M, row_start + rows_per_chunk), BLOCK_M):
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        g = load_tile(g_ptr, row, r, M, R, stride_gm, stride_gr, BLOCK_M, BLOCK_R, False)
        if DROPOUT:
            x = tl.where(keep_mask(seed, row, k, threshold, BLOCK_M, BLOCK_K), x, tl.zeros_like(x))
        acc = dot(tl.trans(x), g, acc, WIDE, INPUT_PRECISION)
    if partials_ptr is not None:
        counters_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    store_sum(
        acc * scale, out_ptr, partials_ptr, counters_ptr, chunk, tl.num_programs(2), k, r, K, R, stride_ok, stride_or
    )


def weight_grad_workspace(x: torch.Tensor, rank: int, config: configs.WeightGradConfig | None = None) -> int:
    """How many fp32 elements `weight_grad` needs as its workspace."""
    either = [configs.weight_grad(*x.shape, rank, x.dtype, x.device, wide) for wide in (False, x.dtype.itemsize == 2)]
    chunks = config.num_chunks if config else max(one.num_chunks for one in either)
    return chunks * x.shape[1] * rank if chunks > 1 else 0


def weight_grad(
    x: torch.Tensor,
    g: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    config: configs.WeightGradConfig | None = None,
) -> None:
    """out (K, r) = scale · drop(x)ᵀ G for x (M, K) and g (M, r), all with any strides: pass `grad_A.t()` for dA.

    g is in x's dtype, or in fp32 for x in half precision: then it keeps its digits (`tiling.dot`). out has any float
    dtype: it is rounded once, from fp32. Without `seed` nothing is dropped. `workspace`: fp32, at least
    `weight_grad_workspace(x, r)` elements.
    """
    M, K = x.shape
    R = g.shape[1]
    assert (*g.shape, *out.shape) == (M, R, K, R), (x.shape, g.shape, out.shape)
    if M == 0:
        out.zero_()
        return
    config = config or configs.weight_grad(M, K, R, x.dtype, x.device, is_wide(g, x))
    threshold, dropout_scale = threshold_and_scale(dropout_p) if seed is not None else (0, 1.0)
    chunks = config.num_chunks
    grid = (configs.cdiv(R, config.block_r), configs.cdiv(K, config.block_k), chunks)
    launch(
        _weight_grad_kernel,
        grid,
        x,
        g,
        out,
        *parts(workspace, chunks, K * R, grid[0] * grid[1]),
        seed,
        M,
        K,
        R,
        *x.stride(),
        *g.stride(),
        *out.stride(),
        configs.cdiv(configs.cdiv(M, config.block_m), chunks) * config.block_m,
        float(scale) * dropout_scale,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        DROPOUT=seed is not None,
        WIDE=is_wide(g, x),
        INPUT_PRECISION=configs.input_precision(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def ds_and_db_workspace(
    dy: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    needs_ds: bool = True,
    needs_db: bool = True,
    config: configs.DsDbConfig | None = None,
) -> int:
    """How many fp32 elements `ds_and_db` needs as its workspace."""
    M, N = dy.shape
    R = lora_B.shape[1]
    if needs_ds and needs_db:
        config = config or configs.ds_db(M, N, R, dy.dtype, lora_B.dtype, dy.device, configs.vectorised(dy))
        if config is not None:
            return sum(_partial_sizes(M, N, R, config))
    ds = shrink_workspace(dy, lora_B.t()) if needs_ds else 0
    db = weight_grad_workspace(dy, R) if needs_db else 0
    return max(ds, db)


def _partial_sizes(M: int, N: int, R: int, config: configs.DsDbConfig) -> tuple[int, int]:
    """fp32 elements of dS's partials and of dB's; none where the kernel can write the result itself."""
    strips = configs.cdiv(N, config.block_n)
    ds = configs.cdiv(strips * M * R, 4) * 4 if strips > 1 else 0  # dB's begin at a multiple of 16 bytes
    db = config.num_chunks * N * R if config.num_chunks > 1 else 0
    return ds, db


def ds_and_db(
    dy: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor | None,
    ds: torch.Tensor | None,
    db: torch.Tensor | None,
    workspace: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    config: configs.DsDbConfig | None = None,
) -> None:
    """ds (M, r) = scaling · dY B and db (N, r) = scaling · dYᵀ S for dy (M, N), lora_B (N, r) and s (M, r).

    Any strides. Pass None for the result that is not needed (and None for s without db). s and ds have one dtype, which
    selects the arithmetic: dy's, to which lora_B is cast in registers, or fp32 for dy in half precision, where s and an
    fp32 lora_B keep their digits (`tiling.dot`). db has any float dtype and is rounded once, from fp32. `workspace`:
    fp32, at least as many elements as `ds_and_db_workspace` says for the same arguments.
    """
    M, N = dy.shape
    R = lora_B.shape[1]
    assert lora_B.shape == (N, R), (dy.shape, lora_B.shape)
    if ds is not None and db is not None and M > 0:
        config = config or configs.ds_db(M, N, R, dy.dtype, lora_B.dtype, dy.device, configs.vectorised(dy))
        if config is not None:
            assert s is not None
            _ds_and_db_in_one_pass(dy, lora_B, s, ds, db, workspace, scaling, config)
            return
    if ds is not None:
        shrink(dy, lora_B.t(), ds, workspace, scale=scaling)
    if db is not None:
        assert s is not None
        weight_grad(dy, s, db, workspace, scale=scaling)


def _ds_and_db_in_one_pass(
    dy: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    ds: torch.Tensor,
    db: torch.Tensor,
    workspace: torch.Tensor | None,
    scaling: float,
    config: configs.DsDbConfig,
) -> None:
    M, N = dy.shape
    R = lora_B.shape[1]
    assert (*s.shape, *ds.shape, *db.shape) == (M, R, M, R, N, R), (s.shape, ds.shape, db.shape)
    assert config.block_r >= R, (R, config)
    strips = configs.cdiv(N, config.block_n)
    chunks = config.num_chunks
    ds_size, db_size = _partial_sizes(M, N, R, config)
    ds_target, ds_strides = ds, (0, *ds.stride())
    if ds_size or db_size:
        assert workspace is not None, "strips and chunks need a workspace"
        assert workspace.numel() >= ds_size + db_size
        if ds_size:
            ds_target, ds_strides, workspace = workspace[:ds_size], (M * R, R, 1), workspace[ds_size:]
    launch(
        _ds_db_kernel,
        (strips, chunks),
        dy,
        lora_B,
        s,
        ds_target,
        db,
        *parts(workspace, chunks, N * R, strips),
        M,
        N,
        R,
        *dy.stride(),
        *lora_B.stride(),
        *s.stride(),
        *ds_strides,
        *db.stride(),
        configs.cdiv(configs.cdiv(M, config.block_m), chunks) * config.block_m,
        float(scaling),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        WIDE=is_wide(s, dy),
        INPUT_PRECISION=configs.input_precision(dy.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if ds_size:
        reduce_partials(ds_target, ds, strips)
