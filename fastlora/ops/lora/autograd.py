"""The LoRA linear layer's place in autograd: what is saved, which gradients are computed, and its twin for
`torch.compile`.

Eager calls go through an `autograd.Function`, the cheapest way in; under `torch.compile` and `torch.export`, which
cannot look into the backends, the same two passes are the ops `fastlora::lora_linear` and
`fastlora::lora_linear_backward`, whose dispatch would cost an eager call more.

Saved for backward: x (for dA), S (for dB), the dropout state, and references to W0, A and B: no copy of x, no drop(x),
nothing of size N×K.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from ...runtime import env
from .. import call, reference
from ..call import are_plain, as_2d, as_shaped, backward_pass, low_rank_dtype
from . import aten, choice


class LoraLinearFunction(torch.autograd.Function):
    """y = x W0ᵀ + b + s·(drop(x) Aᵀ) Bᵀ for x (..., K), differentiable in x, W0, b, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float,
        module: ModuleType,
        narrow: bool,
        made: list[Tensor] | None = None,
    ) -> Tensor:
        x2 = as_2d(x)
        if made is None:
            y, s, state = module.forward(x2, weight, bias, lora_A, lora_B, scaling, dropout_p, None, narrow)
        else:
            y, s, state = made[0].addmm_(x2, weight.t()), made[1], None
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_a or need_w else None,
            weight if need_x else None,
            lora_A if need_x or need_a else None,
            lora_B if need_x or need_a or need_b else None,
            s if need_b else None,
            state if need_x or need_a else None,
        )
        ctx.arguments = (module, scaling, dropout_p, x.shape, narrow)
        return as_shaped(y, x)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, s, state = ctx.saved_tensors
        module, scaling, dropout_p, shape, narrow = ctx.arguments
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        if len(shape) != 2:
            x, dy = None if x is None else as_2d(x), as_2d(dy)
        dx, grad_a, grad_b = module.backward(
            dy, x, weight, lora_A, lora_B, s, state, scaling, dropout_p, (need_x, need_a, need_b), narrow
        )
        return (
            dx if dx is None or len(shape) == 2 else dx.view(shape),
            dy.t().mm(x) if need_w and x is not None else None,
            dy.sum(0) if need_bias else None,
            grad_a,
            grad_b,
            *[None] * 5,
        )


# Without torch's look at every argument for leftovers of torch.func, 4 µs: `takes_fused_path` has looked.
_apply = cast(Any, super(torch.autograd.Function, LoraLinearFunction)).apply


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    backend: str,
    narrow: bool = False,
) -> Tensor:
    """Runs the chosen backend under autograd. Arguments are checked already; dropout_p is 0 outside training; `narrow`:
    `call.low_rank_dtype`."""
    if torch.compiler.is_compiling():
        return _compiled_lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, backend, narrow)
    x2 = as_2d(x)
    chosen = choice.select(x2, weight, bias, lora_A, lora_B, dropout_p, backend, narrow)
    module = chosen.module
    if dropout_p == 0.0 and not narrow and (can_keep := getattr(module, "can_keep", None)) is not None and can_keep(x):
        _keep(x, weight, bias, lora_A, lora_B, scaling, backend, chosen)
    if module is aten and x.device.type == "cpu" and x.numel() < call.SMALL:
        # Without gradients too: reentrant checkpointing expects the same bits of both.
        return as_shaped(aten.composed(x2, weight, bias, lora_A, lora_B, scaling, dropout_p, narrow), x)
    if not torch.is_grad_enabled():
        return as_shaped(module.forward(x2, weight, bias, lora_A, lora_B, scaling, dropout_p, None, narrow)[0], x)
    if x.dim() != 2 and not x2._is_view():  # reshape had to copy x: once is enough
        x = x2.view(x.shape)
    return _apply(  # type: ignore[return-value]
        x, weight, bias, lora_A, lora_B, scaling, dropout_p, module, narrow, None
    )


def _keep(x, weight, bias, lora_A, lora_B, scaling: float, backend: str, chosen: Any) -> None:
    """Makes later calls of this kind known ones, where the choice is final and there is a plan: after the first."""
    if choice.is_final(chosen):
        module, asked = chosen.module, (env.backend_text() if backend == "auto" else backend, scaling)
        number = choice.known[asked][1] if asked in choice.known else module.new_number()
        if module.keep(x, weight, bias, lora_A, lora_B, scaling, number):
            choice.known[asked] = module, number


def known_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str
) -> Tensor | None:
    """y, without dropout, of a call of a kind (shapes, strides, dtypes, devices) that has been checked and chosen for,
    and whose plan one op runs; None of others. That op looks at all of it, so nothing else has to."""
    if torch.compiler.is_compiling() or not choice.known:
        return None
    found = choice.known.get((env.backend_text() if backend == "auto" else backend, scaling))
    if found is None or torch._C._is_any_autocast_enabled():
        return None
    if not are_plain(x, weight, bias, lora_A, lora_B) or x.is_nested:
        return None
    module, number = found
    made = module.kept(x, weight, bias, lora_A, lora_B, number)
    if not made:
        return None
    if torch.is_grad_enabled():
        return _apply(x, weight, bias, lora_A, lora_B, scaling, 0.0, module, False, made)  # type: ignore[return-value]
    return as_shaped(made[0].addmm_(as_2d(x), weight.t()), x)


