"""The softmax of a chunk of logits, for the head's loss: statistics of every token and the gradient of the logits in
place, in one launch, a program a token.

    v = cap(scale·z)/τ, cap(u) = c·tanh(u/c)     lse = log Σ exp v     p = exp(v − lse)     H = −Σ p log p
    ℓ = lse − (1−ε)·v_y − ε·mean(v) + ζ·lse²
    dz = dv/dz · (g·((1 + 2ζ·lse)·p − (1−ε)·onehot(y) − ε/V) − g_H·p·(v − lse + H))

A row is read once for its statistics and once more, as far as it lies in L2 still, for its gradient. Each lane of a
program keeps a maximum and sums of its own, so that nothing is exchanged before the row's end. lse is kept in two
parts, the row's maximum and log Σ exp(v − maximum): as one number its rounding would be p's relative error.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 2048  # 8 numbers a thread: loads of 16 bytes, in half precision one, in float32 two
UNALIGNED_BLOCK = 1024  # where rows are not aligned each number is a load: 8 of them spill on sm_90
LOWEST = tl.constexpr(-3.0e38)  # not -inf, whose difference with itself is no number


@triton.jit
def _tanh(x):
    """To 2 ulp: Lambert's continued fraction near 0 (to 1e-9 there), where 1 − 2/(exp 2x + 1) loses digits."""
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    return tl.where(tl.abs(x) < 0.625, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _logits(z, scale, softcap, divisor, CAPPED: tl.constexpr):
    """(v, dv/dz)."""
    v = z.to(tl.float32) * scale
    slope = scale / divisor
    if CAPPED:
        bent = _tanh(v / softcap)
        v = bent * softcap
        slope = slope * (1.0 - bent * bent)
    return v / divisor, slope


@triton.jit(do_not_specialize=["scale", "softcap", "divisor", "smoothing", "z_loss"])
def _head_kernel(
    z_ptr,  # (T, V): logits; with GRADIENT dz afterwards
    labels_ptr,  # (T,) int64, each a word
    loss_ptr,  # (T,) fp32, and so are entropy, mean_logits, log_sum_sq; None where it is not wanted
    lse_ptr,  # (T, 2) fp32: its two parts; written with STATISTICS, else read, as the entropy is
    entropy_ptr,
    top1_ptr,  # (T,) bool, or None
    mean_ptr,
    log_sum_sq_ptr,
    grad_ptr,  # (T,) fp32: g; None: 1
    grad_entropy_ptr,  # (T,) fp32: g_H; None: 0
    V,
    stride_z,
    scale,
    softcap,
    divisor,  # τ
    smoothing,  # ε
    z_loss,  # ζ
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    CAPPED: tl.constexpr,
    MEAN: tl.constexpr,  # whether mean(v) is needed
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z
    label = tl.load(labels_ptr + row).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    if STATISTICS:
        z_y = tl.load(z_ptr + label)
        top = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)  # Σ exp(v − top)
        moment, squares, plain = total, total, total  # Σ exp(v − top)·(v − top), Σ exp(2(v − top)), Σ v
        beaten = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, V, BLOCK):
            inside = start + lanes < V
            z = tl.load(z_ptr + start + lanes, mask=inside, other=0.0)
            v, _ = _logits(z, scale, softcap, divisor, CAPPED)
            higher = tl.where(inside, tl.maximum(top, v), top)
            shrink = tl.exp(top - higher)
            weight = tl.where(inside, tl.exp(v - higher), 0.0)
            if entropy_ptr is not None:
                moment = (moment + total * (top - higher)) * shrink + tl.where(inside, weight * (v - higher), 0.0)
            total = total * shrink + weight
            if log_sum_sq_ptr is not None:
                squares = squares * shrink * shrink + weight * weight
            if MEAN:
                plain += tl.where(inside, v, 0.0)
            if top1_ptr is not None:
                ahead = (z > z_y) | ((z == z_y) & (start + lanes < label))
                beaten |= (inside & ahead).to(tl.int32)
            top = higher
        highest = tl.max(top, axis=0)
        shrink = tl.exp(top - highest)
        sum_p = tl.sum(total * shrink, axis=0)
        log_sum = tl.log(sum_p)
        v_y, _ = _logits(z_y, scale, softcap, divisor, CAPPED)
        loss = log_sum + (1.0 - smoothing) * (highest - v_y) + z_loss * (highest + log_sum) * (highest + log_sum)
        if MEAN:
            mean = tl.sum(plain, axis=0) / V
            loss += smoothing * (highest - mean)
            if mean_ptr is not None:
                tl.store(mean_ptr + row, mean)
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + 2 * row, highest)
        tl.store(lse_ptr + 2 * row + 1, log_sum)
        if entropy_ptr is not None:
            moment = (moment + total * (top - highest)) * shrink
            tl.store(entropy_ptr + row, log_sum - tl.sum(moment, axis=0) / sum_p)
        if log_sum_sq_ptr is not None:
            sum_sq = tl.sum(squares * shrink * shrink, axis=0) / (sum_p * sum_p)
            tl.store(log_sum_sq_ptr + row, tl.log(sum_sq))
        if top1_ptr is not None:
            tl.store(top1_ptr + row, tl.max(beaten, axis=0) == 0)
        tl.debug_barrier()  # all threads have read z_y
    else:
        highest = tl.load(lse_ptr + 2 * row)
        log_sum = tl.load(lse_ptr + 2 * row + 1)
    if GRADIENT:
        of_loss = 1.0 if grad_ptr is None else tl.load(grad_ptr + row)
        of_p = of_loss * (1.0 + 2.0 * z_loss * (highest + log_sum))
        evenly = of_loss * smoothing / V
        for start in range(0, V, BLOCK):
            inside = start + lanes < V
            z = tl.load(z_ptr + start + lanes, mask=inside, other=0.0)
            v, slope = _logits(z, scale, softcap, divisor, CAPPED)
            log_p = v - highest - log_sum
            p = tl.exp(log_p)
            dz = of_p * p - evenly
            dz -= tl.where(start + lanes == label, of_loss * (1.0 - smoothing), 0.0)
            if grad_entropy_ptr is not None:
                dz -= tl.load(grad_entropy_ptr + row) * p * (log_p + tl.load(entropy_ptr + row))
            tl.store(z_ptr + start + lanes, (dz * slope).to(z_ptr.dtype.element_ty), mask=inside)


