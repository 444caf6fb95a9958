"""DoRA's norms: ‖W0 + s·B A‖ of every row, in one pass over W0.

    n_i = √(Σ_k (W0_ik + s·Σ_r B_ir A_rk)²)

B A exists one tile at a time, in registers. The other way, ‖W0_i‖² + 2s⟨(W0 Aᵀ)_i, B_i⟩ + s²·B_iᵀ A Aᵀ B_i, costs the
same 2·N·K·r FLOPs and reads W0 as often, but it subtracts: a row that the adapter nearly cancels would have to be found
and done again. Here nothing cancels, and no norm of W0 is kept that could go stale.

DoRA's scaling of a LoRA layer's output, forward and backward, each one pass over memory.

    y = (m/n) ∘ z + b                                    `scale`: z read, y written (which may be z)
    dz = (m/n) ∘ dY, dm = Σ dY ∘ z / n, db = Σ dY        `scale_backward`: dY and z read, dz written

m, n and b (N,) are by column of z (M, N); the sums run over its rows, in fp32 and in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import configs
from .launch import launch
from .tiling import load_tile, reduce_partials, store_tile

ROOT_BLOCK = 256


@dataclass(frozen=True)
class DoraNormConfig:
    """A program owns block_n rows of W0 and one of num_splits parts of K; the rank is taken in steps of block_r."""

    block_n: int
    block_k: int
    block_r: int
    num_splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _dora_norm_kernel(
    w_ptr,  # (N, K)
    a_ptr,  # (R, K), of W0's dtype or another
    b_ptr,  # (N, R), of A's dtype
    out_ptr,  # (splits, N) fp32: the norms of the splits' parts
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    k_per_split,  # a multiple of BLOCK_K
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_LOOP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[split, i] = √(Σ_k (W0 + scale · B A)²_ik) over the split's columns; squares in fp64, where those of no fp32
    number overflow or vanish."""
    row = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float64)
    if not RANK_LOOP:
        b = load_tile(b_ptr, row, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False)
    k_start = split * k_per_split
    for k in range(k_start, min(K, k_start + k_per_split), BLOCK_K):
        delta = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        if RANK_LOOP:
            for r in range(0, R, BLOCK_R):
                b = load_tile(b_ptr, row, r, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False)
                a = load_tile(a_ptr, r, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
                delta = tl.dot(b, a, delta, input_precision=INPUT_PRECISION)
        else:
            a = load_tile(a_ptr, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
            delta = tl.dot(b, a, delta, input_precision=INPUT_PRECISION)
        w = load_tile(w_ptr, row, k, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False).to(tl.float32)
        total = (w + scale * delta).to(tl.float64)
        squares += tl.sum(total * total, axis=1)
    rows = row + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + split * N + rows, tl.sqrt(squares).to(tl.float32), mask=rows < N)


@triton.jit
def _root_kernel(
    partials_ptr,  # (splits, N) fp32, contiguous
    out_ptr,  # (N,) fp32, contiguous
    N,
    splits,
    BLOCK: tl.constexpr,
):
    """out = √(partials[0]² + partials[1]² + …), from the first to the last."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for split in range(splits):
        part = tl.load(partials_ptr + split * N + offs, mask=offs < N, other=0.0).to(tl.float64)
        acc += part * part
    tl.store(out_ptr + offs, tl.sqrt(acc).to(tl.float32), mask=offs < N)


def norm_config(weight: torch.Tensor, lora_A: torch.Tensor) -> DoraNormConfig:
    """The launch for weight (N, K) and lora_A (r, K)."""
    N, K = weight.shape
    target, rank = configs.capability(weight.device), max(16, configs.power_of_two_at_least(lora_A.shape[0]))
    if target == configs.INTERPRETER:
        block_n, block_k, block_r, num_warps, num_stages = 16, 32, min(rank, 32), 4, 2
    else:
        # A is read once for every block of rows: with 32 of them that is, at r = 16 in fp32, as much from L2 as W0 is
        # from memory. fp32 factors are held as three tf32 ones: with 4 warps steps of 32 ranks spill (82 stores and
        # loads), and what is read element by element does with 8, at 128 columns (23).
        aligned = configs.vectorised(weight, lora_A)
        block_n, block_k, block_r, num_warps, num_stages = 32, 128 if aligned else 64, min(rank, 32), 8, 3
    num_splits = configs._parts(configs.cdiv(N, block_n), configs.cdiv(K, block_k), configs.num_sms(weight.device))
    return DoraNormConfig(block_n, block_k, block_r, num_splits, num_warps, num_stages)


def norm_workspace(weight: torch.Tensor, lora_A: torch.Tensor) -> int:
    """How many fp32 elements `dora_norm` needs as its workspace."""
    num_splits = norm_config(weight, lora_A).num_splits
    return num_splits * weight.shape[0] if num_splits > 1 else 0


def dora_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    """out (N,) = ‖W0 + s·B A‖ of every row, fp32 and contiguous, for weight (N, K), lora_A (r, K) and lora_B (N, r),
    all with any strides.

    fp32 factors are multiplied as three tf32 products, to fp32's accuracy (2e-7 of B A). `workspace`: fp32, at least
    `norm_workspace(weight, lora_A)` elements.
    """
    N, K = weight.shape
    R = lora_A.shape[0]
    assert (*lora_A.shape, *lora_B.shape, *out.shape) == (R, K, N, R, N), (weight.shape, lora_A.shape, lora_B.shape)
    assert lora_A.dtype == lora_B.dtype
    assert out.dtype == torch.float32 and out.is_contiguous()
    config = norm_config(weight, lora_A)
    splits = config.num_splits
    target = out
    if splits > 1:
        assert workspace is not None, "a split of K needs a workspace"
        assert workspace.numel() >= splits * N
        target = workspace
    blocks = configs.cdiv(K, config.block_k)
    launch(
        _dora_norm_kernel,
        (configs.cdiv(N, config.block_n), splits),
        weight,
        lora_A,
        lora_B,
        target,
        N,
        K,
        R,
        *weight.stride(),
        *lora_A.stride(),
        *lora_B.stride(),
        configs.cdiv(blocks, splits) * config.block_k,
        float(scaling),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        RANK_LOOP=config.block_r < R,
        INPUT_PRECISION="tf32x3" if lora_A.dtype == torch.float32 else "ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        launch(_root_kernel, (configs.cdiv(N, ROOT_BLOCK),), target, out, N, splits, BLOCK=ROOT_BLOCK, num_warps=4)


@dataclass(frozen=True)
class ScaleConfig:
    """A program owns a block of block_n columns and one of num_chunks parts of the rows, block_m of them at a time."""

    block_m: int
    block_n: int
    num_chunks: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_columns(ref, columns, N, stride):
    return tl.load(ref + columns.to(tl.int64) * stride, mask=columns < N, other=0.0).to(tl.float32)


@triton.jit
def _load_factor(m_ptr, n_ptr, columns, N, stride_m):
    """(m/n, n), (0, ∞) where n is 0: the row has no direction. (0, 1) beyond the matrix."""
    norm = tl.load(n_ptr + columns, mask=columns < N, other=1.0)
    norm = tl.where(norm == 0.0, float("inf"), norm)
    return _load_columns(m_ptr, columns, N, stride_m) / norm, norm


@triton.jit(do_not_specialize=["M"])
def _scale_kernel(
    z_ptr,  # (M, N)
    m_ptr,  # (N,)
    n_ptr,  # (N,) fp32, contiguous
    bias_ptr,  # (N,), read only with HAS_BIAS
    y_ptr,  # (M, N), may be z
    M,
    N,
    stride_zm,
    stride_zn,
    stride_m,
    stride_bias,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y (M, N) = (m/n) ∘ z + b, in fp32 and rounded once."""
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    factor, _ = _load_factor(m_ptr, n_ptr, columns, N, stride_m)
    y = load_tile(z_ptr, row, column, M, N, stride_zm, stride_zn, BLOCK_M, BLOCK_N, False).to(tl.float32)
    y *= factor[None, :]
    if HAS_BIAS:
        y += _load_columns(bias_ptr, columns, N, stride_bias)[None, :]
    store_tile(y_ptr, y, row, column, M, N, stride_ym, stride_yn, False)


@triton.jit(do_not_specialize=["M"])
def _scale_backward_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N), read only with MAGNITUDE
    m_ptr,  # (N,)
    n_ptr,  # (N,) fp32, contiguous
    dz_ptr,  # (M, N), written only with INPUT
    sums_ptr,  # (chunks, 2, N) fp32: dm and db, or partials of them
    M,
    N,
    stride_dm,
    stride_dn,
    stride_zm,
    stride_zn,
    stride_m,
    stride_om,
    stride_on,
    m_per_chunk,  # a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """dz = (m/n) ∘ dY; sums[chunk, 0] = Σ dY ∘ z / n and sums[chunk, 1] = Σ dY over the chunk's rows."""
    column = tl.program_id(0) * BLOCK_N
    chunk = tl.program_id(1)
    columns = column + tl.arange(0, BLOCK_N)
    factor, norm = _load_factor(m_ptr, n_ptr, columns, N, stride_m)
    dm = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    start = chunk * m_per_chunk
    for row in range(start, min(M, start + m_per_chunk), BLOCK_M):
        dy = load_tile(dy_ptr, row, column, M, N, stride_dm, stride_dn, BLOCK_M, BLOCK_N, False).to(tl.float32)
        if MAGNITUDE:
            z = load_tile(z_ptr, row, column, M, N, stride_zm, stride_zn, BLOCK_M, BLOCK_N, False)
            dm += dy * z.to(tl.float32)
        if BIAS:
            db += dy
        if INPUT:
            store_tile(dz_ptr, dy * factor[None, :], row, column, M, N, stride_om, stride_on, False)
    sums_ptr += chunk.to(tl.int64) * 2 * N
    if MAGNITUDE:
        tl.store(sums_ptr + columns, tl.sum(dm, axis=0) / norm, mask=columns < N)
    if BIAS:
        tl.store(sums_ptr + N + columns, tl.sum(db, axis=0), mask=columns < N)


