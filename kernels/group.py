"""Several LoRA layers on one x: what reads x, and what writes its gradient, done once for all of them.

    Sᵢ  = scaleᵢ · dropᵢ(x) Aᵢᵀ            `group_shrink`: x (M, K) read once
    Oᵢ  = scaleᵢ · dropᵢ(x)ᵀ Gᵢ            `group_weight_grad`: with Gᵢ = dSᵢ, Oᵢ is dAᵢᵀ; x read once
    out (+)= Σ maskᵢ ∘ (alphaᵢ · Sᵢ Wᵢᵀ)   `group_expand`: with Sᵢ = dSᵢ, Wᵢ = Aᵢᵀ the low-rank part of dX; written once

The members' operands are tuples, so each member keeps its own rank, strides, dtype and dropout mask, and nothing is
copied together. A program holds one accumulator for each member; up to MAX_MEMBERS go into one launch.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from . import configs
from .configs import ExpandConfig, ShrinkConfig, WeightGradConfig
from .dropout import keep_mask, threshold_and_scale
from .launch import launch
from .tiling import dot, is_wide, load_tile, reduce_partials, store_tile

MAX_MEMBERS = 3  # q, k and v; with four, masks and accumulators spill


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tuple of COUNT blocks of zeros."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros((ROWS, COLUMNS), dtype=tl.float32),)
    return blocks


@triton.jit
def _seeds(seed_ptrs, COUNT: tl.constexpr):
    """The members' seeds, loaded."""
    seeds = ()
    for i in tl.static_range(COUNT):
        seeds = seeds + (tl.load(seed_ptrs[i]),)
    return seeds


