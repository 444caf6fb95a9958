"""What lies between an MLP's projections: the activation with the down projection's low-rank path, there and back.

    h = act(gate) ∘ up and S = drop(h) Aᵀ                             `activate`: gate and up read once, h written once
    dh += drop′(dS A) · dup = dh ∘ act(gate) · dgate = dh ∘ up ∘ act′(gate) · dA = dSᵀ drop(h)
                                                                      `activate_backward`: dh, gate and up read once

Without up, h is act(gate). h is made again for dA and not read: a kernel that has gate and up in registers pays a few
instructions for it, and nobody has to keep it. The rank must fit one block (`fused_rank`); for a larger one these
kernels do the element-wise part and the skinny ones (shrink.py, group.py) the rest.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import configs
from .dropout import keep_mask, threshold_and_scale
from .launch import launch
from .tiling import dot, is_wide, load_tile, reduce_partials, store_tile


@dataclass(frozen=True)
class ActivateConfig:
    """A program owns block_m rows and one of num_splits parts of the columns, in steps of block_k."""

    block_m: int
    block_k: int
    block_r: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ActivateBackwardConfig:
    """A program owns block_k columns and one of num_chunks parts of the rows, in steps of block_m."""

    block_m: int
    block_k: int
    block_r: int
    num_chunks: int
    num_warps: int
    num_stages: int


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """(act(g), act′(g)) in fp32, elementwise. NaN stays NaN; at 0 ReLU's slope is 0, as in torch."""
    if ACTIVATION == "silu":
        sigma = tl.sigmoid(g)
        value = g * sigma
        slope = sigma * (1.0 + g * (1.0 - sigma))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif ACTIVATION == "gelu_tanh":
        # 0.5·(1 + tanh z) = sigmoid(2z), which keeps its digits where tanh z is nearly -1.
        z2 = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        sigma = tl.sigmoid(z2)
        value = g * sigma
        slope = sigma + value * (1.0 - sigma) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        tl.static_assert(ACTIVATION == "relu", "silu, gelu, gelu_tanh or relu")
        value = tl.where(g <= 0.0, 0.0, g)
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    return value, slope