def scale_config(z: torch.Tensor) -> ScaleConfig:
    """The launch of both kernels for z (M, N)."""
    M, N = z.shape
    if configs.capability(z.device) == configs.INTERPRETER:
        block_m, block_n = 16, 32
    else:
        # Two fp32 accumulators of a block: 32 registers a thread with 4 warps. Twice that spilled where z is read
        # element by element (2 stores and loads).
        block_m, block_n = 16, 64 if z.dtype == torch.float32 else 128
    programs, blocks = configs.cdiv(N, block_n), configs.cdiv(M, block_m)
    return ScaleConfig(block_m, block_n, configs._parts(programs, blocks, 4 * configs.num_sms(z.device)), 4, 3)


def scale(
    z: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """y (M, N), which may be z, = (m/n) ∘ z + b for magnitude (N,), norm (N,) and bias (N,) or None.

    Any strides and float dtypes, but for norm: fp32 and contiguous.
    """
    M, N = z.shape
    assert y.shape == z.shape and magnitude.shape == norm.shape == (N,), (z.shape, y.shape, magnitude.shape, norm.shape)
    assert norm.dtype == torch.float32 and norm.is_contiguous()
    if M == 0:
        return
    config = scale_config(z)
    launch(
        _scale_kernel,
        (configs.cdiv(M, config.block_m), configs.cdiv(N, config.block_n)),
        z,
        magnitude,
        norm,
        bias,
        y,
        M,
        N,
        *z.stride(),
        magnitude.stride(0),
        0 if bias is None else bias.stride(0),
        *y.stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HAS_BIAS=bias is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def scale_backward_workspace(dy: torch.Tensor) -> int:
    """How many fp32 elements `scale_backward` needs as its workspace."""
    chunks = scale_config(dy).num_chunks
    return chunks * 2 * dy.shape[1] if chunks > 1 else 0


def scale_backward(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    magnitude: torch.Tensor,
    norm: torch.Tensor,
    dz: torch.Tensor | None,
    sums: torch.Tensor,
    workspace: torch.Tensor | None = None,
    *,
    needs_bias: bool = False,
) -> None:
    """dz (M, N) = (m/n) ∘ dY; sums (2, N): Σ dY ∘ z / n where z is given, and Σ dY with `needs_bias`.

    sums and norm: fp32, contiguous; the others any strides and float dtypes. A sum that is not asked for is undefined.
    `workspace`: fp32, at least `scale_backward_workspace(dy)` elements.
    """
    M, N = dy.shape
    assert magnitude.shape == norm.shape == (N,) and sums.shape == (2, N), (magnitude.shape, norm.shape, sums.shape)
    assert norm.dtype == sums.dtype == torch.float32 and norm.is_contiguous() and sums.is_contiguous()
    config = scale_config(dy)
    chunks = config.num_chunks
    target = sums
    if chunks > 1:
        assert workspace is not None, "a split of the rows needs a workspace"
        assert workspace.numel() >= chunks * 2 * N
        target = workspace
    blocks = configs.cdiv(M, config.block_m)
    launch(
        _scale_backward_kernel,
        (configs.cdiv(N, config.block_n), chunks),
        dy,
        z,
        magnitude,
        norm,
        dz,
        target,
        M,
        N,
        *dy.stride(),
        *((0, 0) if z is None else z.stride()),
        magnitude.stride(0),
        *((0, 0) if dz is None else dz.stride()),
        configs.cdiv(blocks, chunks) * config.block_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        INPUT=dz is not None,
        MAGNITUDE=z is not None,
        BIAS=needs_bias,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if chunks > 1:
        reduce_partials(target, sums, chunks)