class TermFunction(torch.autograd.Function):
    """base (M, N) + s·(x Aᵀ) Bᵀ for x (M, K)."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        dtype = low_rank_dtype(x, lora_A, lora_B, False)
        s = aten.shrink(x, lora_A.to(dtype))
        ctx.save_for_backward(x, lora_A, lora_B, s)
        ctx.scaling = scaling
        return aten.add_product(base.clone(), s, lora_B.to(dtype).t(), scaling)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, s = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        return dy, *aten.backward(dy, x, None, lora_A, lora_B, s, None, ctx.scaling, 0.0, needs), None


def add_term(base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """base (..., N) + s·(x Aᵀ) Bᵀ by ATen: the low-rank path in the widest dtype of x and the factors, rounded once."""
    if torch.compiler.is_compiling() or (x.device.type == "cpu" and x.numel() < call.SMALL):
        return (base + reference.low_rank_term(x, lora_A, lora_B, scaling)).to(base.dtype)
    y = TermFunction.apply(as_2d(base), as_2d(x), lora_A, lora_B, scaling)
    return as_shaped(y, x)  # type: ignore[arg-type]


# The torch.library twin. Randomness stays outside the ops, in the graph, where the compiler may move or repeat it: they
# are given the dropout state, a Philox seed for the hand-written kernels and a mask for ATen, and are functions of
# their arguments.
_library = torch.library.Library("fastlora", "FRAGMENT")


_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? dropout_state, "
    "float scaling, float dropout_p, str backend, bool narrow) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_library.define(
    "lora_linear_any_scale(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? dropout_state, "
    "Scalar scaling, float dropout_p, str backend, bool narrow) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? s, "
    "Tensor? dropout_state, float scaling, float dropout_p, bool[] needs, str backend, bool narrow) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _compiled_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    backend: str,
    narrow: bool,
) -> Tensor:
    x2 = x.reshape(-1, x.shape[-1])
    state = None
    if dropout_p > 0.0 and (x.device.type == "cpu" or backend == "torch"):
        state = aten.draw_keep_mask(x2, dropout_p)
    elif dropout_p > 0.0:
        state = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    y = torch.ops.fastlora.lora_linear_any_scale(
        x2, weight, bias, lora_A, lora_B, state, scaling, dropout_p, backend, narrow
    )
    return y.view(*x.shape[:-1], lora_B.shape[0])


def _op_any_scale(x, weight, bias, lora_A, lora_B, dropout_state, scaling, dropout_p, backend, narrow):
    """`lora_linear`'s y. A scale that has become a symbol (the compiler has seen it change) goes into B, r·N numbers:
    the compiler can keep a product's factor in a tensor, but makes any other op's argument a constant again, and would
    recompile for every value."""
    if isinstance(scaling, torch.SymFloat):
        lora_B, scaling = lora_B * scaling, 1.0
    y, _ = torch.ops.fastlora.lora_linear(
        x, weight, bias, lora_A, lora_B, dropout_state, scaling, dropout_p, backend, narrow
    )
    return y


def _op_forward(x, weight, bias, lora_A, lora_B, dropout_state, scaling, dropout_p, backend, narrow):
    module = choice.select(x, weight, bias, lora_A, lora_B, dropout_p, backend, narrow).module
    y, s, _ = module.forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, dropout_state, narrow)
    return y, s


def _op_forward_fake(x, weight, bias, lora_A, lora_B, dropout_state, scaling, dropout_p, backend, narrow):
    dtype = low_rank_dtype(x, lora_A, lora_B, narrow)
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0], dtype=dtype)


def _op_backward(dy, x, weight, lora_A, lora_B, s, dropout_state, scaling, dropout_p, needs, backend, narrow):
    module = choice.select(dy, weight, None, lora_A, lora_B, dropout_p, backend, narrow).module
    grads = module.backward(dy, x, weight, lora_A, lora_B, s, dropout_state, scaling, dropout_p, tuple(needs), narrow)
    # An op's outputs are not optional, and have the strides that the fake ones promise.
    return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _op_backward_fake(dy, x, weight, lora_A, lora_B, s, dropout_state, scaling, dropout_p, needs, backend, narrow):
    shapes = ((dy.shape[0], weight.shape[1]), lora_A.shape, lora_B.shape)
    dtypes = (dy.dtype, lora_A.dtype, lora_B.dtype)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else dy.new_empty(0)
        for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
    )


def _op_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, lora_A, lora_B, state, *arguments = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], state)
    ctx.arguments = arguments
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _op_autograd_backward(ctx: Any, dy: Tensor, _: Any):
    x, weight, lora_A, lora_B, s, state = ctx.saved_tensors
    scaling, dropout_p, backend, narrow = ctx.arguments
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    needs = [need_x, need_a, need_b]
    grads = torch.ops.fastlora.lora_linear_backward(
        dy, x, weight, lora_A, lora_B, s, state, scaling, dropout_p, needs, backend, narrow
    )
    dx, grad_a, grad_b = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    grad_w = dy.t().mm(x) if need_w else None
    return dx, grad_w, dy.sum(0) if need_bias else None, grad_a, grad_b, *[None] * 5


def _op_backward_twice(ctx: Any, *_: Any):
    raise RuntimeError(
        "fastlora: lora_linear is differentiable once, and a gradient of its gradient was asked for "
        "(create_graph=True); torch.func.grad within torch.func.grad takes the eager path, which has one"
    )


# Composite: traced through, so that what it decides is decided while compiling.
_library.impl("lora_linear_any_scale", _op_any_scale, "CompositeImplicitAutograd")


_library.impl("lora_linear", _op_forward, "CompositeExplicitAutograd")


_library.impl("lora_linear_backward", _op_backward, "CompositeExplicitAutograd")


torch.library.register_fake("fastlora::lora_linear", _op_forward_fake, lib=_library)


torch.library.register_fake("fastlora::lora_linear_backward", _op_backward_fake, lib=_library)


torch.library.register_autograd(
    "fastlora::lora_linear", _op_autograd_backward, setup_context=_op_setup_context, lib=_library
)


torch.library.register_autograd("fastlora::lora_linear_backward", _op_backward_twice, lib=_library)
