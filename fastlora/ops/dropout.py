"""The mask that the kernels' dropout applied, as a tensor."""

from __future__ import annotations

import torch

from ..runtime.compiled import load


def dropout_keep_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """The mask that the Triton kernels' dropout applied: what a fused layer kept of an (M, K) input.

    Args:
        seed: int64 tensor of one element, the ``dropout_state`` of the layer's forward pass; it stays on its device.
        M, K: rows and columns of the input, each less than 2^31.
        p: the dropout probability, in [0, 1].

    Returns:
        (M, K) bool on seed's device, True where the element was kept.

    Raises:
        ValueError: p is not in [0, 1].
        RuntimeError: seed, M or K is not as above, or ``csrc/`` cannot be compiled here (the message says why).

    Examples:
        >>> from fastlora import ops
        >>> keep = ops.dropout_keep_mask(torch.tensor([1234]), 4, 64, p=0.1)
        >>> dropped = torch.where(keep, x / 0.9, 0)
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_keep_mask: p is {p!r}; wanted a probability from 0 to 1")
    load()
    return torch.ops.fastlora.dropout_keep_mask(seed, M, K, round(p * 65536))
