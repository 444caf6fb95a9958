"""The LoRA linear layer on a quantised base, in autograd: the frozen weight is there while a pass runs, and only then.

The same two passes as in ops/lora/autograd.py, by the same backends. Where they take W0, it is written into a buffer
that all layers share, and written again for the backward pass. Saved are x, S, the dropout state, references to A and
B, and the packed weight: nothing of size N×K. Where x comes in another dtype than the layer computes in (fp32 under
autocast), what is saved is its copy in that dtype, one for all the layers that are given the same x.

Without autocast an x that is wider than the layer computes in (fp32 activations, as `prepare_model_for_kbit_training`
leaves them, into 4-bit layers in bf16) is rounded for the frozen layer only, as in bitsandbytes and PEFT: the low-rank
path keeps x's dtype, in ATen, x itself is saved, and the two are added in that dtype.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import as_shaped, autocast_enabled, backward_pass
from ..dora import dora as dora_op
from ..lora import aten, choice
from .weights import QuantisedWeight, materialised, stream_of


class QuantLoraLinearFunction(torch.autograd.Function):
    """y = x W0ᵀ + b + s·(drop(x) Aᵀ) Bᵀ for x (..., K) of any dtype, computed in the weight's and returned in
    `out_dtype`; differentiable in x, b, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: QuantisedWeight,
        scaling: float,
        dropout_p: float,
        backend: str,
        out_dtype: torch.dtype,
        narrow: bool,
    ) -> Tensor:
        module, saved, y, s, state = _forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, backend, narrow)
        need_x, _, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            saved if need_a else None,
            lora_A if need_x or need_a else None,
            lora_B if need_x or need_a or need_b else None,
            s if need_b else None,
            state if need_x or need_a else None,
        )
        ctx.arguments = (
            module,
            weight if need_x else None,
            weight.dtype,
            (scaling, dropout_p),
            narrow,
            x.shape,
            x.dtype,
            saved.dtype != weight.dtype,
        )
        return as_shaped(y.to(out_dtype), x)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, s, state = ctx.saved_tensors
        module, weight, dtype, scales, narrow, shape, x_dtype, wider = ctx.arguments
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        x2 = x.reshape(-1, x.shape[-1]) if x is not None else None
        dy2 = dy.reshape(-1, dy.shape[-1]).to(torch.promote_types(dtype, x_dtype) if wider else dtype)
        needs = (need_x, need_a, need_b)
        if need_x and wider:
            grads = module.backward(dy2, x2, None, lora_A, lora_B, s, state, *scales, needs, narrow)
            with materialised(weight) as matrix:
                grads[0].add_(dy2.to(dtype).mm(matrix))
        elif need_x:
            with materialised(weight) as matrix:
                grads = module.backward(dy2, x2, matrix, lora_A, lora_B, s, state, *scales, needs, narrow)
        else:
            grads = module.backward(dy2, x2, None, lora_A, lora_B, s, state, *scales, needs, narrow)
        dx, grad_a, grad_b = grads
        grad_bias = dy2.sum(0) if need_bias else None
        dx = dx.view(shape).to(x_dtype) if dx is not None else None
        return dx, grad_bias, grad_a, grad_b, *[None] * 6


class QuantLinearFunction(torch.autograd.Function):
    """x W0ᵀ for x (..., K) of the weight's dtype, differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight) -> Tensor:
        ctx.weight = weight
        with materialised(weight) as matrix:
            return F.linear(x, matrix)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with materialised(ctx.weight) as matrix:
            return dy.matmul(matrix), None


def quantised_lora_linear(
    x: Tensor,
    weight: QuantisedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Runs the chosen backend under autograd, in `weight.dtype` (the bias's too) whatever autocast says."""
    narrow = autocast_enabled(x)
    with torch.autocast(x.device.type, enabled=False):
        if not torch.is_grad_enabled():
            y = _forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, backend, narrow)[2]
            return as_shaped(y.to(out_dtype), x)
        return QuantLoraLinearFunction.apply(  # type: ignore[return-value]
            x, bias, lora_A, lora_B, weight, scaling, dropout_p, backend, out_dtype, narrow
        )


def quantised_dora_linear(
    x: Tensor,
    weight: QuantisedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    backend: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = (m/n) ∘ (x W0ᵀ + s·(x Aᵀ) Bᵀ) + b with n = ‖W0 + s·B A‖ by row, as `quantised_lora_linear` runs it. The
    weight is written out once more, for the norms."""
    narrow = autocast_enabled(x)
    z, dtype = None, x.dtype if is_wider(x, weight, narrow) else weight.dtype
    if not dora_op.reads_wide_factors(x.to(dtype), lora_A, lora_B, narrow):
        z = quantised_lora_linear(x, weight, None, lora_A, lora_B, scaling, 0.0, backend, dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        with materialised(weight) as matrix:
            norm = dora_op.norm_as_constant(matrix, lora_A, lora_B, scaling, backend)
        if z is not None:
            return dora_op.scale(z, magnitude, norm, bias, lora_A, backend).to(out_dtype)
        x = x.to(weight.dtype)
        frozen: Any = QuantLinearFunction.apply(x, weight)
        return dora_op.scale_and_add(frozen, x, lora_A, lora_B, scaling, magnitude, norm, bias, backend).to(out_dtype)


def _forward(
    x: Tensor,
    weight: QuantisedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    backend: str,
    narrow: bool,
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor | None]:
    """(the backend's module, x as it multiplies A, y, S, dropout state). The layer itself is not differentiated by ATen
    on any path: what it would save of the matrix is the next layer's by then."""
    cast = cast_once(x, weight.dtype)
    x2 = cast.reshape(-1, x.shape[-1])
    with materialised(weight) as matrix:
        if is_wider(x, weight, narrow):
            frozen = F.linear(x2, matrix, bias).to(x.dtype)
        else:
            module = choice.select(x2, matrix, bias, lora_A, lora_B, dropout_p, backend, narrow).module
            return module, cast, *module.forward(x2, matrix, bias, lora_A, lora_B, scaling, dropout_p, None, narrow)
    x2 = x.reshape(-1, x.shape[-1])
    return aten, x, *aten.add_low_rank(frozen, x2, lora_A, lora_B, scaling, dropout_p, None, narrow)


def is_wider(x: Tensor, weight: QuantisedWeight, narrow: bool) -> bool:
    """Whether x has digits that the frozen layer's dtype does not have, and the low-rank path is to keep them."""
    return not narrow and torch.promote_types(x.dtype, weight.dtype) != weight.dtype


class _LastCast(threading.local):
    """The tensor that was cast last, and its copy: known by weak references, so that nothing lives longer for it."""

    source: weakref.ref[Tensor] | None = None
    copy: weakref.ref[Tensor] | None = None
    state: tuple = ()


_last = _LastCast()


def cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, not differentiable: the same copy as last time while that is alive and x is unchanged, as
    where q, k and v are called with one x."""
    if x.dtype == dtype:
        return x
    if x.is_inference():  # counts no versions
        return x.to(dtype)
    state = (x._version, dtype, stream_of(x.device))
    if _last.source is not None and _last.source() is x and _last.state == state:
        copy = _last.copy() if _last.copy is not None else None
        if copy is not None:
            return copy
    copy = x.detach().to(dtype)
    _last.source, _last.copy, _last.state = weakref.ref(x), weakref.ref(copy), state
    return copy
