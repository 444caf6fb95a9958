"""From few features to many: out = mask ∘ (alpha · S Wᵀ) + bias, the low-rank path's way up.

With W = lora_B it is T = s·S Bᵀ (+ b), onto which cuBLAS adds x W0ᵀ; with S = dS and W = lora_Aᵀ (a view) it is
drop′(dS A), onto which cuBLAS adds dY W0.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import keep_mask, threshold_and_scale
from .launch import launch
from .tiling import dot, is_wide, load_tile, store_tile


@triton.jit(do_not_specialize=["M", "threshold"])
def _expand_kernel(
    s_ptr,  # (M, R)
    w_ptr,  # (N, R), of S's dtype or another
    bias_ptr,  # (N,), read only with HAS_BIAS
    out_ptr,  # (M, N)
    seed_ptr,  # (1,) int64, read only with DROPOUT
    M,
    N,
    R,
    stride_sm,
    stride_sr,
    stride_wn,
    stride_wr,
    stride_bias,
    stride_om,
    stride_on,
    alpha,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out (M, N) = mask ∘ (alpha · S Wᵀ) + bias, accumulated in fp32 and rounded once."""
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        s = load_tile(s_ptr, row, r, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
        w = load_tile(w_ptr, column, r, N, R, stride_wn, stride_wr, BLOCK_N, BLOCK_R, False)
        acc = dot(s, tl.trans(w), acc, WIDE, INPUT_PRECISION)
    acc *= alpha
    if DROPOUT:
        seed = tl.load(seed_ptr)
        acc = tl.where(keep_mask(seed, row, column, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    if HAS_BIAS:
        columns = column + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    store_tile(out_ptr, acc, row, column, M, N, stride_om, stride_on, False)


def expand(
    s: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    *,
    alpha: float = 1.0,
    bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    config: configs.ExpandConfig | None = None,
) -> None:
    """out (M, N) = drop(alpha · S Wᵀ) + bias for s (M, r), w (N, r) and bias (N,), all with any strides.

    The dtype of s selects the arithmetic: in out's dtype, to which w is cast in registers; with s in fp32 and out in
    half precision both keep their digits (`tiling.dot`). Without `seed` nothing is dropped; with it,
    element (row, column) is kept where x's element (row, column) was in the forward pass. Needs no workspace.
    """
    M, R = s.shape
    N = w.shape[0]
    assert (*w.shape, *out.shape) == (N, R, M, N), (s.shape, w.shape, out.shape)
    if M == 0:
        return
    config = config or configs.expand(M, N, R, out.dtype, w.dtype, s.device)
    threshold, dropout_scale = threshold_and_scale(dropout_p) if seed is not None else (0, 1.0)
    grid = (configs.cdiv(M, config.block_m), configs.cdiv(N, config.block_n))
    launch(
        _expand_kernel,
        grid,
        s,
        w,
        bias,
        out,
        seed,
        M,
        N,
        R,
        *s.stride(),
        *w.stride(),
        0 if bias is None else bias.stride(0),
        *out.stride(),
        float(alpha) * dropout_scale,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        HAS_BIAS=bias is not None,
        DROPOUT=seed is not None,
        WIDE=is_wide(s, out),
        INPUT_PRECISION=configs.input_precision(s.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
