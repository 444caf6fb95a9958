"""The head's loss in ATen, in chunks of tokens: a chunk of logits exists at a time, and its gradients before the next.

    z = cap(scale · (h W0ᵀ + b + s·S Bᵀ)) / τ        S = drop(h) Aᵀ, cap(v) = c·tanh(v/c)
    ℓ = lse(z) − (1−ε)·z_y − ε·mean(z) + ζ·lse(z)²
    dz = (1 + 2ζ·lse)·softmax(z) − (1−ε)·onehot(y) − ε/V, times what arrives for the token

The products by W0 run in h's dtype; the low-rank path, softmax and sums in float32 (float64 for float64). A chunk's
logits are overwritten by their softmax and then by dz.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora.aten import dropout_scale

CPU_CHUNK_BYTES = 16 << 20  # of logits at a time; larger chunks are no faster on a CPU
GPU_CHUNK_BYTES = 512 << 20  # 840 tokens of 152k words in float32: the product by W0 is bound by arithmetic from 600 on


class Head(NamedTuple):
    """What the logits are made of: weight (V, H), bias (V,) or None, lora_A (r, H) and lora_B (V, r) or None, the
    scale s of the adapter, the dropout probability; then what happens to the logits (0 leaves a step out)."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    dropout_p: float
    logit_scale: float
    softcap: float
    temperature: float