def head(
    z: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss: torch.Tensor | None = None,
    lse: torch.Tensor,
    entropy: torch.Tensor | None = None,
    top1: torch.Tensor | None = None,
    mean_logits: torch.Tensor | None = None,
    log_sum_sq: torch.Tensor | None = None,
    gradient: bool = False,
    grad: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
) -> None:
    """Statistics of z (T, V), rows contiguous, bf16, fp16 or fp32, into the tensors (T,) that are given, and with
    `gradient` dz into z. Without `loss` no statistics: lse (T, 2), and with grad_entropy the entropy, are read."""
    tokens, words = z.shape
    assert z.stride(1) == 1 and labels.dtype == torch.int64 and labels.is_contiguous() and scale > 0.0
    for vector in (loss, lse, entropy, mean_logits, log_sum_sq, grad, grad_entropy):
        assert vector is None or (vector.dtype == torch.float32 and vector.is_contiguous())
    assert grad_entropy is None or entropy is not None
    if tokens == 0:
        return
    launch(
        _head_kernel, (tokens,), z, labels, loss, lse, entropy, top1, mean_logits, log_sum_sq, grad, grad_entropy,
        words, z.stride(0), scale, softcap, temperature, smoothing, z_loss,
        STATISTICS=loss is not None, GRADIENT=gradient, CAPPED=softcap > 0.0,
        MEAN=loss is not None and (smoothing > 0.0 or mean_logits is not None),
        BLOCK=BLOCK if z.stride(0) % 16 == 0 else UNALIGNED_BLOCK, num_warps=8,
    )  # fmt: skip
