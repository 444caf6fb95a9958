"""`FusedLoraEmbedding`: an `nn.Embedding` with named low-rank adapters, in PEFT's layout. Parameters and adapter state
are in state.py, the maths in ops/embedding/."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.embedding import embedding as op
from . import batch as layers_batch
from . import kinds, starts
from .linear import FusedLoraLinear
from .state import AdapterState

_FACTORS = ("lora_embedding_A", "lora_embedding_B")


class FusedLoraEmbedding(AdapterState, nn.Embedding):
    """y = W0[ids] + Σ s·Aᵀ[ids] Bᵀ over the active adapters, with W0 frozen. Made of an `nn.Embedding` by `patch`.

    Adapters are `lora_embedding_A[name]` (r, num_embeddings) and `lora_embedding_B[name]` (embedding_dim, r), which
    `lora_A` and `lora_B` also name. A starts at zero and B is drawn from N(0, 1), whatever `init_lora_weights` says but
    False, as in PEFT; nothing is dropped. Where transformers scales the embedding (`embed_scale`), the sum is scaled.
    """

    TRAINED = (*_FACTORS, *kinds.TRAINED[2:])
    STATE = (*FusedLoraLinear.STATE, *_FACTORS)

    shares_input = False
    lora_A = property(lambda self: self.lora_embedding_A)  # type: ignore[assignment]
    lora_B = property(lambda self: self.lora_embedding_B)  # type: ignore[assignment]
    in_features = property(lambda self: self.num_embeddings)  # type: ignore[assignment]
    out_features = property(lambda self: self.embedding_dim)  # type: ignore[assignment]

    def reset_adapter(self, name: str, init_lora_weights: bool | str = True) -> None:
        """Restarts an adapter: A zero and B ~ N(0, 1), or both ~ N(0, 1) with False, as in PEFT."""
        self._check_names([name], "reset_adapter")
        starts.check_init(init_lora_weights, "FusedLoraEmbedding.reset_adapter")
        if init_lora_weights is False:
            nn.init.normal_(self.lora_A[name])
        else:
            nn.init.zeros_(self.lora_A[name])
        nn.init.normal_(self.lora_B[name])

    get_delta_weight = kinds.get_delta_weight
    as_plain_adapter = starts.as_plain_adapter

    def forward(self, input: Tensor) -> Tensor:
        if self.disable_adapters and self.merged_adapters:
            self.unmerge()
        batch = None if self.disable_adapters else layers_batch.current(self)
        if batch is not None and self.merged_adapters:
            raise ValueError(
                f"FusedLoraEmbedding.forward: adapters {self.merged_adapters} are merged into the weight, which every "
                "sequence of a mixed batch would see; call fastlora.unmerge(model) first"
            )
        off = self.disable_adapters or self.merged_adapters
        names = [] if off else self.active_adapters if batch is None else [n for n in self.r if n in batch.names]
        if not torch.compiler.is_compiling():  # a changing count would be a new graph for every call
            if names:
                self.calls.fused += 1
            else:
                self.calls.base += 1
        for name in names:
            factors = self.lora_A[name], self.lora_B[name]
            op.check(input, self.weight, *factors, self.padding_idx, "FusedLoraEmbedding.forward")
        y = F.embedding(input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        rows = None if batch is None else batch.repeated(len(input))
        for name in names:
            if rows is None:
                y = self._with(name, input, y)
            else:
                where = torch.tensor([i for i, row in enumerate(rows) if row == name], device=input.device)
                y = y.index_copy(0, where, self._with(name, input[where], y[where]))
        scale: Any = getattr(self, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)

    def _with(self, name: str, ids: Tensor, y: Tensor) -> Tensor:
        factors = self.lora_A[name], self.lora_B[name]
        return op.add_rows(y, ids, *factors, self.scaling[name], self.padding_idx, self.scale_grad_by_freq)
