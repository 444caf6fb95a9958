"""The ops of ``csrc/``, compiled and loaded at their first use (:mod:`fastlora._build` says how and where)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from fastlora import _build


@cache
def load() -> Path:
    """Make ``torch.ops.fastlora.*`` of ``csrc/`` available; the shared object's path. Raises ``_build.Unavailable``."""
    path = _build.build()
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        raise _build.Unavailable(f"{path} does not load: {error}") from error
    torch.library.register_fake("fastlora::dropout_keep_mask", _dropout_keep_mask_fake)
    torch.library.register_fake("fastlora::orthonormal", _orthonormal_fake)
    torch.library.register_fake("fastlora::factored_product", _factored_product_fake)
    torch.library.register_fake("fastlora::sketch_update", _sketch_update_fake)
    torch.library.register_fake("fastlora::lanczos_step", _lanczos_step_fake)
    torch.library.register_fake("fastlora::jacobi_svd", _jacobi_svd_fake)
    return path


def _dropout_keep_mask_fake(seed: torch.Tensor, M: int, K: int, threshold: int) -> torch.Tensor:
    return seed.new_empty((M, K), dtype=torch.bool)


def _orthonormal_fake(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(matrix), matrix.new_empty(1, dtype=torch.int32)


def _factored_product_fake(x: torch.Tensor, dy: torch.Tensor, v: torch.Tensor, weight: float) -> torch.Tensor:
    return v.new_empty((dy.shape[1], v.shape[1]))


def _sketch_update_fake(
    q: torch.Tensor, z: torch.Tensor, start: torch.Tensor | None, x: torch.Tensor, dy: torch.Tensor, weight: float
) -> torch.Tensor:
    return q.new_empty(1, dtype=torch.int32)


def _lanczos_step_fake(
    x: torch.Tensor | None,
    y: torch.Tensor,
    us: torch.Tensor,
    zs: torch.Tensor,
    vs: torch.Tensor,
    v: torch.Tensor,
    step: int,
) -> torch.Tensor:
    return v.new_empty(1, dtype=torch.int32)


def _jacobi_svd_fake(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, c = a.shape
    return torch.empty_like(a), a.new_empty(batch, c), a.new_empty(batch, c, c), a.new_empty(batch, dtype=torch.int32)


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

    Example:
        >>> from fastlora import ops
        >>> keep = ops.dropout_keep_mask(torch.tensor([1234]), 4, 64, p=0.1)
        >>> dropped = torch.where(keep, x / 0.9, 0)
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_keep_mask: p is {p!r}; wanted a probability from 0 to 1")
    load()
    return torch.ops.fastlora.dropout_keep_mask(seed, M, K, round(p * 65536))
