"""cuBLAS for the frozen layer, Triton for the low-rank path.

    forward     S = drop(x) Aᵀ · y = s·S Bᵀ + b, then y.addmm_(x, W0ᵀ)
    backward    dS = s·dY B and dB = s·dYᵀ S in one pass over dY · dA = dSᵀ drop(x)
                dX = drop′(dS A), then dX.addmm_(dY, W0)

The low-rank term is written first and cuBLAS adds the frozen layer onto it (beta = 1), which reads the output once;
adding it afterwards would read and write it once more. The price is that the term is rounded to the dtype of y before
it is added: half a unit in the last place of a term that is usually the smaller one. Eager PyTorch rounds that term,
its scaled copy and the frozen layer's output before it rounds the sum (docs/kernels/skinny.md has the numbers).

What is kept for dropout is a seed: the kernels make the mask again wherever it is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.dropout import new_seed
from ...kernels.expand import expand
from ...kernels.grads import ds_and_db, ds_and_db_workspace, weight_grad, weight_grad_workspace
from ...kernels.launch import (
    DTYPES,
    INTERPRETED,
    MAX_RANK,
    has_native,
    new,
    new_number,
    new_workspace,
    planned,
    run_kept,
)
from ...kernels.shrink import shrink, shrink_workspace
from ..call import as_2d, low_rank_dtype

__all__ = ["backward", "can_keep", "forward", "keep", "kept", "new_number", "unsupported"]


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> str | None:
    """None, or why the Triton kernels cannot take the call."""
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return f"needs tensors on a CUDA device, got {x.device}"
    tensors = [x, weight, lora_A, lora_B] if bias is None else [x, weight, lora_A, lora_B, bias]
    if any(tensor.device != x.device for tensor in tensors):
        return f"needs all tensors on one device, got {', '.join(str(tensor.device) for tensor in tensors)}"
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        return f"needs bfloat16, float16 or float32, got {', '.join(str(tensor.dtype) for tensor in tensors)}"
    if weight.dtype != x.dtype:
        return f"needs x and weight of one dtype, got {x.dtype} and {weight.dtype}"
    rank = lora_A.shape[0]
    if not 1 <= rank <= MAX_RANK:
        return f"needs a rank from 1 to {MAX_RANK}, got {rank}"
    if 0 in weight.shape:
        return f"needs at least one feature in and out, got weight of shape {tuple(weight.shape)}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    dropout_state: Tensor | None = None,
    narrow: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, S, seed): y = x W0ᵀ + b + s·S Bᵀ with S = drop(x) Aᵀ; a `dropout_state` given replays that seed's mask.

    Shapes: docs/architecture.md, "The backend interface".
    """
    if dropout_p > 0.0 and dropout_state is None:
        dropout_state = new_seed(x.device)
    seed, dtype = dropout_state if dropout_p > 0.0 else None, low_rank_dtype(x, lora_A, lora_B, narrow)
    y, s = _low_rank_output(x, lora_A, lora_B, bias, seed, scaling, dropout_p, dtype)
    return y.addmm_(x, weight.t()), s, dropout_state


def can_keep(x: Tensor) -> bool:
    """Whether `keep` may keep a call with x: not in fp32, whose products can change from call to call."""
    return has_native() and x.dtype is not torch.float32 and x.is_contiguous()


def keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, number: int
) -> bool:
    """Whether `kept(x, …, number)` gives S and the low-rank term of calls of this kind from now on: x (..., K) as in
    `can_keep`, no autocast, no dropout."""
    args = (as_2d(x), lora_A, lora_B, bias, None, scaling, 0.0, low_rank_dtype(x, lora_A, lora_B, False))
    return _low_rank_output.keep_as(number, (x, lora_A, lora_B, bias, weight), args)


def kept(x, weight, bias, lora_A, lora_B, number: int) -> list[Tensor] | None:
    """[y without the frozen layer, S], or nothing where the call is of no kind that was kept."""
    return run_kept(number, (x, lora_A, lora_B, bias, weight))


@planned
def _low_rank_output(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y, S): S = drop(x) Aᵀ and y = s·S Bᵀ + b, onto which the frozen layer is added."""
    s = new(x, x.shape[0], lora_A.shape[0], dtype=dtype)
    shrink(x, lora_A, s, new_workspace(x, shrink_workspace(x, lora_A)), seed=seed, dropout_p=dropout_p)
    y = new(x, x.shape[0], lora_B.shape[0])
    expand(s, lora_B, y, alpha=scaling, bias=bias)
    return y, s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    dropout_state: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
    narrow: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB), None where `needs` (x, lora_A, lora_B) is False."""
    seed = dropout_state if dropout_p > 0.0 else None
    dx, grad_a, grad_b = _low_rank_backward(dy, x, lora_A, lora_B, s, seed, scaling, dropout_p, needs, narrow)
    if dx is not None:
        assert weight is not None
        dx.addmm_(dy, weight)
    return dx, grad_a, grad_b


@planned
def _low_rank_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
    narrow: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(drop′(dS A), dA, dB): onto the first the frozen layer's part of dX is added."""
    ds, grad_a, grad_b = low_rank_gradients(dy, x, lora_A, lora_B, s, seed, scaling, dropout_p, needs, narrow)
    if not needs[0]:
        return None, grad_a, grad_b
    assert ds is not None
    assert lora_A is not None
    dx = new(dy, dy.shape[0], lora_A.shape[1])
    expand(ds, lora_A.t(), dx, seed=seed, dropout_p=dropout_p)
    return dx, grad_a, grad_b


@planned
def low_rank_gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
    narrow: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dS, dA, dB): dS where dX or dA needs it, dA and dB where they are needed. Without a seed nothing is dropped."""
    needs_x, needs_a, needs_b = needs
    needs_ds = needs_x or needs_a
    ds = grad_a = grad_b = None
    if needs_ds or needs_b:
        assert lora_B is not None
        rank = lora_B.shape[1]
        dtype = low_rank_dtype(dy, lora_A, lora_B, narrow) if s is None else s.dtype
        ds = new(dy, dy.shape[0], rank, dtype=dtype) if needs_ds else None
        grad_b = new(lora_B, *lora_B.shape) if needs_b else None
        workspace = new_workspace(dy, ds_and_db_workspace(dy, lora_B, needs_ds=needs_ds, needs_db=needs_b))
        ds_and_db(dy, lora_B, s, ds, grad_b, workspace, scaling=scaling)
    if needs_a:
        assert x is not None
        assert lora_A is not None
        assert ds is not None
        grad_a = new(lora_A, *lora_A.shape)
        workspace = new_workspace(x, weight_grad_workspace(x, lora_A.shape[0]))
        weight_grad(x, ds, grad_a.t(), workspace, seed=seed, dropout_p=dropout_p)
    return ds, grad_a, grad_b
