"""The passes over a chunk's logits by the Triton kernel of kernels/head.py: as aten.py's, with scale, cap and
temperature inside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.head import head as launch_head
from ...kernels.launch import device_of
from .aten import Chunk, Head, Loss

RAW = True


def scores(chunk: Chunk, head: Head, loss: Loss, wanted: Sequence[bool]) -> list[Tensor | None]:
    """As aten.py's."""
    names = ("entropy", "top1", "mean_logits", "log_sum_sq")
    made = {
        name: _vector(chunk, torch.bool if name == "top1" else torch.float32)
        for name, want in zip(names, wanted, strict=True)
        if want
    }
    losses, lse = _vector(chunk), chunk.z.new_empty(chunk.z.shape[0], 2, dtype=torch.float32)
    _launch(chunk, head, loss, loss=losses, lse=lse, **made)
    return [losses, lse, *map(made.get, names)]


def losses_(chunk: Chunk, head: Head, loss: Loss, grad: Tensor | None, gradient: bool) -> Tensor:
    """As aten.py's."""
    losses, lse = _vector(chunk), chunk.z.new_empty(chunk.z.shape[0], 2, dtype=torch.float32)
    grad = None if grad is None else grad.float()
    _launch(chunk, head, loss, loss=losses, lse=lse, grad=grad, gradient=gradient)
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
    """As aten.py's."""
    vectors = {"lse": lse, "grad": grad, "grad_entropy": grad_entropy, "entropy": entropy}
    vectors = {name: None if vector is None else vector.float().contiguous() for name, vector in vectors.items()}
    _launch(chunk, head, loss, **vectors, gradient=True)


def _vector(chunk: Chunk, dtype: torch.dtype = torch.float32) -> Tensor:
    return chunk.z.new_empty(chunk.z.shape[0], dtype=dtype)


def _launch(chunk: Chunk, head: Head, options: Loss, **vectors: Any) -> None:
    steps = {"scale": head.logit_scale, "softcap": head.softcap, "temperature": head.temperature}
    with device_of(chunk.z):
        launch_head(chunk.z, chunk.labels, **steps, smoothing=options.label_smoothing, z_loss=options.z_loss, **vectors)
