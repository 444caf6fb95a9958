"""DoRA's scaling of a LoRA layer's output in autograd, and its norms, which autograd takes for constants.

    y = (m/n) ∘ z + b       z = x W0ᵀ + s·S Bᵀ from the LoRA backends, n = ‖W0 + s·B A‖ by row
    dz = (m/n) ∘ dY         dm = Σ dY ∘ z / n        db = Σ dY

Saved beside what the LoRA layer saves: z (M, N), for dm. It could be had from y, which the next layer often keeps, but
not where m is zero, and not to its full precision where b is large.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autograd, dora_dispatch
from .autograd import _as_2d, _as_shaped, autocast_enabled, backward_pass
from .backends import dora_torch


class ScaleFunction(torch.autograd.Function):
    """y = (m/n) ∘ z + b for z (..., N), differentiable in z, m (N,) and b (N,) or None."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, module: ModuleType
    ) -> Tensor:
        z2 = _as_2d(z)
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, magnitude, norm)
        ctx.arguments = (module, None if bias is None else bias.dtype, z.shape)
        return _as_shaped(module.scale(z2, magnitude, norm, bias), z)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, magnitude, norm = ctx.saved_tensors
        module, bias_dtype, shape = ctx.arguments
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        dz, dm, db = module.scale_backward(_as_2d(dy), None if z is None else _as_2d(z), magnitude, norm, needs)
        return (
            None if dz is None else dz.view(shape),
            None if dm is None else dm.to(magnitude.dtype),
            None,
            None if db is None else db.to(bias_dtype),
            None,
        )


def scale(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, lora_A: Tensor, backend: str) -> Tensor:
    """y = (m/n) ∘ z + b for z (..., N), which nobody else uses; n is a constant."""
    if torch.compiler.is_compiling():  # the compiler fuses what is written out
        return dora_torch.composed_scale(z, magnitude, norm, bias)
    module = dora_dispatch.select(z, lora_A, backend)
    if module is dora_torch and z.device.type == "cpu" and z.numel() < autograd.SMALL:
        return dora_torch.composed_scale(z, magnitude, norm, bias)
    if torch.is_grad_enabled():
        return ScaleFunction.apply(z, magnitude, norm, bias, module)  # type: ignore[return-value]
    z2 = _as_2d(z)
    return _as_shaped(module.scale(z2, magnitude, norm, bias, in_place=not z.is_inference()), z)


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """‖W0 + s·B A‖ of every row (N,), without a gradient; in fp32, or fp64 for fp64."""
    weight, lora_A, lora_B = weight.detach(), lora_A.detach(), lora_B.detach()
    if torch.compiler.is_compiling():
        return torch.ops.fastlora.dora_weight_norm_any_scale(weight, lora_A, lora_B, scaling, backend)
    with torch.no_grad():
        return _weight_norm(weight, lora_A, lora_B, scaling, backend)


def _weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """The op too: under autocast a compiled graph may call it within autocast."""
    module = dora_dispatch.select(weight, lora_A, backend)
    if not autocast_enabled(weight):
        return module.weight_norm(weight, lora_A, lora_B, scaling)
    with torch.autocast(weight.device.type, enabled=False):
        return module.weight_norm(weight, lora_A, lora_B, scaling)


# The torch.library twin, as in autograd.py.

_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    "dora_weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "dora_weight_norm_any_scale(Tensor weight, Tensor lora_A, Tensor lora_B, Scalar scaling, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op_any_scale(weight, lora_A, lora_B, scaling, backend):
    """A scale that has become a symbol goes into B: the compiler would compile anew for every value of an argument."""
    if isinstance(scaling, torch.SymFloat):
        lora_B, scaling = lora_B * scaling, 1.0
    return torch.ops.fastlora.dora_weight_norm(weight, lora_A, lora_B, scaling, backend)


def _op_fake(weight, lora_A, lora_B, scaling, backend):
    wide = torch.float64 if torch.float64 in (weight.dtype, lora_A.dtype) else torch.float32
    return weight.new_empty(weight.shape[0], dtype=wide)


_library.impl("dora_weight_norm_any_scale", _op_any_scale, "CompositeImplicitAutograd")
_library.impl("dora_weight_norm", _weight_norm, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::dora_weight_norm", _op_fake, lib=_library)
