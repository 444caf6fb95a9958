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
from ..introspect.targets import Selection
from .report import ModuleReport, PatchReport


def patch(model: nn.Module, layers: dict[str, Any], selection: Selection, backend: str, strict: bool) -> PatchReport:
    """Swaps PEFT's selected layers, in place. Raises ValueError where none is selected, and with `strict` for one that
    would be left alone."""
    report = PatchReport()
    plan = []
    for name, layer in layers.items():
        kind = type(layer).__name__
        why_not = None
        if not selection.all_linear and not selection.names(name):
            why_not = "not among target_modules"
        elif selection.excludes(name):
            why_not = "in exclude_modules"
        targeted = why_not is None
        if isinstance(layer, FusedPeftLayer):
            report.modules.append(ModuleReport(name, kind, True, "was patched already", targeted))
            continue
        why_not = why_not or peft_adopt.unsupported(layer)
        if targeted and why_not is not None and strict:
            raise ValueError(f"patch: strict=True, and {name!r} cannot be patched: {why_not}")
        if why_not is None:
            plan.append(layer)
        reason = why_not or peft_adopt.prediction(layer) or "PEFT's adapters, run fused"
        report.modules.append(ModuleReport(name, kind, why_not is None, reason, targeted))
    if not any(line.targeted for line in report.modules):
        raise ValueError(
            f"patch: target_modules: {selection.targets!r} selects none of this model's PEFT layers: "
            f"{', '.join(list(layers)[:8])}{', ...' if len(layers) > 8 else ''}"
        )
    for layer in plan:
        peft_adopt.adopt(layer, backend)
    peft_tuner.follow(model, selection, backend)
    if not report.patched:
        warnings.warn(
            "fastlora.patch: none of this model's PEFT layers can run fused; they stay with PEFT. Reasons:\n"
            + str(report),
            UserWarning,
            stacklevel=3,
        )
    return report
