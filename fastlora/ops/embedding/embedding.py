"""An embedding with LoRA: y = W0[ids] + s·Aᵀ[ids] Bᵀ, whose dA is made from the rows of the batch alone.

Eager PyTorch looks Aᵀ up in a strided view and makes dAᵀ (V, r), which is then copied into A's layout, and two or three
temporaries of y's size. Here the columns of A that the ids name are S, their product goes into y, and dS is added into
dA's columns in the order of the ids: the same bits on every run. In ATen, as two ops that `torch.compile` takes too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..call import as_2d, autocast_enabled, low_rank_dtype, takes_fused_path, without_autocast
from ..lora.aten import add_product, ds_and_db

_IDS = (torch.int32, torch.int64)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_embedding_A: Tensor,
    lora_embedding_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """An embedding with a low-rank adapter: y = W0[ids] + s·Aᵀ[ids] Bᵀ.

    Equivalent to:

        rows = F.embedding(ids, lora_embedding_A.t(), padding_idx, scale_grad_by_freq=scale_grad_by_freq)
        y = F.embedding(ids, weight, padding_idx) + scaling * F.linear(rows, lora_embedding_B)

    Args:
        ids: int64 or int32, of any shape, from 0 to V - 1.
        weight: (V, D), any float dtype. lora_embedding_A: (r, V). lora_embedding_B: (D, r). With float32 adapters on
            half-precision weights S and every gradient of the low-rank path are float32.
        scaling: s, a run-time number: alpha/r, or alpha/√r with rsLoRA.
        padding_idx: the id whose row of weight and column of A get no gradient; from the end where it is negative.
        scale_grad_by_freq: an id's gradient over how often the batch has it.

    Returns:
        (*ids.shape, D) in weight's dtype. Differentiable once in weight, A and B; A's gradient is dense.

    Raises:
        ValueError: ids of another dtype or, on a CPU, out of range; shapes, dtypes, devices that do not fit together.

    Examples:
        >>> ids, weight = torch.tensor([[1, 4], [4, 0]]), torch.randn(6, 16)
        >>> lora_embedding(ids, weight, torch.zeros(2, 6), torch.randn(16, 2), scaling=2.0).shape
        torch.Size([2, 2, 16])
    """
    caller = "lora_embedding"
    check(ids, weight, lora_embedding_A, lora_embedding_B, padding_idx, caller)
    y = F.embedding(ids, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return add_rows(y, ids, lora_embedding_A, lora_embedding_B, scaling, padding_idx, scale_grad_by_freq)


def check(ids: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, padding_idx: int | None, caller: str) -> None:
    """Raises ValueError, in the name of the function that was called, for what the op cannot mean."""
    if not isinstance(ids, Tensor) or ids.dtype not in _IDS:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{caller}: ids: got {got}, want an int64 or int32 tensor")
    shapes = [tuple(tensor.shape) for tensor in (weight, lora_A, lora_B)]
    if any(len(shape) != 2 for shape in shapes) or shapes[1:] != [
        (shapes[1][0], shapes[0][0]),
        (shapes[0][1], shapes[1][0]),
    ]:
        raise ValueError(
            f"{caller}: shapes: got weight {shapes[0]}, A {shapes[1]}, B {shapes[2]}, want weight (V, D), A (r, V) and "
            "B (D, r); where the vocabulary was resized, resize it before patch"
        )
    devices = [tensor.device for tensor in (ids, weight, lora_A, lora_B)]
    if any(device != devices[0] for device in devices):
        raise ValueError(
            f"{caller}: devices: got ids on {devices[0]}, weight on {devices[1]}, A on {devices[2]}, B on "
            f"{devices[3]}, want all on one: move the model, adapters included, with model.to(device)"
        )
    dtypes = [tensor.dtype for tensor in (weight, lora_A, lora_B)]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"{caller}: dtypes: got weight {dtypes[0]}, A {dtypes[1]}, B {dtypes[2]}, want floating-point tensors"
        )
    size = shapes[0][0]
    if padding_idx is not None and not -size <= padding_idx < size:
        raise ValueError(f"{caller}: padding_idx: got {padding_idx}, want from {-size} to {size - 1}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling() and takes_fused_path(ids):
        least, most = (int(end) for end in ids.aminmax())  # a GPU would have to be waited for
        if least < 0 or most >= size:
            raise ValueError(f"{caller}: ids: got {least} to {most}, want from 0 to {size - 1}")


def add_rows(
    y: Tensor,
    ids: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Tensor:
    """y (*ids.shape, D) + s·Aᵀ[ids] Bᵀ, rounded once. Arguments are checked already."""
    if not takes_fused_path(y, ids, lora_A, lora_B):
        return reference.embedding_term(y, ids, lora_A, lora_B, scaling, padding_idx, scale_grad_by_freq)
    narrow = autocast_enabled(y)
    dtype = torch.get_autocast_dtype(y.device.type) if narrow else low_rank_dtype(y, lora_A, lora_B, False)
    padding = -1 if padding_idx is None else padding_idx % lora_A.shape[1]
    with without_autocast(y):
        return torch.ops.fastlora.lora_embedding(y, ids, lora_A, lora_B, scaling, padding, scale_grad_by_freq, dtype)[0]


# The ops: y (..., D), ids (...), A (r, V), B (D, r); S and dS (M, r) in `dtype`. Shaped inside: what leaves is no view.
_library = torch.library.Library("fastlora", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "lora_embedding(Tensor y, Tensor ids, Tensor lora_A, Tensor lora_B, float scaling, int padding, bool by_frequency, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "lora_embedding_backward(Tensor dy, Tensor ids, Tensor lora_A, Tensor lora_B, Tensor s, float scaling, "
    "int padding, bool by_frequency, bool[] needs) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _forward(y, ids, lora_A, lora_B, scaling, padding, by_frequency, dtype):
    s = lora_A.index_select(1, ids.reshape(-1)).t().to(dtype)
    rows, right = as_2d(y), lora_B.to(dtype).t()
    if y.dtype == dtype:
        out = torch.addmm(rows, s, right, alpha=scaling)
    elif torch.promote_types(y.dtype, dtype) == y.dtype:  # autocast multiplies in less than y has
        out = torch.add(rows, s.mm(right), alpha=scaling)
    else:
        out = add_product(rows.clone(), s, right, scaling)
    return torch.ops.aten._unsafe_view(out, y.shape), s


def _backward(dy, ids, lora_A, lora_B, s, scaling, padding, by_frequency, needs):
    ds, grad_b = ds_and_db(as_2d(dy), lora_B, s, s.dtype, scaling, scaling, tuple(needs))
    grad_a = None
    if ds is not None:
        wide = torch.promote_types(torch.promote_types(s.dtype, lora_A.dtype), torch.float32)
        grad_a = column_grad(ds.to(wide), ids.reshape(-1), lora_A.shape[1], padding, by_frequency).to(lora_A.dtype)
    return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in (grad_a, grad_b))


def column_grad(ds: Tensor, ids: Tensor, size: int, padding: int, by_frequency: bool) -> Tensor:
    """dA (r, V): the rows of dS (M, r) added into the columns that the ids name, in a fixed order."""
    if ds.device.type != "cpu":  # index_add_ adds atomically there, in any order; this sorts
        return torch.ops.aten.embedding_dense_backward(ds, ids, size, padding, by_frequency).t()
    if padding >= 0:
        ds = ds.masked_fill((ids == padding).unsqueeze(1), 0)
    if by_frequency:
        ds = ds / torch.bincount(ids, minlength=size)[ids].unsqueeze(1)
    return ds.new_zeros(ds.shape[1], size).index_add_(1, ids, ds.t())


def _forward_fake(y, ids, lora_A, lora_B, scaling, padding, by_frequency, dtype):
    r = lora_A.shape[0]
    return torch.empty_like(y, memory_format=torch.contiguous_format), y.new_empty((r, ids.numel()), dtype=dtype).t()


def _backward_fake(dy, ids, lora_A, lora_B, s, scaling, padding, by_frequency, needs):
    return tuple(
        factor.new_empty(factor.shape) if need else dy.new_empty(0)
        for need, factor in zip(needs, (lora_A, lora_B), strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, ids, lora_A, lora_B, *ctx.arguments, _ = inputs
    ctx.save_for_backward(ids, lora_A, lora_B, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dy: Tensor | None, _: Any):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastlora: lora_embedding is differentiable once, and a gradient of its gradient was asked for"
        )
    needs = list(ctx.needs_input_grad[2:4])
    if dy is None or not any(needs):
        return dy, *[None] * 7
    with without_autocast(dy):
        made = torch.ops.fastlora.lora_embedding_backward(dy, *ctx.saved_tensors, *ctx.arguments, needs)
    return dy, None, *(grad if need else None for grad, need in zip(made, needs, strict=True)), *[None] * 4


for _name, _run, _fake in (
    ("lora_embedding", _forward, _forward_fake),
    ("lora_embedding_backward", _backward, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "fastlora::lora_embedding", _autograd_backward, setup_context=_setup_context, lib=_library
)
