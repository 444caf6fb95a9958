"""AdaLoRA's importances in ATen: a CPU's path, and the fallback of kernels/importance.py, where the equations are."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.importance_plan import Averages, Factors

# Numbers taken at a time on a CPU: w, g, Ī, Ū and the products, 1.25 MiB in fp32, stay in a core's second-level cache
# from the first of the nine operations to the last. A GPU, where each operation is a launch, takes all of a shape.
CHUNK = 1 << 16


def unsupported(weights: Factors) -> str | None:
    """None: ATen takes every floating-point dtype."""
    return None


def update(averages: Averages, weights: Factors, gradients: Factors, rate: Tensor | None = None) -> Tensor:
    """S (layout.total_rank,) after one step; the averages are updated in place.

    A gradient that is None counts as zero; `rate` (1,) multiplies all of them.
    """
    layout, sensitivity, _, _, _ = averages
    most = CHUNK if sensitivity.device.type == "cpu" else None
    runs = layout.runs(most)
    room = torch.empty_like(sensitivity[: max(layout.total_rank, *(run.stop - run.start for run in runs))])
    means: dict[str, list[Tensor]] = {"q": [], "p": []}
    for run in runs:
        size = run.shape[0] * run.shape[1]
        part = slice(run.start, run.stop)
        out = room[: run.stop - run.start]
        views = [view.view(run.shape) for view in out.split(size)]
        of_weights, of_gradients = getattr(weights, run.factor), getattr(gradients, run.factor)
        _multiply(views, [of_weights[i] for i in run.layers], [of_gradients[i] for i in run.layers])
        _smooth(out, averages, part, rate)
        stacked = out.view(len(run.layers), *run.shape)
        means[run.factor].append(stacked.mean(dim=2 if run.factor == "q" else 1).flatten())
    scores = torch.empty_like(sensitivity[: layout.total_rank])
    views = [view.unsqueeze(1) for view in scores.split([r for r, _, _ in layout.sizes])]
    _multiply(views, list(weights.e), list(gradients.e))
    _smooth(scores, averages, slice(0, layout.total_rank), rate)
    for factor in ("p", "q"):
        scores += torch.cat(means[factor]).index_select(0, layout.rank_order(factor, scores.device))
    return scores


def _multiply(out: list[Tensor], weights: list, gradients: list) -> None:
    """out = w·g, one by one."""
    torch._foreach_copy_(out, weights)
    there = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if len(there) < len(out):
        torch._foreach_zero_([out[i] for i, gradient in enumerate(gradients) if gradient is None])
    if there:
        torch._foreach_mul_([out[i] for i in there], [gradients[i] for i in there])


def _smooth(products: Tensor, averages: Averages, part: slice, rate: Tensor | None) -> None:
    """A part of the averages in place; products become s = Ī·Ū."""
    sensitivity, uncertainty = averages.sensitivity[part], averages.uncertainty[part]
    if rate is not None:
        products.mul_(rate)
    products.abs_().nan_to_num_(nan=0.0, posinf=0.0)
    sensitivity.lerp_(products, 1.0 - averages.beta1)
    uncertainty.lerp_(products.sub_(sensitivity).abs_(), 1.0 - averages.beta2)
    torch.mul(sensitivity, uncertainty, out=products)
