"""`patch` for a model that carries PEFT's LoRA layers: which of them run fused from now on.

Imported only where peft is.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..integrations.peft import adopt as peft_adopt
from ..integrations.peft import tuner as peft_tuner
from ..introspect.fused import FusedPeftLayer
from ..introspect.targets import Selection, called
from ..layers.fused import FallbackWatch, FusedLayer
from ..runtime.messages import by_reason
from .report import ModuleReport, PatchReport, refusal

ALREADY = "was patched already"


def patch(model: nn.Module, layers: dict[str, Any], selection: Selection, backend: str, strict: bool) -> PatchReport:
    """Swaps PEFT's selected layers, in place. Raises ValueError where none is selected, and with `strict` for one that
    would be left alone."""
    report = PatchReport()
    plan = []
    asked: dict[str, str] = {}
    for name, layer in layers.items():
        kind, name = type(layer).__name__, called(name, layer)
        why_not = None
        if not selection.all_linear and not selection.names(name):
            why_not = "not among target_modules"
        elif selection.excludes(name):
            why_not = "in exclude_modules"
        targeted = why_not is None
        why_not = why_not or peft_adopt.unsupported(layer)
        if why_not is None and not isinstance(layer, FusedPeftLayer):
            plan.append(layer)
        falls_back = why_not or peft_adopt.prediction(layer)
        done = ALREADY if isinstance(layer, FusedPeftLayer) else "PEFT's adapters, run fused"
        report.modules.append(ModuleReport(name, kind, falls_back is None, falls_back or done, targeted))
        # PEFT's layers on embeddings and convolutions are no linear layers that were asked for.
        if targeted and falls_back and (why_not is None or not selection.all_linear):
            asked[name] = falls_back
    if report.refused and strict:
        raise ValueError(f"patch: strict=True, and {refusal(report.refused)}")
    if not any(line.targeted for line in report.modules):
        raise ValueError(
            f"patch: target_modules: {selection.targets!r} selects none of this model's PEFT layers: "
            f"{', '.join(list(layers)[:8])}{', ...' if len(layers) > 8 else ''}"
        )
    if not report.patched:
        lines = "\n  ".join(by_reason(report.left_alone.items()))
        warnings.warn(
            f"fastlora.patch: none of this model's PEFT layers can run fused; they stay with PEFT. Reasons:\n  {lines}",
            UserWarning,
            stacklevel=3,
        )
    elif asked:
        lines = "\n  ".join(by_reason(asked.items()))
        warnings.warn(
            f"fastlora.patch: {len(asked)} PEFT layers cannot run fused; they stay with PEFT:\n  {lines}",
            UserWarning,
            stacklevel=3,
        )
    for layer in plan:
        peft_adopt.adopt(layer, backend)
    FallbackWatch({name: layer for name, layer in layers.items() if isinstance(layer, FusedLayer)})
    peft_tuner.follow(model, selection, backend)
    return report
