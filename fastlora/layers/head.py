"""The output head of a model whose loss is computed without logits: `patch(fused_loss=True)`.

In training the head gives `LazyLogits`: the model goes on as it does with logits, and its cross-entropy is computed in
chunks of tokens. In evaluation, without gradients, in compiled graphs and wherever the adapters are more than one
low-rank term, it gives the logits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import call
from ..ops import layer as ops_layer
from ..ops.head.lazy import LazyLogits, Source
from .checks import is_overridden
from .fused import FusedLayer, Terms


class Asked(dict):
    """A head's `loss_trust` while its caller wants `LazyLogits`, in evaluation and without gradients too."""


class LazyHead(nn.Linear):
    """A frozen head, which needs no adapter to compute its loss without logits. Made of an `nn.Linear` in place."""

    loss_trust: dict[Any, str | None]

    def forward(self, input: Tensor) -> Tensor:
        lazy = lazy_logits(self, input, Terms(self.weight, self.bias, []), self.loss_trust)
        return super().forward(input) if lazy is None else lazy


def lazy_logits(layer: nn.Module, x: Tensor, terms: Terms, trust: dict[Any, str | None] | None) -> LazyLogits | None:
    """What stands for the logits of a head, or None where the logits themselves are wanted."""
    if trust is None or torch.compiler.is_compiling():
        return None
    if not isinstance(trust, Asked) and not (layer.training and torch.is_grad_enabled()):
        return None
    adapter = call.as_one_adapter(terms.adapters) if terms.adapters else None
    if (terms.adapters and adapter is None) or x.is_meta or x.dim() < 1 or is_overridden(layer):
        return None
    if not call.takes_fused_path(x, terms.weight, terms.bias, *(adapter[:2] if adapter is not None else ())):
        return None
    backend = getattr(layer, "backend", "auto")

    def run(h: Tensor) -> Tensor:
        if not terms.adapters:
            return F.linear(h, terms.weight, terms.bias)
        return ops_layer.multi_lora_linear(h, terms.weight, terms.adapters, terms.bias, backend=backend)

    autocast = torch.get_autocast_dtype(x.device.type) if call.autocast_enabled(x) else None
    return LazyLogits(x, Source(terms.weight, terms.bias, adapter, run, trust, autocast), autocast or x.dtype)


def fuse_losses(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Lets every output head of a model compute its loss without logits: (names of the heads, name → why not)."""
    heads = {id(head): head for head in map(output_head, model.modules()) if head is not None}
    fused: list[str] = []
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        if id(module) not in heads:
            continue
        base = getattr(module, "base_layer", module)
        weight = getattr(base, "weight", None)
        if type(weight) not in call.PLAIN_TENSORS:
            kind = type(base).__name__ if weight is None else type(weight).__name__
            left_alone[name] = f"its weight is a {kind}, not a plain tensor (sharded, quantised)"
        elif isinstance(module, (FusedLayer, LazyHead)):
            fused.append(name)
        elif type(module) is not nn.Linear:
            left_alone[name] = f"{type(module).__name__} is not a plain linear layer"
        elif is_overridden(module):
            left_alone[name] = "it has hooks, or its forward was replaced on the instance"
        else:
            module.__class__ = LazyHead
            fused.append(name)
        if name in fused and getattr(module, "loss_trust", None) is None:
            module.loss_trust = {}  # type: ignore[assignment]
    return fused, left_alone


def release_losses(model: nn.Module) -> None:
    """Takes `fuse_losses` back."""
    for module in model.modules():
        module.__dict__.pop("loss_trust", None)
        if type(module) is LazyHead:
            cast(nn.Module, module).__class__ = nn.Linear


def output_head(module: nn.Module) -> nn.Module | None:
    """What a model of transformers says its output head is."""
    output: Any = getattr(module, "get_output_embeddings", None)
    head = output() if callable(output) else None
    return head if isinstance(head, nn.Module) else None
