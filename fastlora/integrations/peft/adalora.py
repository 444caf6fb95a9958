"""PEFT's AdaLoRA layer on our kernels, in place, as adopt.py does it with LoRA's.

PEFT's `SVDLinear` adds (drop(x) (A∘E)ᵀ) Bᵀ·alpha/(ranknum + 1e-5), with its ParameterDicts lora_A (r, in), lora_E
(r, 1), lora_B (out, r) and ranknum (1,). ranknum, the rank that an adapter began with, is a parameter on the device: it
goes into A with E, so that no call waits for it to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor

from ...layers.checks import is_overridden, tensors_of
from ...layers.fused import Terms
from ...ops import call
from .lora import FusedForward, read_dropout, why_not_factors
from .merge import PLAIN_TENSORS, ExactMerge

EPSILON = 1e-5  # PEFT's, added to ranknum


class FusedSVDLinear(FusedForward, ExactMerge, SVDLinear):
    """PEFT's AdaLoRA `SVDLinear` whose forward runs `functional.multi_lora_linear` wherever that computes the same
    thing. Never constructed: see `adopt.adopt`."""

    PLAIN = SVDLinear

    @staticmethod
    def read_adapters(layer: Any, plan: Terms, x: Tensor | None, mixed: Sequence[str] | None) -> str | None:
        modules = layer._modules
        lora_a, lora_b, lora_e, ranknum = (
            tensors_of(modules[key]) for key in ("lora_A", "lora_B", "lora_E", "ranknum")
        )
        dropouts = modules["lora_dropout"]._modules
        for name in layer.active_adapters if mixed is None else mixed:
            if name not in lora_a:
                continue
            factors = (lora_a[name], lora_b[name], lora_e[name])
            reason = why_not_factors(layer, x, factors, layer.scaling[name])
            if type(ranknum[name]) not in PLAIN_TENSORS or ranknum[name].numel() != 1:
                reason = "adapter weights are sharded or offloaded"
            if reason is not None:
                return reason
            dropout_p = read_dropout(dropouts[name])
            if isinstance(dropout_p, str):
                return dropout_p
            if is_overridden(dropouts[name]):
                return "hooks on lora_dropout, or its forward replaced"
            a, b, e = factors
            if len(a):  # PEFT keeps adapters of rank 0, which add nothing
                # Without x nothing is computed: while PEFT loads, factors may be on the meta device, and ranknum not.
                down = a if x is None else a * (e / (ranknum[name] + EPSILON))
                plan.adapters.append(call.Adapter(down, b, float(layer.scaling[name]), dropout_p))
        return None

    def group_sources(self) -> tuple[list[Tensor], tuple]:
        parts = [tensors_of(self._modules[key]) for key in ("lora_A", "lora_E", "ranknum")]
        return [part[name] for name in self.active_adapters if name in parts[0] for part in parts], ()

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        scaling = float(self.scaling[name]) / (float(self.ranknum[name]) + EPSILON)
        values = self.lora_E[name].float() if self.lora_E[name].element_size() < 4 else self.lora_E[name]
        return self.lora_A[name] * values, self.lora_B[name], None, scaling
