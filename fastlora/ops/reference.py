"""The specification: a LoRA linear layer in eager PyTorch, written to be read.

Every backend is tested against `lora_linear` in fp64. It is also what runs where a fused path cannot: tensor subclasses
(DTensor, quantised weights), `torch.func` transforms, `torch.jit.trace`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def _widest(*tensors: torch.Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def apply_dropout(x: torch.Tensor, dropout_p: float, keep_mask: torch.Tensor | None = None) -> torch.Tensor:
    """drop(x) = x ∘ mask / (1 - p); the mask (True: kept) is drawn from torch's generator when None is given."""
    if dropout_p == 0.0:
        return x
    if keep_mask is None:
        return F.dropout(x, dropout_p, training=True)
    if dropout_p == 1.0:
        return x * 0.0
    return x * keep_mask / (1.0 - dropout_p)


def low_rank_term(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    keep_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """s·(drop(x) Aᵀ) Bᵀ in the widest dtype of x and the adapters, as in PEFT; under autocast in its dtype."""
    wide = _widest(x, lora_A, lora_B)
    s = F.linear(apply_dropout(x.to(wide), dropout_p, keep_mask), lora_A.to(wide))
    return scaling * F.linear(s, lora_B.to(wide))


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W0ᵀ + b + s·(drop(x) Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    x (..., K), weight (N, K), lora_A (r, K), lora_B (N, r), bias (N,) or None, keep_mask like x or None. Returns (...,
    N) in F.linear's dtype, rounded to it once.
    """
    y = F.linear(x, weight, bias)
    return (y + low_rank_term(x, lora_A, lora_B, scaling, dropout_p, keep_mask)).to(y.dtype)


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> torch.Tensor:
    """y = W0[ids] + s·Aᵀ[ids] Bᵀ, as PEFT's: ids of any shape, weight (V, D), lora_A (r, V), lora_B (D, r)."""
    y = F.embedding(ids, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return embedding_term(y, ids, lora_A, lora_B, scaling, padding_idx, scale_grad_by_freq)


def embedding_term(
    y: torch.Tensor,
    ids: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> torch.Tensor:
    """y + s·Aᵀ[ids] Bᵀ in the widest dtype of them, rounded once to y's."""
    rows = F.embedding(ids, lora_A.t(), padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    wide = _widest(y, lora_A, lora_B)
    return (y + scaling * F.linear(rows.to(wide), lora_B.to(wide))).to(y.dtype)


def mixed_batch_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Sequence[Any]],
    sequences: Sequence[Sequence[int]],
    bias: torch.Tensor | None = None,
    keep_masks: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """y = x W0ᵀ + b, and s·(drop(x) Aᵀ) Bᵀ in the sequences of each adapter.

    x (batch, ..., K); adapters (lora_A, lora_B, scaling, dropout_p, ...); `sequences[i]`: where in the batch adapter i
    is used; keep_masks: one (its rows in order, K) for each adapter, or None. Returns (batch, ..., N).
    """
    y = F.linear(x, weight, bias)
    for i, (lora_A, lora_B, scaling, dropout_p, *_) in enumerate(adapters):
        where = torch.tensor(sequences[i], dtype=torch.int64, device=x.device)
        rows = x.index_select(0, where)
        keep = None if keep_masks is None else keep_masks[i]
        term = low_rank_term(rows, lora_A, lora_B, scaling, dropout_p, keep if keep is None else keep.view(rows.shape))
        y = y.index_copy(0, where, (y.index_select(0, where) + term).to(y.dtype))
    return y


def grouped_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: Sequence[int],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    bias: torch.Tensor | None = None,
    dropout_ps: Sequence[float] | None = None,
    keep_masks: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """y = x W_eᵀ + b_e + Σ s·(drop(x) A_eᵀ) B_eᵀ in the rows of each expert e, up to `ends[e]`; 0 after the last.

    x (P, K) sorted by expert; weight (E, N, K); bias (E, N); of each adapter lora_A (E, r, K), lora_B (E, N, r) and
    keep_mask (P, K) or None. Returns (P, N).
    """
    parts, start = [x.new_empty(0, weight.shape[1])], 0
    for e, end in enumerate(ends):
        rows = x[start:end]
        y = F.linear(rows, weight[e].to(x.dtype), None if bias is None else bias[e].to(x.dtype))
        for i, (a, b, scaling) in enumerate(zip(lora_As, lora_Bs, scalings, strict=True)):
            keep = None if keep_masks is None else keep_masks[i]
            keep = None if keep is None else keep[start:end]
            p = 0.0 if dropout_ps is None else dropout_ps[i]
            y = (y + low_rank_term(rows, a[e], b[e], scaling, p, keep)).to(y.dtype)
        parts.append(y)
        start = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[1], dtype=parts[-1].dtype)])


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W0ᵀ + b + (m/n − 1) ∘ (drop(x) W0ᵀ) + (m/n) ∘ s·(drop(x) Aᵀ) Bᵀ, n = ‖W0 + s·B A‖ by row, a constant.

    Without dropout that is x W′ᵀ + b with W′ = m ∘ (W0 + s·B A)/n (Liu et al. 2024, DoRA, arXiv 2402.09353, eq. 5, with
    n out of the gradient as in its section 4.3); the dropped form is that of the paper's code, and PEFT's. magnitude
    (N,); the others as in `lora_linear`.
    """
    wide = _widest(x, lora_A, lora_B, magnitude)
    a, b = lora_A.to(wide), lora_B.to(wide)
    norm = (weight.to(wide) + scaling * (b @ a)).detach().norm(dim=1)
    factor = magnitude.to(wide) / norm.masked_fill(norm == 0, torch.inf)  # a row of zeros has no direction
    dropped = apply_dropout(x.to(wide), dropout_p, keep_mask)
    frozen, low_rank = F.linear(dropped.to(x.dtype), weight), scaling * F.linear(F.linear(dropped, a), b)
    y = F.linear(x, weight, bias)
    return (y + (factor - 1) * frozen + factor * low_rank).to(y.dtype)


def head_losses(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
    labels: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    keep_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of every token (T,) under a head with LoRA: (1−ε)·(−log p_y) + ε·mean(−log p) + ζ·lse², 0 for those that
    do not count; h (T, H), weight (V, H), labels (T,). The logits are scaled, then capped, then divided."""
    z = head_logits(h, weight, bias, lora_A, lora_B, scaling, dropout_p, logit_scale, softcap, temperature, keep_mask)
    return token_losses(z, labels, ignore_index, label_smoothing, z_loss)


def token_losses(
    z: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """The losses of `head_losses` from their logits (T, V)."""
    losses = F.cross_entropy(z, labels, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * z.logsumexp(-1).square() * (labels != ignore_index)
    return losses


def head_logits(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    keep_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits of `head_losses` (T, V), in float32 at least."""
    if lora_A is None or lora_B is None:
        z = F.linear(h, weight, bias)
    else:
        z = lora_linear(h, weight, lora_A, lora_B, scaling, bias, dropout_p, keep_mask)
    return scaled_logits(z, logit_scale, softcap, temperature)


def scaled_logits(z: torch.Tensor, logit_scale: float, softcap: float, temperature: float) -> torch.Tensor:
    """Logits as the loss has them, in float32 at least."""
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_scores(z: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> tuple[torch.Tensor, ...]:
    """(entropy in nats, whether the label is the likeliest word, mean of the logits, log Σ p²) of every token, from its
    logits (..., V); 0 and False for those that do not count."""
    counts, log_p = labels != ignore_index, z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    fixed = z.detach()
    scores = entropy, fixed.argmax(-1) == labels, fixed.mean(-1), (2 * log_p.detach()).logsumexp(-1)
    return tuple(score * counts for score in scores)