@triton.jit(do_not_specialize=["M", "threshold"])
def _activate_kernel(
    gate_ptr,  # (M, K)
    up_ptr,  # (M, K), read only with GATED
    a_ptr,  # (R, K), of gate's dtype or another, read only with LOW_RANK
    h_ptr,  # (M, K)
    s_ptr,  # (splits, M, R): the result where there is one split, else fp32 partials
    seed_ptr,  # (1,) int64, read only with DROPOUT
    M,
    K,
    R,
    stride_gm,
    stride_gk,
    stride_um,
    stride_uk,
    stride_ar,
    stride_ak,
    stride_hm,
    stride_hk,
    stride_ss,
    stride_sm,
    stride_sr,
    k_per_split,  # a multiple of BLOCK_K
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """h (M, K) = act(gate) ∘ up; s[split] (M, R) = scale · (h ∘ mask)[:, split's columns] A[:, split's columns]ᵀ."""
    row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    k_start = split * k_per_split
    for k in range(k_start, min(K, k_start + k_per_split), BLOCK_K):
        gate = load_tile(gate_ptr, row, k, M, K, stride_gm, stride_gk, BLOCK_M, BLOCK_K, False)
        value, _ = _activation(gate.to(tl.float32), ACTIVATION)
        if GATED:
            up = load_tile(up_ptr, row, k, M, K, stride_um, stride_uk, BLOCK_M, BLOCK_K, False)
            value *= up.to(tl.float32)
        h = value.to(gate.dtype)
        store_tile(h_ptr, h, row, k, M, K, stride_hm, stride_hk, False)
        if LOW_RANK:
            a = load_tile(a_ptr, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
            if DROPOUT:
                h = tl.where(keep_mask(seed, row, k, threshold, BLOCK_M, BLOCK_K), h, tl.zeros_like(h))
            acc = dot(h, tl.trans(a), acc, WIDE, INPUT_PRECISION)
    if LOW_RANK:
        s_ptr += split.to(tl.int64) * stride_ss
        store_tile(s_ptr, acc * scale, row, 0, M, R, stride_sm, stride_sr, False)


@triton.jit(do_not_specialize=["M", "threshold"])
def _activate_backward_kernel(
    dh_ptr,  # (M, K): dY W0, and with LOW_RANK no more than that
    ds_ptr,  # (M, R), read only with LOW_RANK or WEIGHT_GRAD
    gate_ptr,  # (M, K)
    up_ptr,  # (M, K), read only with GATED
    a_ptr,  # (R, K), read only with LOW_RANK
    dgate_ptr,  # (M, K), may be dh
    dup_ptr,  # (M, K), written only with GATED
    da_ptr,  # (chunks, K, R), written only with WEIGHT_GRAD: the result where there is one chunk, else fp32 partials
    seed_ptr,  # (1,) int64, read only with DROPOUT
    M,
    K,
    R,
    stride_dm,
    stride_dk,
    stride_sm,
    stride_sr,
    stride_gm,
    stride_gk,
    stride_um,
    stride_uk,
    stride_ar,
    stride_ak,
    stride_dgm,
    stride_dgk,
    stride_dum,
    stride_duk,
    stride_dac,
    stride_dak,
    stride_dar,
    rows_per_chunk,  # a multiple of BLOCK_M
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INPUT_GRAD: tl.constexpr,  # dgate and dup are written
    LOW_RANK: tl.constexpr,  # dh is to have drop′(dS A) added
    WEIGHT_GRAD: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dgate, dup (M, K) and da[chunk] (K, R) = scale · (h ∘ mask)[chunk]ᵀ dS[chunk], with h = act(gate) ∘ up."""
    k = tl.program_id(0) * BLOCK_K
    chunk = tl.program_id(1)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    if LOW_RANK:
        a = load_tile(a_ptr, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    row_start = chunk * rows_per_chunk
    for row in range(row_start, min(M, row_start + rows_per_chunk), BLOCK_M):
        gate = load_tile(gate_ptr, row, k, M, K, stride_gm, stride_gk, BLOCK_M, BLOCK_K, False)
        value, slope = _activation(gate.to(tl.float32), ACTIVATION)
        if GATED:
            up = load_tile(up_ptr, row, k, M, K, stride_um, stride_uk, BLOCK_M, BLOCK_K, False).to(tl.float32)
        if LOW_RANK or WEIGHT_GRAD:
            ds = load_tile(ds_ptr, row, 0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
        if DROPOUT:
            keep = keep_mask(seed, row, k, threshold, BLOCK_M, BLOCK_K)
        if INPUT_GRAD:
            dh = load_tile(dh_ptr, row, k, M, K, stride_dm, stride_dk, BLOCK_M, BLOCK_K, False).to(tl.float32)
            if LOW_RANK:
                term = dot(ds, a, tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32), WIDE, INPUT_PRECISION) * scale
                if DROPOUT:
                    term = tl.where(keep, term, 0.0)
                dh += term
            if GATED:
                store_tile(dup_ptr, dh * value, row, k, M, K, stride_dum, stride_duk, False)
                store_tile(dgate_ptr, dh * up * slope, row, k, M, K, stride_dgm, stride_dgk, False)
            else:
                store_tile(dgate_ptr, dh * slope, row, k, M, K, stride_dgm, stride_dgk, False)
        if WEIGHT_GRAD:
            if GATED:
                value *= up
            h = value.to(gate.dtype)
            if DROPOUT:
                h = tl.where(keep, h, tl.zeros_like(h))
            acc = dot(tl.trans(h), ds, acc, WIDE, INPUT_PRECISION)
    if WEIGHT_GRAD:
        da_ptr += chunk.to(tl.int64) * stride_dac
        store_tile(da_ptr, acc * scale, k, 0, K, R, stride_dak, stride_dar, False)


def fused_rank(dtype: torch.dtype) -> int:
    """The largest rank whose products these kernels make themselves."""
    return 64 if dtype.itemsize == 2 else 16  # a FMA `tl.dot` of fp32 holds its inner dimension in registers


def activate_config(gate: torch.Tensor, rank: int, adapter_dtype: torch.dtype) -> ActivateConfig:
    """The launch of `activate`."""
    M, K = gate.shape
    target = configs.capability(gate.device)
    block_r = max(16, configs.power_of_two_at_least(rank))
    aligned = configs.vectorised(gate)
    if target == configs.INTERPRETER:
        block_m, block_k, num_warps = 16, 16, 4
    elif gate.dtype == torch.float32:
        block_m, block_k, num_warps = 64, 16, 4
    else:
        # 64 columns of fp32 adapters spill: cast in registers on sm_100 (5 at r = 32), in parts on sm_80 (38 at 64).
        narrow = not aligned or (target[0] != 9 and adapter_dtype.itemsize == 4)
        block_m, block_k, num_warps = 64, 32 if narrow else 64, 8
    splits = configs._parts(configs.cdiv(M, block_m), configs.cdiv(K, block_k), configs.num_sms(gate.device))
    stage = block_k * (2 * block_m * gate.dtype.itemsize + block_r * adapter_dtype.itemsize)
    num_stages = configs._stages(stage, 0, target) if aligned else 2
    return ActivateConfig(block_m, block_k, block_r, splits, num_warps, num_stages)


def activate_backward_config(gate: torch.Tensor, rank: int, wide: bool = False) -> ActivateBackwardConfig:
    """The launch of `activate_backward`. wide: dS is in fp32 and gate in half precision."""
    M, K = gate.shape
    target = configs.capability(gate.device)
    block_r = max(16, configs.power_of_two_at_least(rank))
    aligned = configs.vectorised(gate)
    if target == configs.INTERPRETER:
        block_m, block_k, num_warps = 16, 32, 4
    elif gate.dtype == torch.float32:
        block_m, block_k, num_warps = 32, 32, 8  # with 4, Triton 3.9 spills two registers on sm_90
    else:
        # gate, up, dh, their derivatives, the mask and two accumulators at once: at r = 64 sm_80 spills with 64 rows
        # (129 stores and loads), and with 32 by 64 too (83). 32 rows leave room for two programs a multiprocessor
        # (107 registers at r = 16 on sm_90, 189 with 64): one computes while the other waits. Not with dS in parts: 164
        # on sm_90, and two spill on sm_100.
        ampere = target < (9, 0)
        block_m = 32 if ampere or not aligned or (block_r <= 32 and not wide) else 64
        block_k, num_warps = 32 if not aligned or (ampere and block_r > 32) else 64, 8
    chunks = configs._parts(configs.cdiv(K, block_k), configs.cdiv(M, block_m), 4 * configs.num_sms(gate.device))
    stage = block_m * (3 * block_k + block_r) * gate.dtype.itemsize
    num_stages = configs._stages(stage, 0, target) if aligned else 2
    return ActivateBackwardConfig(block_m, block_k, block_r, chunks, num_warps, num_stages)


def activate_workspace(gate: torch.Tensor, lora_A: torch.Tensor) -> int:
    """How many fp32 elements `activate` needs as its workspace."""
    splits = activate_config(gate, lora_A.shape[0], lora_A.dtype).num_splits
    return splits * gate.shape[0] * lora_A.shape[0] if splits > 1 else 0


def activate_backward_workspace(gate: torch.Tensor, rank: int) -> int:
    """How many fp32 elements `activate_backward` needs as its workspace where dA is wanted."""
    chunks = max(activate_backward_config(gate, rank, wide).num_chunks for wide in (False, True))
    return chunks * gate.shape[1] * rank if chunks > 1 else 0


def activate(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    h: torch.Tensor,
    lora_A: torch.Tensor | None = None,
    s: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """h (M, K) = act(gate) ∘ up and, with lora_A (r, K), s (M, r) = drop(h) Aᵀ, all with any strides.

    s in gate's dtype has lora_A cast to it; in fp32 for gate in half precision lora_A keeps its digits. r is at most
    `fused_rank(gate.dtype)`. Without `seed` nothing is dropped. `workspace`: fp32, at least `activate_workspace(gate,
    lora_A)` elements.
    """
    M, K = gate.shape
    assert h.shape == gate.shape and (up is None or up.shape == gate.shape), (gate.shape, h.shape)
    if M == 0:
        return
    low_rank = lora_A is not None
    R = lora_A.shape[0] if low_rank else 1
    assert fused_rank(gate.dtype) >= R, R
    config = activate_config(gate, R, lora_A.dtype if low_rank else gate.dtype)
    threshold, scale = threshold_and_scale(dropout_p) if seed is not None else (0, 1.0)
    splits = config.num_splits
    target, strides = s, (0, s.stride(0), s.stride(1)) if s is not None else (0, 0, 0)
    if low_rank and splits > 1:
        assert workspace is not None and workspace.numel() >= splits * M * R, "a split of K needs a workspace"
        target, strides = workspace, (M * R, R, 1)
    launch(
        _activate_kernel,
        (configs.cdiv(M, config.block_m), splits),
        gate,
        up,
        lora_A,
        h,
        target,
        seed,
        M,
        K,
        R,
        *gate.stride(),
        *(up.stride() if up is not None else (0, 0)),
        *(lora_A.stride() if low_rank else (0, 0)),
        *h.stride(),
        *strides,
        configs.cdiv(configs.cdiv(K, config.block_k), splits) * config.block_k,
        scale,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        ACTIVATION=activation,
        GATED=up is not None,
        LOW_RANK=low_rank,
        DROPOUT=low_rank and seed is not None,
        WIDE=s is not None and is_wide(s, gate),
        INPUT_PRECISION=configs.input_precision(gate.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if low_rank and splits > 1:
        assert target is not None and s is not None
        reduce_partials(target, s, splits)


def activate_backward(
    dh: torch.Tensor | None,
    ds: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    lora_A: torch.Tensor | None,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    grad_A: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """dgate, dup (M, K) for dh (M, K) + drop′(dS A), and grad_A (r, K) = dSᵀ drop(h), all with any strides.

    What is None is not made: without dh neither dgate nor dup; without lora_A nothing is added to dh; without grad_A no
    dA. dgate may be dh, dup may not. ds (M, r) in fp32 for dh in half precision keeps its digits and lora_A's; r is at
    most `fused_rank(gate.dtype)`. `workspace`: fp32, at least `activate_backward_workspace(gate, r)` elements where
    grad_A is wanted.
    """
    M, K = gate.shape
    if M == 0:
        if grad_A is not None:
            grad_A.zero_()
        return
    low_rank, weight_grad = lora_A is not None and dh is not None, grad_A is not None
    R = ds.shape[1] if ds is not None and (low_rank or weight_grad) else 1
    assert fused_rank(gate.dtype) >= R, R
    wide = ds is not None and is_wide(ds, gate)
    config = activate_backward_config(gate, R, wide)
    threshold, scale = threshold_and_scale(dropout_p) if seed is not None else (0, 1.0)
    chunks = config.num_chunks
    target, strides = grad_A, (0, *_strides(grad_A)[::-1])
    if weight_grad and chunks > 1:
        assert workspace is not None and workspace.numel() >= chunks * K * R, "parts of the rows need a workspace"
        target, strides = workspace, (K * R, 1, K)  # as grad_A lies
    launch(
        _activate_backward_kernel,
        (configs.cdiv(K, config.block_k), chunks),
        dh,
        ds,
        gate,
        up,
        lora_A if low_rank else None,
        dgate,
        dup,
        target,
        seed,
        M,
        K,
        R,
        *_strides(dh),
        *_strides(ds),
        *gate.stride(),
        *_strides(up),
        *_strides(lora_A),
        *_strides(dgate),
        *_strides(dup),
        *strides,
        configs.cdiv(configs.cdiv(M, config.block_m), chunks) * config.block_m,
        scale,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        ACTIVATION=activation,
        GATED=up is not None,
        INPUT_GRAD=dh is not None,
        LOW_RANK=low_rank,
        WEIGHT_GRAD=weight_grad,
        DROPOUT=seed is not None and (low_rank or weight_grad),
        WIDE=wide,
        INPUT_PRECISION=configs.input_precision(gate.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if weight_grad and chunks > 1:
        assert target is not None and grad_A is not None
        reduce_partials(target, grad_A, chunks)


def _strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))
