"""DoRA's norms, kept between calls for as long as nothing that they are made of has changed.

By default they are made again at every call: one pass over W0, a small part of a product with many tokens. Where there
are few, as in generation, that pass is as long as the product itself, and `fastlora.variants.kept_norms(model)` keeps
them. A kept norm is taken only where the weight and the factors are the same storages, at the same places, with the
same version counters, and the scale is the same. What writes past those counters (`parameter.data.mul_(2)`, a kernel
of one's own) must not happen within the block; between blocks, and wherever gradients are on, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_Key = tuple[float, list[tuple]]


class KeptNorms:
    """The norms of one layer's adapters."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[StorageWeakRef], _Key, Tensor]] = {}

    def of(self, name: str, sources: Sequence[Tensor], scaling: float, make: Callable[[], Tensor]) -> Tensor | None:
        """The norms of this adapter, kept or made; None where they cannot be kept now (gradients, compilation)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(s.is_inference() for s in sources):
            return None
        # Weak references keep a storage's identity, not its memory: no later one can be taken for it.
        storages = [StorageWeakRef(source.untyped_storage()) for source in sources]
        key = (
            float(scaling),
            [(s.data_ptr(), s._version, s.shape, s.stride(), s.dtype, s.device) for s in sources],
        )
        kept = self._kept.get(name)
        if kept is not None and kept[1] == key and kept[0] == storages:
            return kept[2]
        norm = make()
        self._kept[name] = storages, key, norm
        return norm
