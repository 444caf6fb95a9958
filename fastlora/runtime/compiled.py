"""The ops of ``csrc/``, compiled and loaded at their first use (:mod:`fastlora.runtime.build` says how and where)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from . import build


@cache
def load() -> Path:
    """Make ``torch.ops.fastlora.*`` of ``csrc/`` available; the shared object's path. Raises ``build.Unavailable``."""
    path = build.build()
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        raise build.Unavailable(f"{path} does not load: {error}") from error
    torch.library.register_fake("fastlora::dropout_keep_mask", _dropout_keep_mask_fake)
    torch.library.register_fake("fastlora::orthonormal", _orthonormal_fake)
    torch.library.register_fake("fastlora::factored_product", _factored_product_fake)
    torch.library.register_fake("fastlora::sketch_update", _sketch_update_fake)
    torch.library.register_fake("fastlora::lanczos_step", _lanczos_step_fake)
    torch.library.register_fake("fastlora::jacobi_svd", _jacobi_svd_fake)
    return path


@cache
def load_if_built() -> bool:
    """`load` where the object is there already: whether it is. For what has another way, and is not worth a compiler's
    half minute."""
    try:
        if build.find(build.find_toolchain()) is None:
            return False
        load()
    except build.Unavailable:
        return False
    return True


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
