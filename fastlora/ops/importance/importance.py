"""What computes AdaLoRA's importances: one fused pass of Triton kernels on a GPU, once they have passed their first-use
check, ATen elsewhere.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...kernels.importance_plan import Averages, Factors, Layout
from ...runtime import env
from ...runtime.trust import Trusted, first_difference, module_or_reason, seeded
from . import aten

_trusted = Trusted("AdaLoRA's importance kernel", "ATen runs instead")


def select(weights: Factors) -> ModuleType:
    """The module whose `update` takes these factors: of one device, not empty."""
    like = weights.e[0]
    assert like is not None
    if not like.is_cuda or env.backend() == "torch" or why_not(weights) is not None:
        return aten
    return importlib.import_module("fastlora.ops.importance.triton")


def why_not(weights: Factors) -> str | None:
    """None where the kernels take these factors, or why ATen does."""
    module = module_or_reason("fastlora.ops.importance.triton")
    if isinstance(module, str):
        return f"cannot be imported: {module}"
    reason, like = module.unsupported(weights), weights.e[0]
    if reason is not None or like is None or not like.is_cuda:
        return reason
    return _trusted.why_not((like.device, like.dtype), lambda: self_check(module, like.device, like.dtype))


def self_check(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compares Ī, Ū and the scores with fp64 after three steps of layers that divide nothing, one with ranks beyond a
    block, one without a gradient for its P; None where they agree, else what differs."""
    with seeded(device), torch.no_grad():
        layout = Layout([(5, 67, 35), (70, 24, 20), (5, 67, 35), (4, 32, 16)])
        smooth, unsure = (torch.zeros(layout.numel, device=device) for _ in range(2))
        averages = Averages(layout, smooth, unsure, 0.85, 0.75)
        exact = averages._replace(sensitivity=smooth.double(), uncertainty=unsure.double())
        scores, wanted = smooth, smooth
        for _ in range(3):
            weights, gradients = (_random(layout, device, dtype) for _ in range(2))
            gradients = gradients._replace(p=[*gradients.p[:2], None, *gradients.p[3:]])
            scores = module.update(averages, weights, gradients, torch.full((1,), 0.5, device=device))
            wanted = reference(exact, weights, gradients, 0.5)
        results = [("the sensitivity", smooth, exact.sensitivity), ("the uncertainty", unsure, exact.uncertainty)]
        results += [
            (f"layer {i}'s scores", part, want)
            for i, (part, want) in enumerate(
                zip(*(s.split([r for r, _, _ in layout.sizes]) for s in (scores, wanted)), strict=True)
            )
        ]
        return first_difference(results, torch.float32)


def _random(layout: Layout, device: torch.device, dtype: torch.dtype) -> Factors:
    layers = range(len(layout.sizes))
    return Factors(
        *([torch.randn(layout.shape(f, i), device=device).to(dtype) for i in layers] for f in Factors._fields)
    )


def reference(averages: Averages, weights: Factors, gradients: Factors, rate: float = 1.0) -> Tensor:
    """The equations in fp64, a layer at a time; the averages are updated in place."""
    layout, sensitivity, uncertainty, beta1, beta2 = averages
    scores = []
    for layer in range(len(layout.sizes)):
        of_layer = {}
        for factor in Factors._fields:
            w, g = getattr(weights, factor)[layer], getattr(gradients, factor)[layer]
            product = torch.zeros_like(w).double() if g is None else (w.double() * g.double() * rate).abs()
            smooth, unsure = (layout.view(flat, factor, layer) for flat in (sensitivity, uncertainty))
            smooth.copy_(beta1 * smooth + (1 - beta1) * product)
            unsure.copy_(beta2 * unsure + (1 - beta2) * (product - smooth).abs())
            of_layer[factor] = smooth * unsure
        scores.append(of_layer["e"][:, 0] + of_layer["p"].mean(0) + of_layer["q"].mean(1))
    return torch.cat(scores)
