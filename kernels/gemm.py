"""The frozen layer's matrix product with the low-rank term inside, forward and backward: one kernel.

    forward     Y  = X W0ᵀ + bias + s·S Bᵀ        S = drop(X) Aᵀ given, or computed on the way
    backward    dX = dY W0 + drop′(dS A)

Both are out = x wᵀ + bias + scale·mask(s bᵀ): backward reads W0 and A as transposed views, which costs nothing. The
low-rank term is one more `tl.dot` per tile, after the loop over K, which saves the second reading and writing of the
output that a separate low-rank product costs. docs/kernels/gemm.md counts the bytes.

Rounding. The low-rank term is accumulated apart in fp32, scaled there, and added to the tile's accumulator, so the
scale is never rounded into an operand (s·B in bf16 would add an error of its own) and may be 0 or negative, and a
dropout mask on that term touches nothing else. A second accumulator as wide as the tile does not fit into the
registers: the finished tile leaves in slices of columns, and the second accumulator is a slice wide.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# A launch takes options that the kernel's signature does not name, and device functions are not typed.

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .dropout import keep_mask, threshold_and_scale
from .launch import launch
from .tiling import dot, grouped_tile, is_wide, load_tile, store_tile

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns: free where a thread holds both, as in wgmma's layout."""
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def column_slices(tile, COUNT: tl.constexpr):
    """The tile cut into COUNT (1, 2 or 4) slices of neighbouring columns, from left to right."""
    if COUNT == 1:
        slices = (tile,)
    elif COUNT == 2:
        slices = halves(tile)
    else:
        left, right = halves(tile)
        slices = halves(left) + halves(right)
    return slices


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_gemm_kernel(
    x_ref,  # (M, K): descriptor of blocks (BLOCK_M, BLOCK_K), or pointer
    w_ref,  # (N, K): descriptor of blocks (BLOCK_N, BLOCK_K), or (BLOCK_K, BLOCK_N) with W_BY_COLUMN, or pointer
    bias_ptr,  # (N,), or None
    a_ptr,  # (R, K) with COMPUTE_S, else None
    s_ptr,  # (M, R): read, or written with COMPUTE_S
    b_ptr,  # (N, R)
    seed_ptr,  # (1,) int64 where a dropout flag is set, else None
    out_ref,  # (M, N): descriptor of blocks (BLOCK_M, BLOCK_N // SPLIT), or pointer
    M,
    N,
    K,
    R,
    scale,  # of the low-rank term
    threshold,  # an element is dropped where its 16 random bits are below it
    dropout_scale,  # of what is kept
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_ar,
    stride_ak,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_om,
    stride_on,
    DTYPE: tl.constexpr,  # of x, w and out; other operands are cast to it, but for s and b with WIDE
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" or "tf32"
    DESCRIPTORS: tl.constexpr,  # x_ref, w_ref and out_ref are descriptors
    W_BY_COLUMN: tl.constexpr,  # w's unit stride, if it has one, runs along N
    COMPUTE_S: tl.constexpr,
    DROP_X: tl.constexpr,  # with COMPUTE_S: S is made of drop(x)
    DROP_LOW_RANK: tl.constexpr,  # the mask lies on the low-rank term
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # a power of two >= 16
    RANK_LOOP: tl.constexpr,  # whether R > BLOCK_R
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out = x wᵀ + bias + scale·mask(s bᵀ), with s = drop(x) aᵀ where it is computed. Accumulates in fp32."""
    SLICE: tl.constexpr = BLOCK_N // SPLIT
    if DROP_X or DROP_LOW_RANK:
        seed = tl.load(seed_ptr)
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m0 = pid_m * BLOCK_M
        n0 = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        s_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        b_tiles = ()
        if not RANK_LOOP:
            # Asked for together and before the loop over K, they are in shared memory when it ends; asked for after it,
            # every slice would wait for memory on its own.
            if not COMPUTE_S:
                s_tile = load_tile(s_ptr, m0, 0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
            for i in tl.static_range(SPLIT):
                b_tiles += (load_tile(b_ptr, n0 + i * SLICE, 0, N, R, stride_bn, stride_br, SLICE, BLOCK_R, False),)
        for k0 in tl.range(0, K, BLOCK_K):
            x_tile = load_tile(x_ref, m0, k0, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTORS)
            if W_BY_COLUMN:
                w_tile = load_tile(w_ref, k0, n0, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N, DESCRIPTORS)
            else:
                w_tile = load_tile(w_ref, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, DESCRIPTORS).T
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
            if COMPUTE_S:
                if DROP_X:
                    x_tile = tl.where(keep_mask(seed, m0, k0, threshold, BLOCK_M, BLOCK_K), x_tile, 0.0)
                a_tile = load_tile(a_ptr, 0, k0, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False).to(DTYPE)
                s_acc = tl.dot(x_tile, a_tile.T, s_acc, input_precision=PRECISION)
        if COMPUTE_S:
            if DROP_X:
                s_acc *= dropout_scale
            s_tile = s_acc.to(DTYPE)
            if pid_n == 0:
                store_tile(s_ptr, s_tile, m0, 0, M, R, stride_sm, stride_sr, False)

        bias_tiles = ()
        if bias_ptr is not None:
            for i in tl.static_range(SPLIT):
                columns = n0 + i * SLICE + tl.arange(0, SLICE)
                bias_tiles += (tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=columns < N, other=0.0),)
        slices = column_slices(acc, SPLIT)
        for i in tl.static_range(SPLIT):
            column = n0 + i * SLICE
            low_rank = tl.zeros((BLOCK_M, SLICE), dtype=tl.float32)
            if RANK_LOOP:
                for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                    s_tile = load_tile(s_ptr, m0, r0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
                    b_tile = load_tile(b_ptr, column, r0, N, R, stride_bn, stride_br, SLICE, BLOCK_R, False)
                    low_rank = dot(s_tile if WIDE else s_tile.to(DTYPE), b_tile.T, low_rank, WIDE, PRECISION)
            else:
                low_rank = dot(s_tile if WIDE else s_tile.to(DTYPE), b_tiles[i].T, low_rank, WIDE, PRECISION)
            if DROP_LOW_RANK:
                keep = keep_mask(seed, m0, column, threshold, BLOCK_M, SLICE)
                low_rank = tl.where(keep, low_rank, 0.0) * dropout_scale
            out_tile = slices[i] + scale * low_rank
            if bias_ptr is not None:
                out_tile += bias_tiles[i].to(tl.float32)[None, :]
            store_tile(out_ref, out_tile, m0, column, M, N, stride_om, stride_on, DESCRIPTORS)


def _describable(matrix: torch.Tensor) -> bool:
    """Whether rows can be fetched by a descriptor, or 16 bytes at a time: aligned, contiguous, not overlapping."""
    itemsize = matrix.element_size()
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * itemsize % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _descriptor(matrix: torch.Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_columns])


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    s: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    seed: torch.Tensor | None,
    dropout_p: float,
    config: configs.GemmConfig | None,
) -> None:
    """out (M, N) = x (M, K) w (N, K)ᵀ + bias + scale·mask(s (M, r) b (N, r)ᵀ).

    With a (r, K), s is not read but written: s = drop(x) aᵀ.
    """
    M, K = x.shape
    N, R = b.shape
    assert w.shape == (N, K) and s.shape == (M, R) and out.shape == (M, N), (x.shape, w.shape, s.shape, out.shape)
    assert bias is None or bias.shape == (N,), bias.shape
    assert a is None or a.shape == (R, K), a.shape
    assert x.dtype == w.dtype == out.dtype and x.dtype in TRITON_DTYPES, (x.dtype, w.dtype, out.dtype)
    assert K > 0 and N > 0 and R > 0
    if M == 0:
        return
    w_by_column = w.stride(0) == 1 and w.stride(1) != 1
    w_rows = w.t() if w_by_column else w
    aligned = _describable(x) and _describable(w_rows) and _describable(out)
    if config is None:
        wide = b.dtype.itemsize > x.dtype.itemsize
        config = configs.gemm(M, N, R, x.dtype, x.device, aligned=aligned, compute_s=a is not None, wide_adapters=wide)
    assert a is None or config.block_r >= R, (R, config)
    slice_n = config.block_n // config.epilogue_split
    descriptors = aligned and x.dtype != torch.float32 and configs.has_tma(configs.capability(x.device))
    w_block = (config.block_k, config.block_n) if w_by_column else (config.block_n, config.block_k)
    threshold, dropout_scale = threshold_and_scale(dropout_p) if seed is not None else (0, 1.0)
    tiles = configs.cdiv(M, config.block_m) * configs.cdiv(N, config.block_n)
    grid = (min(tiles, configs.num_sms(x.device) * config.programs_per_sm),)
    launch(
        _lora_gemm_kernel,
        grid,
        _descriptor(x, config.block_m, config.block_k) if descriptors else x,
        _descriptor(w_rows, *w_block) if descriptors else w,
        bias,
        a,
        s,
        b,
        seed,
        _descriptor(out, config.block_m, slice_n) if descriptors else out,
        M,
        N,
        K,
        R,
        float(scale),
        threshold,
        dropout_scale,
        *x.stride(),
        *w.stride(),
        0 if bias is None else bias.stride(0),
        *((0, 0) if a is None else a.stride()),
        *s.stride(),
        *b.stride(),
        *out.stride(),
        DTYPE=TRITON_DTYPES[x.dtype],
        WIDE=a is None and is_wide(s, out),
        PRECISION=configs.input_precision(x.dtype),
        DESCRIPTORS=descriptors,
        W_BY_COLUMN=w_by_column,
        COMPUTE_S=a is not None,
        DROP_X=a is not None and seed is not None,
        DROP_LOW_RANK=a is None and seed is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        # With WIDE and no loop Triton 3.7 compiles nothing for sm_100 (sixteen instructions, and no product among them)
        # and Triton 3.9 spills on sm_80 and sm_90.
        RANK_LOOP=config.block_r < R or is_wide(s, out),
        GROUP_M=config.group_m,
        SPLIT=config.epilogue_split,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def forward_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    *,
    config: configs.GemmConfig | None = None,
) -> None:
    """out (M, N) = x Wᵀ + bias + scaling·S Bᵀ for x (M, K), weight (N, K), s (M, r) and lora_B (N, r).

    x, weight and out have one dtype (bf16, fp16, fp32). s in that dtype has lora_B cast to it in registers; in fp32
    for x in half precision both keep their digits (`tiling.dot`). bias may have any dtype. Any strides; nothing is
    allocated.
    """
    _launch(x, weight, bias, None, s, lora_B, out, scaling, None, 0.0, config)


def forward_gemm_with_s(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    out: torch.Tensor,
    s: torch.Tensor,
    scaling: float,
    *,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    config: configs.GemmConfig | None = None,
) -> None:
    """s (M, r) = drop(x) Aᵀ, and out (M, N) = x Wᵀ + bias + scaling·S Bᵀ, in one kernel that reads x once.

    As `forward_gemm`, with lora_A (r, K) and r <= configs.MAX_RANK_INSIDE. The S in the sum is rounded to x's dtype,
    like the one stored. With `seed` x is dropped with probability dropout_p on the way into S (and nowhere else);
    every column of tiles makes that mask again, so a separate pass for S is the better choice where N is large.
    """
    assert lora_A.shape[0] <= configs.MAX_RANK_INSIDE, lora_A.shape
    _launch(x, weight, bias, lora_A, s, lora_B, out, scaling, seed, dropout_p, config)


def input_grad_gemm(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ds: torch.Tensor,
    lora_A: torch.Tensor,
    out: torch.Tensor,
    *,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    config: configs.GemmConfig | None = None,
) -> None:
    """out (M, K) = dY W + drop′(dS A) for dy (M, N), weight (N, K), ds (M, r) = s·dY B and lora_A (r, K).

    ds selects the arithmetic as s does in `forward_gemm`. With `seed` the mask of the forward pass is made again and
    lies on the second term only.
    """
    _launch(dy, weight.t(), None, None, ds, lora_A.t(), out, 1.0, seed, dropout_p, config)
