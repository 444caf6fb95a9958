"""RMSNorm with the low-rank path's way down of the layers that it feeds, and its gradient.

    y = x · rstd · w and S = y Aᵀ, rstd = 1/√(mean(x²) + eps)     `norm_shrink`: x read from memory once, y written once
    dx = rstd · (w ∘ dy) − x · rstd³ · mean(w ∘ dy ∘ x)           `norm_backward`: dy and x read once, dx written once

A program owns a few whole rows and walks over them twice; few enough that the second walk finds them in L2 (32 rows of
4096 bf16 numbers are 256 KiB, times 132 multiprocessors 34 MB of an H200's 50). S is made of the y that is written,
rounded as it is, so it is what a pass of its own over y would give. A stacks the members' rows.

Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import configs
from .tiling import load_tile, store_tile

MAX_RANK = 64  # of all members together


@dataclass(frozen=True)
class NormConfig:
    """A program owns block_m rows and walks over the columns in steps of block_k."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_weight(w_ptr, k, K, stride_w, BLOCK_K: tl.constexpr):
    columns = k + tl.arange(0, BLOCK_K)
    return tl.load(w_ptr + columns.to(tl.int64) * stride_w, mask=columns < K, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def _norm_shrink_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (K,)
    a_ptr,  # (R, K), read only with LOW_RANK
    y_ptr,  # (M, K)
    s_ptr,  # (M, R), written only with LOW_RANK
    rstd_ptr,  # (M,) fp32
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_w,
    stride_ar,
    stride_ak,
    stride_ym,
    stride_yk,
    stride_sm,
    stride_sr,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOW_RANK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """y (M, K) = x · rstd · w and s (M, R) = y Aᵀ, accumulated in fp32."""
    row = tl.program_id(0) * BLOCK_M
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False).to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / K + eps)
    rows = row + tl.arange(0, BLOCK_M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        w = _load_weight(w_ptr, k, K, stride_w, BLOCK_K)
        y = (x.to(tl.float32) * rstd[:, None] * w).to(x.dtype)
        store_tile(y_ptr, y, row, k, M, K, stride_ym, stride_yk, False)
        if LOW_RANK:
            a = load_tile(a_ptr, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
            acc = tl.dot(y, tl.trans(a.to(y.dtype)), acc, input_precision=INPUT_PRECISION)
    if LOW_RANK:
        store_tile(s_ptr, acc, row, 0, M, R, stride_sm, stride_sr, False)


@triton.jit(do_not_specialize=["M"])
def _norm_backward_kernel(
    dy_ptr,  # (M, K)
    x_ptr,  # (M, K)
    w_ptr,  # (K,)
    rstd_ptr,  # (M,) fp32
    dx_ptr,  # (M, K), may be dy
    M,
    K,
    stride_dm,
    stride_dk,
    stride_xm,
    stride_xk,
    stride_w,
    stride_om,
    stride_ok,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx (M, K) = rstd · (w ∘ dy) − x · rstd³ · mean(w ∘ dy ∘ x), in fp32 and rounded once."""
    row = tl.program_id(0) * BLOCK_M
    products = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        dy = load_tile(dy_ptr, row, k, M, K, stride_dm, stride_dk, BLOCK_M, BLOCK_K, False).to(tl.float32)
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False).to(tl.float32)
        products += dy * x * _load_weight(w_ptr, k, K, stride_w, BLOCK_K)
    rows = row + tl.arange(0, BLOCK_M)
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    mean = (tl.sum(products, axis=1) / K * rstd * rstd)[:, None]
    for k in range(0, K, BLOCK_K):
        dy = load_tile(dy_ptr, row, k, M, K, stride_dm, stride_dk, BLOCK_M, BLOCK_K, False).to(tl.float32)
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False).to(tl.float32)
        dx = rstd[:, None] * (dy * _load_weight(w_ptr, k, K, stride_w, BLOCK_K) - x * mean)
        store_tile(dx_ptr, dx, row, k, M, K, stride_om, stride_ok, False)


def norm_config(x: torch.Tensor, rank: int) -> NormConfig:
    """The launch of `norm_shrink` and `norm_backward`."""
    target = configs.capability(x.device)
    block_r = max(16, configs.power_of_two_at_least(rank))
    aligned = x.stride(1) == 1 and x.stride(0) % 16 == 0
    if target == configs.INTERPRETER:
        return NormConfig(16, 16, block_r, 4, 2)
    if x.dtype == torch.float32:
        return NormConfig(16, 32, block_r, 4, 3)
    block_m, block_k = 32, 128 if aligned else 64
    stage = block_k * (block_m + block_r) * x.dtype.itemsize
    return NormConfig(block_m, block_k, block_r, 4, configs._stages(stage, 0, target) if aligned else 2)


def norm_shrink(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    rstd: torch.Tensor,
    stacked_A: torch.Tensor | None = None,
    s: torch.Tensor | None = None,
) -> None:
    """y (M, K) = x · rstd · weight, rstd (M,) in fp32 and, with stacked_A (R, K), s (M, R) = y Aᵀ.

    Any strides and float dtypes; rstd contiguous; R at most MAX_RANK. y and s in x's dtype or wider.
    """
    M, K = x.shape
    assert y.shape == x.shape and weight.shape == (K,) and rstd.shape == (M,), (x.shape, y.shape, weight.shape)
    assert rstd.dtype == torch.float32 and rstd.is_contiguous()
    if M == 0:
        return
    R = stacked_A.shape[0] if stacked_A is not None else 1
    assert R <= MAX_RANK, R
    config = norm_config(x, R)
    _norm_shrink_kernel[(configs.cdiv(M, config.block_m),)](
        x,
        weight,
        stacked_A,
        y,
        s,
        rstd,
        M,
        K,
        R,
        *x.stride(),
        weight.stride(0),
        *(stacked_A.stride() if stacked_A is not None else (0, 0)),
        *y.stride(),
        *(s.stride() if s is not None else (0, 0)),
        eps,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        LOW_RANK=stacked_A is not None,
        INPUT_PRECISION=configs.input_precision(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, dx: torch.Tensor
) -> None:
    """dx (M, K), which may be dy, of dy (M, K) and what `norm_shrink` read and wrote."""
    M, K = x.shape
    assert dy.shape == dx.shape == x.shape, (dy.shape, dx.shape, x.shape)
    if M == 0:
        return
    config = norm_config(x, 1)
    _norm_backward_kernel[(configs.cdiv(M, config.block_m),)](
        dy,
        x,
        weight,
        rstd,
        dx,
        M,
        K,
        *dy.stride(),
        *x.stride(),
        weight.stride(0),
        *dx.stride(),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
