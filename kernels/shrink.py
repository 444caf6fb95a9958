"""From many features to few: out = scale · drop(x) Aᵀ, the low-rank path's way down.

With A = lora_A it is S; with x = dY and A = lora_Bᵀ (a view) it is dS, where dB is made in a pass of its own.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import keep_mask, threshold_and_scale
from .launch import launch, parts
from .tiling import dot, is_wide, load_tile, store_sum


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_kernel(
    x_ptr,  # (M, K)
    a_ptr,  # (R, K), of x's dtype or another
    out_ptr,  # (M, R)
    partials_ptr,  # (splits, M, R) fp32, contiguous; None where there is one split
    counters_ptr,  # (blocks of out,) int32, zeros
    seed_ptr,  # (1,) int64, read only with DROPOUT
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_om,
    stride_or,
    k_per_split,  # a multiple of BLOCK_K
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out (M, R) = scale · (x ∘ mask) Aᵀ, accumulated in fp32 over each split of the columns, then over the splits."""
    row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    k_start = split * k_per_split
    for k in range(k_start, min(K, k_start + k_per_split), BLOCK_K):
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        a = load_tile(a_ptr, r, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
        if DROPOUT:
            x = tl.where(keep_mask(seed, row, k, threshold, BLOCK_M, BLOCK_K), x, tl.zeros_like(x))
        acc = dot(x, tl.trans(a), acc, WIDE, INPUT_PRECISION)
    if partials_ptr is not None:
        counters_ptr += tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    store_sum(
        acc * scale, out_ptr, partials_ptr, counters_ptr, split, tl.num_programs(1), row, r, M, R, stride_om, stride_or
    )


def _config(x: torch.Tensor, lora_A: torch.Tensor) -> configs.ShrinkConfig:
    return configs.shrink(*x.shape, lora_A.shape[0], x.dtype, lora_A.dtype, x.device, configs.vectorised(x))


def shrink_workspace(x: torch.Tensor, lora_A: torch.Tensor, config: configs.ShrinkConfig | None = None) -> int:
    """How many fp32 elements `shrink` needs as its workspace."""
    num_splits = (config or _config(x, lora_A)).num_splits
    return num_splits * x.shape[0] * lora_A.shape[0] if num_splits > 1 else 0


def shrink(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    config: configs.ShrinkConfig | None = None,
) -> None:
    """out (M, r) = scale · drop(x) Aᵀ for x (M, K) and lora_A (r, K), all with any strides.

    The dtype of out selects the arithmetic: in x's dtype, to which lora_A is cast in registers; in fp32 for x in half
    precision, an fp32 lora_A keeps its digits (`tiling.dot`: 1e-5 relative, and fp32's range). Without `seed` nothing
    is dropped. `workspace`: fp32, at least `shrink_workspace(x, lora_A)` elements.
    """
    M, K = x.shape
    R = lora_A.shape[0]
    assert (*lora_A.shape, *out.shape) == (R, K, M, R), (x.shape, lora_A.shape, out.shape)
    if M == 0:
        return
    config = config or _config(x, lora_A)
    threshold, dropout_scale = threshold_and_scale(dropout_p) if seed is not None else (0, 1.0)
    blocks = configs.cdiv(K, config.block_k)
    splits = config.num_splits
    grid = (configs.cdiv(M, config.block_m), splits, configs.cdiv(R, config.block_r))
    launch(
        _shrink_kernel,
        grid,
        x,
        lora_A,
        out,
        *parts(workspace, splits, M * R, grid[0] * grid[2]),
        seed,
        M,
        K,
        R,
        *x.stride(),
        *lora_A.stride(),
        *out.stride(),
        configs.cdiv(blocks, splits) * config.block_k,
        float(scale) * dropout_scale,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        DROPOUT=seed is not None,
        WIDE=is_wide(out, x),
        INPUT_PRECISION=configs.input_precision(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