class Loss(NamedTuple):
    """ε and ζ of the module's docstring."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Gradients:
    """Accumulators of dh (T, H), dA, dB, dW0 and db, each None where it is not needed."""

    def __init__(self, h: Tensor, head: Head, needs: tuple[bool, ...]) -> None:
        def zeros(like: Tensor | None, needed: bool) -> Tensor | None:
            if like is None or not needed:
                return None
            wide = torch.promote_types(like.dtype, torch.float32)  # many chunks add to one number
            return torch.zeros(like.shape, dtype=wide, device=like.device)

        need_h, need_a, need_b, need_w, need_bias = needs
        self.h = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_h else None
        self.lora_A, self.lora_B = zeros(head.lora_A, need_a), zeros(head.lora_B, need_b)
        self.weight, self.bias = zeros(head.weight, need_w), zeros(head.bias, need_bias)

    def tensors(self, head: Head) -> tuple[Tensor | None, ...]:
        """(dh, dA, dB, dW0, db) in the dtypes of what they belong to."""
        pairs = (
            (self.lora_A, head.lora_A),
            (self.lora_B, head.lora_B),
            (self.weight, head.weight),
            (self.bias, head.bias),
        )
        return (self.h, *(None if g is None or of is None else g.to(of.dtype) for g, of in pairs))


class Chunk(NamedTuple):
    """Some tokens: their rows in h, h's rows, the labels, drop(h)'s mask, drop(h) and S in z's dtype, the logits z and,
    with a soft cap, its slope."""

    rows: Tensor | slice
    h: Tensor
    labels: Tensor
    keep: Tensor | None
    dropped: Tensor | None
    s: Tensor | None
    z: Tensor
    slope: Tensor | None


def chunk_tokens(h: Tensor, vocabulary: int) -> int:
    """How many tokens' logits exist at a time: a share of the memory, rounded to what a product runs well with."""
    limit = CPU_CHUNK_BYTES
    if h.is_cuda:
        limit = min(GPU_CHUNK_BYTES, torch.cuda.mem_get_info(h.device)[0] // 8)
    tokens = max(1, limit // (max(1, vocabulary) * (8 if h.dtype == torch.float64 else 4)))
    return tokens if tokens < 16 else tokens // 16 * 16


def widened(h: Tensor, head: Head) -> Head:
    """The head with its factors in the dtype of the logits' arithmetic: r·(H + V) numbers."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return head._replace(**{name: f if f is None else f.to(wide) for name, f in zip(head._fields[2:4], head[2:4])})


RAW = False  # whether this backend takes logits before scale, cap and temperature


def chunks(
    h: Tensor, head: Head, labels: Tensor, keep: Tensor | None, rows: Tensor | None, raw: bool
) -> Iterator[Chunk]:
    """The tokens' logits, chunk by chunk; with `rows` only those rows of h (T, H). The caller may write into z. The
    head is `widened`; with `raw` its scale, cap and temperature are left out."""
    count = h.shape[0] if rows is None else rows.shape[0]
    size = chunk_tokens(h, head.weight.shape[0])
    lora_A, lora_B = head.lora_A, head.lora_B
    for start in range(0, count, size):
        where: Tensor | slice = slice(start, min(start + size, count)) if rows is None else rows[start : start + size]
        x, y = h[where], labels[where]
        z = x.mm(head.weight.t())
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if head.bias is not None:
            z += head.bias
        mask = dropped = s = None
        if lora_A is not None and lora_B is not None:
            dropped = x.to(z.dtype)
            if keep is not None:
                mask = keep[where]
                dropped = dropped * mask * dropout_scale(head.dropout_p)
            s = dropped.mm(lora_A.t())
            z.addmm_(s, lora_B.t(), alpha=head.scaling)
        slope = None
        if head.logit_scale != 1.0 and not raw:
            z *= head.logit_scale
        if head.softcap > 0.0 and not raw:
            z.div_(head.softcap).tanh_()
            slope = z.square().neg_().add_(1.0)
            z *= head.softcap
        if head.temperature != 1.0 and not raw:
            z /= head.temperature
        yield Chunk(where, x, y, mask, dropped, s, z, slope)


def softmax_(z: Tensor) -> Tensor:
    """Overwrites logits by their softmax; lse in two parts (T, 2), the row's maximum m and log Σ exp(z − m): as one
    number its rounding would be the softmax's relative error, where that is formed again."""
    top = z.amax(dim=1, keepdim=True)
    total = z.sub_(top).exp_().sum(dim=1, keepdim=True)
    z /= total
    return torch.cat([top, total.log()], dim=1)


def _losses(chunk: Chunk, loss: Loss) -> tuple[Tensor, Tensor]:
    """(ℓ, lse in two parts) of a chunk's tokens; z becomes its softmax."""
    target = chunk.z.gather(1, chunk.labels[:, None]).squeeze(1)
    mean = chunk.z.mean(dim=1) if loss.label_smoothing else None
    lse = softmax_(chunk.z)
    top, log_sum = lse.unbind(1)
    value = log_sum + (1.0 - loss.label_smoothing) * (top - target)
    if mean is not None:
        value += loss.label_smoothing * (top - mean)
    if loss.z_loss:
        value += loss.z_loss * lse.sum(1).square()
    return value, lse


def scores(chunk: Chunk, head: Head, loss: Loss, wanted: Sequence[bool]) -> list[Tensor | None]:
    """ℓ, lse, and as far as they are wanted the entropy, whether the label is the likeliest word, the mean of the
    logits and log Σ p² of a chunk's tokens; z is overwritten."""
    entropy, top1, mean_logits, log_sum_sq = wanted
    z = chunk.z.clone() if entropy else None
    is_top1 = chunk.z.argmax(1) == chunk.labels if top1 else None
    mean = chunk.z.mean(1) if mean_logits else None
    losses, lse = _losses(chunk, loss)
    entropies = None if z is None else lse[:, 1] - z.sub_(lse[:, :1]).mul_(chunk.z).sum(1)
    return [losses, lse, entropies, is_top1, mean, chunk.z.norm(dim=1).log() * 2 if log_sum_sq else None]


def losses_(chunk: Chunk, head: Head, loss: Loss, grad: Tensor | None, gradient: bool) -> Tensor:
    """ℓ of a chunk's tokens; with `gradient` z becomes the gradient of Σ grad·ℓ (None: of Σ ℓ)."""
    losses, lse = _losses(chunk, loss)
    if gradient:
        _gradient_(chunk, head, loss, lse, grad)
    return losses


def gradient_(
    chunk: Chunk,
    head: Head,
    loss: Loss,
    lse: Tensor,
    grad: Tensor,
    grad_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
) -> None:
    """z becomes the gradient of Σ grad·ℓ + grad_entropy·H, given the tokens' lse and H."""
    z, extra = chunk.z.sub_(lse[:, :1]).sub_(lse[:, 1:]), None
    if grad_entropy is not None and entropy is not None:  # of H = −Σ p log p: −p (log p + H)
        extra = (z + entropy[:, None]).mul_(-grad_entropy[:, None])
        extra *= z.exp_()
    else:
        z.exp_()
    _gradient_(chunk, head, loss, lse, grad, extra)


def _gradient_(
    chunk: Chunk, head: Head, loss: Loss, lse: Tensor, grad: Tensor | None, extra: Tensor | None = None
) -> None:
    """z, the softmax, becomes the gradient; `extra`: what to add to that of the scaled logits."""
    dz = chunk.z
    if loss.z_loss:
        dz *= (1.0 + 2.0 * loss.z_loss * lse.sum(1))[:, None]
    if loss.label_smoothing:
        dz -= loss.label_smoothing / dz.shape[1]
    one = dz.new_full((1, 1), loss.label_smoothing - 1.0).expand(dz.shape[0], 1)
    dz.scatter_add_(1, chunk.labels[:, None], one)
    if grad is not None:
        dz *= grad.to(dz.dtype)[:, None]
    if extra is not None:
        dz += extra
    if chunk.slope is not None:
        dz *= chunk.slope
    if head.logit_scale != head.temperature:
        dz *= head.logit_scale / head.temperature


def accumulate(chunk: Chunk, head: Head, into: Gradients) -> None:
    """Adds a chunk's share to the gradients; z is the gradient of its logits."""
    dz = chunk.z
    if into.bias is not None:
        into.bias += dz.sum(0)
    narrow = dz.to(chunk.h.dtype)
    if into.weight is not None:
        into.weight += narrow.t().mm(chunk.h)
    dh = narrow.mm(head.weight) if into.h is not None else None
    if chunk.s is not None and head.lora_A is not None and head.lora_B is not None:
        assert chunk.dropped is not None
        if into.lora_B is not None:
            into.lora_B.add_(chunk.s.t().mm(dz).t(), alpha=head.scaling)
        if into.lora_A is not None or dh is not None:
            ds = dz.mm(head.lora_B).mul_(head.scaling)
            if into.lora_A is not None:
                into.lora_A += ds.t().mm(chunk.dropped)
            if dh is not None:
                term = ds.mm(head.lora_A)
                if chunk.keep is not None:
                    term *= chunk.keep
                    term *= dropout_scale(head.dropout_p)
                dh = (dh + term).to(chunk.h.dtype)
    if into.h is not None and dh is not None:
        into.h[chunk.rows] = dh
