"""AdaLoRA's importances by the Triton kernels of kernels/importance.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import importance
from ...kernels.importance_plan import Averages, Factors, addresses
from ...kernels.launch import DTYPES, device_of
from ...kernels.segment_plan import to_device


def unsupported(weights: Factors) -> str | None:
    """None, or why the kernels cannot take these factors."""
    dtypes = {tensor.dtype for tensors in weights for tensor in tensors if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"needs bfloat16, float16 or float32, one for all factors, got {sorted(map(str, dtypes))}"
    if not all(tensor.is_contiguous() for tensors in weights for tensor in tensors if tensor is not None):
        return "needs contiguous factors"
    return None


def update(averages: Averages, weights: Factors, gradients: Factors, rate: Tensor | None = None) -> Tensor:
    """As aten.py's `update`. Nothing is read back: the addresses go to the device in one copy."""
    layout, sensitivity, uncertainty, beta1, beta2 = averages
    like = weights.e[0]
    assert like is not None
    # The copies of gradients that are not contiguous must live until the launches are queued.
    gradients = Factors(*([None if g is None else g.contiguous() for g in tensors] for tensors in gradients))
    with device_of(like):
        table, aligned = addresses(weights, gradients)
        scores = sensitivity.new_empty(layout.total_rank)
        of_q, of_p = (sensitivity.new_empty(size) for size in importance.partials_size(layout, like.device))
        rate = sensitivity.new_ones(1) if rate is None else rate.to(torch.float32).reshape(1)
        importance.update(
            layout, to_device(table, like.device), like, sensitivity, uncertainty, scores, of_q, of_p,
            rate, beta1, beta2, aligned,
        )  # fmt: skip
        return scores
