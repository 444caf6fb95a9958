"""The four ways to train the classifier, each from the same pretrained weights: head alone, PEFT's LoRA, fastlora's
LoRA (from any of its starts), everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from study.adapting import set_training, start_from_gradients
from study.data.batches import Batch
from study.data.encoder import SentenceClassifier, load_encoder
from study.settings import Settings

TITLES = {
    "head": "head alone (encoder frozen)",
    "peft": "LoRA, PEFT (eager)",
    "full": "all weights",
}
ADAPTER = "default"


def title(method: str, settings: Settings) -> str:
    if method != "fastlora":
        return TITLES[method]
    return "LoRA, fastlora" if settings.init == "kaiming" else f"LoRA from {settings.init}, fastlora"


def build(
    method: str,
    source: str,
    classes: int,
    settings: Settings,
    device: torch.device,
    sketch_batches: Sequence[Batch] = (),
) -> SentenceClassifier:
    """A fresh classifier ready to train: what `method` trains requires a gradient, the rest does not.

    The head's initial weights, and an adapter's, come from the seed alone; LoRA-GA's adapters from the gradient of
    `sketch_batches` too.
    """
    encoder = load_encoder(source, getattr(torch, settings.dtype), device)
    hidden_size = encoder.config.hidden_size
    torch.manual_seed(settings.seed)
    classifier = SentenceClassifier(encoder, hidden_size, classes).to(device)
    torch.manual_seed(settings.seed)
    classifier.encoder = _PREPARE[method](encoder, settings)
    if method == "fastlora" and settings.init == "lora_ga":
        _start_along_the_gradient(classifier, settings, sketch_batches)
    return classifier


def _head(encoder: Any, settings: Settings) -> Any:
    return encoder.requires_grad_(False)


def _full(encoder: Any, settings: Settings) -> Any:
    return encoder.requires_grad_(True)


def _peft(encoder: Any, settings: Settings) -> Any:
    import peft

    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # annotated int, any number works
        lora_dropout=settings.dropout,
        target_modules="all-linear",
    )
    return peft.get_peft_model(encoder, config)


def _fastlora(encoder: Any, settings: Settings) -> Any:
    import fastlora

    fastlora.patch(
        encoder,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        init_lora_weights=True if settings.init in ("kaiming", "lora_ga") else settings.init,
        strict=True,
    )
    return encoder


def _start_along_the_gradient(classifier: SentenceClassifier, settings: Settings, batches: Sequence[Batch]) -> None:
    """Sets the adapters of a patched encoder by LoRA-GA. The head has learnt nothing yet: it is in its random start."""
    set_training(classifier, False)

    def passes() -> None:
        for batch in batches:
            logits = classifier(batch.input_ids, batch.attention_mask)
            nn.functional.cross_entropy(logits, batch.labels).backward()

    start_from_gradients("lora_ga", classifier.encoder, passes, settings.r, settings.gamma, settings.seed)
    classifier.zero_grad(set_to_none=True)


_PREPARE: dict[str, Callable[[Any, Settings], Any]] = {
    "head": _head,
    "peft": _peft,
    "fastlora": _fastlora,
    "full": _full,
}


def adapters_of(encoder: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of each adapted layer, PEFT's or fastlora's, under the layer's name in the plain encoder."""

    def weight(adapter: Any) -> torch.Tensor:
        return adapter if isinstance(adapter, torch.Tensor) else adapter.weight

    return {
        name.removeprefix("base_model.model."): (weight(module.lora_A[ADAPTER]), weight(module.lora_B[ADAPTER]))
        for name, module in encoder.named_modules()
        if hasattr(module, "lora_A") and ADAPTER in module.lora_A
    }


@torch.no_grad()
def copy_adapters(source: Any, target: Any) -> None:
    """Gives `target` the adapter weights of `source`, so that both start from the same point.

    Raises RuntimeError where the two do not adapt the same layers in the same shapes: a comparison would mean nothing.
    """
    ours, theirs = adapters_of(source), adapters_of(target)
    if shapes_of(ours) != shapes_of(theirs):
        raise RuntimeError(f"adapted layers differ: {shapes_of(ours)} and {shapes_of(theirs)}")
    for name, (lora_a, lora_b) in ours.items():
        theirs[name][0].copy_(lora_a)
        theirs[name][1].copy_(lora_b)


def shapes_of(adapters: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {name: tuple(tuple(tensor.shape) for tensor in pair) for name, pair in adapters.items()}