@triton.jit
def _dropped(x, seed, row, column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.where(keep_mask(seed, row, column, threshold, ROWS, COLUMNS), x, tl.zeros_like(x))


@triton.jit(do_not_specialize=["M", "thresholds"])
def _group_shrink_kernel(
    x_ptr,  # (M, K)
    a_ptrs,  # of each member: (R, K), of x's dtype or another
    out_ptrs,  # of each: (splits, M, R), the result where there is one split, else fp32 partials
    seed_ptrs,  # of each: (1,) int64, read only with DROPOUT
    M,
    K,
    ranks,  # R of each
    stride_xm,
    stride_xk,
    a_strides,  # of each: (R, K)
    out_strides,  # of each: (split, M, R)
    k_per_split,  # a multiple of BLOCK_K
    scales,
    thresholds,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARED_MASK: tl.constexpr,  # one mask for all members
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[i][split] (M, Rᵢ) = scaleᵢ · (x ∘ maskᵢ)[:, split's columns] Aᵢ[:, split's columns]ᵀ, accumulated in fp32."""
    row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R
    if DROPOUT:
        seeds = _seeds(seed_ptrs, MEMBERS)
    accs = _zeros(MEMBERS, BLOCK_M, BLOCK_R)
    k_start = split * k_per_split
    for k in range(k_start, min(K, k_start + k_per_split), BLOCK_K):
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        if SHARED_MASK:
            x = _dropped(x, seeds[0], row, k, thresholds[0], BLOCK_M, BLOCK_K)
        sums = ()
        for i in tl.static_range(MEMBERS):
            a = load_tile(a_ptrs[i], r, k, ranks[i], K, a_strides[i][0], a_strides[i][1], BLOCK_R, BLOCK_K, False)
            dropped = x
            if DROPOUT and not SHARED_MASK:
                dropped = _dropped(x, seeds[i], row, k, thresholds[i], BLOCK_M, BLOCK_K)
            sums = sums + (dot(dropped, tl.trans(a), accs[i], WIDE, INPUT_PRECISION),)
        accs = sums
    for i in tl.static_range(MEMBERS):
        strides = out_strides[i]
        out_ptr = out_ptrs[i] + split.to(tl.int64) * strides[0]
        store_tile(out_ptr, accs[i] * scales[i], row, r, M, ranks[i], strides[1], strides[2], False)


@triton.jit(do_not_specialize=["M", "thresholds"])
def _group_weight_grad_kernel(
    x_ptr,  # (M, K)
    g_ptrs,  # of each member: (M, R)
    out_ptrs,  # of each: (chunks, K, R), the result where there is one chunk, else fp32 partials
    seed_ptrs,  # of each: (1,) int64, read only with DROPOUT
    M,
    K,
    ranks,  # R of each
    stride_xm,
    stride_xk,
    g_strides,  # of each: (M, R)
    out_strides,  # of each: (chunk, K, R)
    rows_per_chunk,  # a multiple of BLOCK_M
    scales,
    thresholds,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out[i][chunk] (K, Rᵢ) = scaleᵢ · (x ∘ maskᵢ)[chunk]ᵀ Gᵢ[chunk], accumulated in fp32."""
    r = tl.program_id(0) * BLOCK_R  # innermost: the programs that share a block of x run together and find it in L2
    k = tl.program_id(1) * BLOCK_K
    chunk = tl.program_id(2)
    if DROPOUT:
        seeds = _seeds(seed_ptrs, MEMBERS)
    accs = _zeros(MEMBERS, BLOCK_K, BLOCK_R)
    row_start = chunk * rows_per_chunk
    for row in range(row_start, min(M, row_start + rows_per_chunk), BLOCK_M):
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        if SHARED_MASK:
            x = _dropped(x, seeds[0], row, k, thresholds[0], BLOCK_M, BLOCK_K)
        sums = ()
        for i in tl.static_range(MEMBERS):
            g = load_tile(g_ptrs[i], row, r, M, ranks[i], g_strides[i][0], g_strides[i][1], BLOCK_M, BLOCK_R, False)
            dropped = x
            if DROPOUT and not SHARED_MASK:
                dropped = _dropped(x, seeds[i], row, k, thresholds[i], BLOCK_M, BLOCK_K)
            sums = sums + (dot(tl.trans(dropped), g, accs[i], WIDE, INPUT_PRECISION),)
        accs = sums
    for i in tl.static_range(MEMBERS):
        strides = out_strides[i]
        out_ptr = out_ptrs[i] + chunk.to(tl.int64) * strides[0]
        store_tile(out_ptr, accs[i] * scales[i], k, r, K, ranks[i], strides[1], strides[2], False)


@triton.jit(do_not_specialize=["M", "thresholds"])
def _group_expand_kernel(
    s_ptrs,  # of each member: (M, R)
    w_ptrs,  # of each: (N, R), of S's dtype or another
    out_ptr,  # (M, N)
    seed_ptrs,  # of each: (1,) int64, read only with DROPOUT
    M,
    N,
    ranks,  # R of each
    s_strides,  # of each: (M, R)
    w_strides,  # of each: (N, R)
    stride_om,
    stride_on,
    alphas,
    thresholds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MEMBERS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # onto what out holds
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """out (M, N) = [out +] Σ maskᵢ ∘ (alphaᵢ · Sᵢ Wᵢᵀ), accumulated in fp32 and rounded once."""
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in tl.static_range(MEMBERS):
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        R = ranks[i]
        for r in range(0, R, BLOCK_R):
            s = load_tile(s_ptrs[i], row, r, M, R, s_strides[i][0], s_strides[i][1], BLOCK_M, BLOCK_R, False)
            w = load_tile(w_ptrs[i], column, r, N, R, w_strides[i][0], w_strides[i][1], BLOCK_N, BLOCK_R, False)
            acc = dot(s, tl.trans(w), acc, WIDE, INPUT_PRECISION)
        acc *= alphas[i]
        if DROPOUT:
            acc = _dropped(acc, tl.load(seed_ptrs[i]), row, column, thresholds[i], BLOCK_M, BLOCK_N)
        total += acc
    if ACCUMULATE:
        total += load_tile(out_ptr, row, column, M, N, stride_om, stride_on, BLOCK_M, BLOCK_N, False).to(tl.float32)
    store_tile(out_ptr, total, row, column, M, N, stride_om, stride_on, False)


def shrink_config(x: torch.Tensor, lora_As: Sequence[torch.Tensor]) -> ShrinkConfig:
    """The launch of `group_shrink` for up to MAX_MEMBERS members."""
    M, K = x.shape
    target = configs.capability(x.device)
    rank = max(16, configs.power_of_two_at_least(max(a.shape[0] for a in lora_As)))
    widest = max(a.dtype.itemsize for a in lora_As)
    if target == configs.INTERPRETER:
        block_m, block_k, block_r, num_warps = 16, 16, min(rank, 32), 4
    elif x.dtype == torch.float32:
        block_m, block_k, block_r, num_warps = 64, 16, 16, 4
    else:
        # 64 columns spill on sm_80 with three members (51 stores and loads with dropout), or with two that are cast;
        # beyond the block x is read again.
        heavy = len(lora_As) > 2 or widest > x.dtype.itemsize
        widest_block = 32 if target < (9, 0) and heavy else 64
        narrow = not configs.vectorised(x) or (target < (9, 0) and len(lora_As) > 2 and widest > x.dtype.itemsize)
        block_m, block_k, block_r = 64, 32 if narrow else 64, min(rank, widest_block)
        num_warps = 4 if len(lora_As) * block_r <= 48 else 8
    programs = configs.cdiv(M, block_m) * configs.cdiv(rank, block_r)
    splits = configs._parts(programs, configs.cdiv(K, block_k), configs.num_sms(x.device))
    stage = block_k * (block_m * x.dtype.itemsize + len(lora_As) * block_r * widest)
    num_stages = configs._stages(stage, 0, target) if configs.vectorised(x) else 2
    return ShrinkConfig(block_m, block_k, block_r, splits, num_warps, num_stages)


def weight_grad_config(x: torch.Tensor, ranks: Sequence[int]) -> WeightGradConfig:
    """The launch of `group_weight_grad` for up to MAX_MEMBERS members."""
    M, K = x.shape
    target = configs.capability(x.device)
    rank = max(16, configs.power_of_two_at_least(max(ranks)))
    if target == configs.INTERPRETER:
        block_m, block_k, block_r, num_warps = 16, 32, min(rank, 32), 4
    elif x.dtype == torch.float32:
        block_m, block_k, block_r, num_warps = 32, 32, 16, 4
    else:
        # 64 columns of fp32 G in two parts spill 58 to 200 on sm_80.
        widest_block = 32 if target < (9, 0) else 64
        block_m, block_k, block_r, num_warps = 64, 128 if configs.vectorised(x) else 64, min(rank, widest_block), 8
    programs = configs.cdiv(K, block_k) * configs.cdiv(rank, block_r)
    chunks = configs._parts(programs, configs.cdiv(M, block_m), 2 * configs.num_sms(x.device))
    stage = block_m * (block_k + len(ranks) * block_r) * x.dtype.itemsize
    num_stages = configs._stages(stage, 0, target) if configs.vectorised(x) else 2
    return WeightGradConfig(block_m, block_k, block_r, chunks, num_warps, num_stages)


def expand_config(out: torch.Tensor, ranks: Sequence[int], wide: bool = False) -> ExpandConfig:
    """The launch of `group_expand` for up to MAX_MEMBERS members."""
    rank = max(16, configs.power_of_two_at_least(max(ranks)))
    if configs.capability(out.device) == configs.INTERPRETER:
        return ExpandConfig(16, 32, 16, 4, 1)
    if out.dtype == torch.float32:
        return ExpandConfig(32, 64, 16, 4, 1)
    # S and W in two parts each: 32 ranks at once spill 13 to 20 on sm_80.
    block_r = min(rank, 16 if wide and configs.capability(out.device) < (9, 0) else 32)
    return ExpandConfig(64, 128 if configs.vectorised(out) else 64, block_r, 8, 1 if rank <= block_r else 2)


def shrink_workspace(x: torch.Tensor, lora_As: Sequence[torch.Tensor]) -> int:
    """How many fp32 elements `group_shrink` needs as its workspace."""
    sizes = []
    for members in _launches(len(lora_As)):
        several = lora_As[members]
        splits = shrink_config(x, several).num_splits
        sizes.append(splits * x.shape[0] * sum(a.shape[0] for a in several) if splits > 1 else 0)
    return max(sizes)


def weight_grad_workspace(x: torch.Tensor, ranks: Sequence[int]) -> int:
    """How many fp32 elements `group_weight_grad` needs as its workspace."""
    sizes = []
    for members in _launches(len(ranks)):
        chunks = weight_grad_config(x, ranks[members]).num_chunks
        sizes.append(chunks * x.shape[1] * sum(ranks[members]) if chunks > 1 else 0)
    return max(sizes)


def group_shrink(
    x: torch.Tensor,
    lora_As: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    workspace: torch.Tensor | None = None,
    *,
    seeds: Sequence[torch.Tensor | None] = (),
    dropout_ps: Sequence[float] = (),
    shared_mask: bool = False,
) -> None:
    """outs[i] (M, rᵢ) = dropᵢ(x) Aᵢᵀ for x (M, K) and lora_As[i] (rᵢ, K), all with any strides and float dtypes.

    An out in fp32 for x in half precision has its lora_A's digits kept, as in `shrink`; one in x's dtype has it
    cast. A member without a seed drops nothing. shared_mask: all members have the first one's seed and probability.
    `workspace`: fp32, at least `shrink_workspace(x, lora_As)` elements.
    """
    M, K = x.shape
    for a, out in zip(lora_As, outs, strict=True):
        assert a.shape[1] == K and out.shape == (M, a.shape[0]), (x.shape, a.shape, out.shape)
    if M == 0:
        return
    seeds, dropout_ps = seeds or [None] * len(outs), dropout_ps or [0.0] * len(outs)
    for members in _launches(len(outs)):
        several, results = lora_As[members], outs[members]
        config = shrink_config(x, several)
        ranks = tuple(a.shape[0] for a in several)
        dropout = _Dropout(seeds[members], dropout_ps[members], x)
        splits = config.num_splits
        targets, strides = _targets(results, splits, workspace)
        grid = (configs.cdiv(M, config.block_m), splits, configs.cdiv(max(ranks), config.block_r))
        launch(
            _group_shrink_kernel,
            grid,
            x,
            tuple(several),
            targets,
            dropout.seeds,
            M,
            K,
            ranks,
            *x.stride(),
            tuple(a.stride() for a in several),
            strides,
            configs.cdiv(configs.cdiv(K, config.block_k), splits) * config.block_k,
            dropout.scales,
            dropout.thresholds,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            MEMBERS=len(results),
            DROPOUT=dropout.any,
            SHARED_MASK=shared_mask and dropout.any,
            WIDE=any(is_wide(out, x) for out in results),
            INPUT_PRECISION=configs.input_precision(x.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _reduce(targets, results, splits)


def group_weight_grad(
    x: torch.Tensor,
    gs: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    workspace: torch.Tensor | None = None,
    *,
    seeds: Sequence[torch.Tensor | None] = (),
    dropout_ps: Sequence[float] = (),
    shared_mask: bool = False,
) -> None:
    """outs[i] (K, rᵢ) = dropᵢ(x)ᵀ Gᵢ for x (M, K) and gs[i] (M, rᵢ): pass `grad_A.t()` for dA. Strides, dtypes and
    dropout as in `group_shrink`; `workspace`: at least `weight_grad_workspace(x, ranks)` elements."""
    M, K = x.shape
    for g, out in zip(gs, outs, strict=True):
        assert g.shape[0] == M and out.shape == (K, g.shape[1]), (x.shape, g.shape, out.shape)
    if M == 0:
        for out in outs:
            out.zero_()
        return
    seeds, dropout_ps = seeds or [None] * len(outs), dropout_ps or [0.0] * len(outs)
    for members in _launches(len(outs)):
        several, results = gs[members], outs[members]
        ranks = tuple(g.shape[1] for g in several)
        config = weight_grad_config(x, ranks)
        dropout = _Dropout(seeds[members], dropout_ps[members], x)
        chunks = config.num_chunks
        targets, strides = _targets(results, chunks, workspace)
        launch(
            _group_weight_grad_kernel,
            (configs.cdiv(max(ranks), config.block_r), configs.cdiv(K, config.block_k), chunks),
            x,
            tuple(several),
            targets,
            dropout.seeds,
            M,
            K,
            ranks,
            *x.stride(),
            tuple(g.stride() for g in several),
            strides,
            configs.cdiv(configs.cdiv(M, config.block_m), chunks) * config.block_m,
            dropout.scales,
            dropout.thresholds,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            MEMBERS=len(results),
            DROPOUT=dropout.any,
            SHARED_MASK=shared_mask and dropout.any,
            WIDE=any(is_wide(g, x) for g in several),
            INPUT_PRECISION=configs.input_precision(x.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _reduce(targets, results, chunks)


def group_expand(
    ss: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    seeds: Sequence[torch.Tensor | None] = (),
    dropout_ps: Sequence[float] = (),
) -> None:
    """out (M, N) = [out +] Σ dropᵢ(Sᵢ Wᵢᵀ) for ss[i] (M, rᵢ) and ws[i] (N, rᵢ). Strides, dtypes and dropout as in
    `group_shrink`; needs no workspace."""
    M, N = out.shape
    for s, w in zip(ss, ws, strict=True):
        assert (s.shape[0], *w.shape) == (M, N, s.shape[1]), (s.shape, w.shape, out.shape)
    if M == 0:
        return
    seeds, dropout_ps = seeds or [None] * len(ss), dropout_ps or [0.0] * len(ss)
    for members in _launches(len(ss)):
        several, others = ss[members], ws[members]
        ranks = tuple(s.shape[1] for s in several)
        wide = any(is_wide(s, out) for s in several)
        config = expand_config(out, ranks, wide)
        dropout = _Dropout(seeds[members], dropout_ps[members], out)
        launch(
            _group_expand_kernel,
            (configs.cdiv(M, config.block_m), configs.cdiv(N, config.block_n)),
            tuple(several),
            tuple(others),
            out,
            dropout.seeds,
            M,
            N,
            ranks,
            tuple(s.stride() for s in several),
            tuple(w.stride() for w in others),
            *out.stride(),
            dropout.scales,
            dropout.thresholds,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=config.block_r,
            MEMBERS=len(several),
            DROPOUT=dropout.any,
            ACCUMULATE=accumulate or members.start > 0,
            WIDE=wide,
            INPUT_PRECISION=configs.input_precision(out.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


class _Dropout:
    """Several members' dropout in a kernel's words. Where one drops, one that does not gets a mask of ones."""

    def __init__(self, seeds: Sequence[torch.Tensor | None], ps: Sequence[float], unread: torch.Tensor) -> None:
        drawn = [seed for seed in seeds if seed is not None]
        self.any = bool(drawn)
        placeholder = drawn[0] if drawn else unread
        self.seeds = tuple(placeholder if seed is None else seed for seed in seeds)
        pairs = [threshold_and_scale(p) if seed is not None else (0, 1.0) for seed, p in zip(seeds, ps, strict=True)]
        self.thresholds = tuple(threshold for threshold, _ in pairs)
        self.scales = tuple(scale for _, scale in pairs)


def _launches(members: int) -> Iterator[slice]:
    """The members in parts of at most MAX_MEMBERS, of about one size."""
    parts = configs.cdiv(members, MAX_MEMBERS)
    size = configs.cdiv(members, parts)
    for start in range(0, members, size):
        yield slice(start, min(members, start + size))


def _targets(
    results: Sequence[torch.Tensor], parts: int, workspace: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, ...], tuple[tuple[int, ...], ...]]:
    """Where a kernel writes each member, and the strides (part, row, column): the results themselves, or fp32 partials
    one after another in the workspace, in the orientation of the result."""
    if parts == 1:
        return tuple(results), tuple((0, *result.stride()) for result in results)
    assert workspace is not None, "parts need a workspace"
    targets, strides, start = [], [], 0
    for result in results:
        rows, columns = result.shape
        targets.append(workspace[start : start + parts * rows * columns])
        strides.append((rows * columns, columns, 1) if _upright(result) else (rows * columns, 1, rows))
        start += parts * rows * columns
    return tuple(targets), tuple(strides)


def _reduce(targets: Sequence[torch.Tensor], results: Sequence[torch.Tensor], parts: int) -> None:
    if parts > 1:
        for target, result in zip(targets, results, strict=True):
            reduce_partials(target, result if _upright(result) else result.t(), parts)


def _upright(matrix: torch.Tensor) -> bool:
    return matrix.stride(0) >= matrix.stride(1)
