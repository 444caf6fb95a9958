"""`dora_linear`: a LoRA layer whose rows are scaled to a learnt length.

    y = (m/n) ∘ z + b       z = x W0ᵀ + s·S Bᵀ from the LoRA backends, n = ‖W0 + s·B A‖ by row, a constant
    dz = (m/n) ∘ dY         dm = Σ dY ∘ z / n        db = Σ dY

Saved besides what the LoRA layer saves: z (M, N), for dm. y would not do: not where m is zero, and not to full
precision where b is large. Triton kernels compute norms and scaling on a GPU once they have passed their first-use
check, ATen elsewhere. Factors wider than x read dY itself (`scale_and_add`): their low-rank path is ATen's everywhere.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import env
from ...runtime.trust import Trusted, first_difference, module_or_reason, seeded
from .. import call, reference
from ..call import Adapter, as_2d, as_shaped, autocast_enabled, backward_pass
from ..lora import autograd as lora_autograd
from ..lora.aten import draw_keep_mask, dropout_scale
from . import aten


class ScaleFunction(torch.autograd.Function):
    """y = (m/n) ∘ z + b for z (..., N), differentiable in z, m (N,) and b (N,) or None."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, module: ModuleType
    ) -> Tensor:
        z2 = as_2d(z)
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, magnitude, norm)
        ctx.arguments = (module, None if bias is None else bias.dtype, z.shape)
        return as_shaped(module.scale(z2, magnitude, norm, bias), z)

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, magnitude, norm = ctx.saved_tensors
        module, bias_dtype, shape = ctx.arguments
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        dz, dm, db = module.scale_backward(as_2d(dy), None if z is None else as_2d(z), magnitude, norm, needs)
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
        return aten.composed_scale(z, magnitude, norm, bias)
    module = select(z, lora_A, backend)
    if module is aten and z.device.type == "cpu" and z.numel() < call.SMALL:
        return aten.composed_scale(z, magnitude, norm, bias)
    if torch.is_grad_enabled():
        return ScaleFunction.apply(z, magnitude, norm, bias, module)  # type: ignore[return-value]
    z2 = as_2d(z)
    return as_shaped(module.scale(z2, magnitude, norm, bias, in_place=not z.is_inference()), z)


def reads_wide_factors(x: Tensor, lora_A: Tensor, lora_B: Tensor, narrow: bool) -> bool:
    """Whether the factors are wider than x: the low-rank path is then `scale_and_add`'s."""
    return call.low_rank_dtype(x, lora_A, lora_B, narrow) != x.dtype


def scale_and_add(
    frozen: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """y = (m/n) ∘ frozen + b + s·(x Aᵀ) ((m/n) ∘ B)ᵀ: factors wider than x meet dY itself, not (m/n) ∘ dY rounded to
    its dtype."""
    factor = (magnitude.to(norm.dtype) / aten.divisor(norm)).unsqueeze(1)
    y = scale(frozen, magnitude, norm, bias, lora_A, backend)
    return lora_autograd.add_term(y, x, lora_A, lora_B * factor, scaling)


def norm_as_constant(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """‖W0 + s·B A‖ of every row (N,), without a gradient; in fp32, or fp64 for fp64."""
    weight, lora_A, lora_B = weight.detach(), lora_A.detach(), lora_B.detach()
    if torch.compiler.is_compiling():
        return torch.ops.fastlora.dora_weight_norm_any_scale(weight, lora_A, lora_B, scaling, backend)
    with torch.no_grad():
        return _weight_norm(weight, lora_A, lora_B, scaling, backend)


def _weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """The op too: under autocast a compiled graph may call it within autocast."""
    module = select(weight, lora_A, backend)
    if not autocast_enabled(weight):
        return module.weight_norm(weight, lora_A, lora_B, scaling)
    with torch.autocast(weight.device.type, enabled=False):
        return module.weight_norm(weight, lora_A, lora_B, scaling)


# The torch.library twin, as in lora/autograd.py.
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
    """A scale that has become a symbol goes into B: the compiler would recompile for every value of an argument."""
    if isinstance(scaling, torch.SymFloat):
        lora_B, scaling = lora_B * scaling, 1.0
    return torch.ops.fastlora.dora_weight_norm(weight, lora_A, lora_B, scaling, backend)


def _op_fake(weight, lora_A, lora_B, scaling, backend):
    wide = torch.float64 if torch.float64 in (weight.dtype, lora_A.dtype) else torch.float32
    return weight.new_empty(weight.shape[0], dtype=wide)


_library.impl("dora_weight_norm_any_scale", _op_any_scale, "CompositeImplicitAutograd")


_library.impl("dora_weight_norm", _weight_norm, "CompositeExplicitAutograd")


torch.library.register_fake("fastlora::dora_weight_norm", _op_fake, lib=_library)


_trusted = Trusted("DoRA's kernels", "ATen runs instead")


def select(tensor: Tensor, lora_A: Tensor, backend: str = "auto") -> ModuleType:
    """What takes a weight (N, K), or z (M, N), with factors like lora_A."""
    asked = env.backend_text() if backend == "auto" else backend
    if not asked and not tensor.is_cuda:
        return aten
    requested = env.backend() if backend == "auto" else backend
    if requested == "torch" or (requested == "auto" and not tensor.is_cuda) or why_not(tensor, lora_A) is not None:
        return aten
    return importlib.import_module("fastlora.ops.dora.triton")


def why_not(tensor: Tensor, lora_A: Tensor) -> str | None:
    """None where the kernels take such tensors, or why ATen does."""
    module = module_or_reason("fastlora.ops.dora.triton")
    if isinstance(module, str):
        return f"cannot be imported: {module}"
    reason = module.unsupported(tensor, lora_A)
    if reason is not None or not tensor.is_cuda:
        return reason
    key = (tensor.device, tensor.dtype, lora_A.dtype)
    return _trusted.why_not(key, lambda: self_check(module, *key))


def self_check(module: Any, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
    """Compares norms, scaling and its gradients with fp64 on a small problem that divides nothing; None where they
    agree, else what differs. One row of the weight is nearly cancelled by its adapter, and one is zero."""
    with seeded(device), torch.no_grad():
        m, n, k, r, scaling = 203, 152, 136, 10, 0.75
        a, b = torch.randn(r, k, device=device).to(adapter_dtype), torch.randn(n, r, device=device).to(adapter_dtype)
        weight = torch.randn(n, k, device=device).to(dtype)
        weight[5], b[5] = 0.0, 0.0
        weight[3] = (-scaling * (b[3].float() @ a.float())).to(dtype) * 0.99
        z, dy = (torch.randn(m, n, device=device).to(dtype) for _ in range(2))
        magnitude, bias = torch.rand(n, device=device) + 0.5, torch.randn(n, device=device).to(dtype)
        norm = module.weight_norm(weight, a, b, scaling)
        norm64 = (weight.double() + scaling * (b.double() @ a.double())).norm(dim=1)
        norm64_or_inf = aten.divisor(norm64)
        factor = magnitude.double() / norm64_or_inf
        dz, dm, db = module.scale_backward(dy, z, magnitude, norm, (True, True, True))
        results = [
            ("the norm of a row that nearly cancels", norm[3], norm64[3]),
            ("the norm", norm, norm64),
            ("y", module.scale(z, magnitude, norm, bias), factor * z.double() + bias.double()),
            ("dz", dz, factor * dy.double()),
            ("dm", dm, (dy.double() * z.double()).sum(0) / norm64_or_inf),
            ("db", db, dy.double().sum(0)),
        ]
        return first_difference(results[:2], torch.float32) or first_difference(results[2:], dtype)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with DoRA, computed on the LoRA kernels: y = x W′ᵀ + b, W′ = m ∘ (W0 + s·B A)/‖W0 + s·B A‖.

    Equivalent to:

        norm = (weight + scaling * lora_B @ lora_A).detach().norm(dim=1)
        factor = magnitude / norm                # 0 for a row of zeros
        dropped = F.dropout(x, dropout_p, training)
        low_rank = scaling * F.linear(F.linear(dropped, lora_A), lora_B)
        y = F.linear(x, weight, bias) + (factor - 1) * F.linear(dropped, weight) + factor * low_rank

    Neither B A nor W0 + s·B A is ever formed: the norms come from one pass over W0, in float32. They are made again at
    every call. Dropout acts on W0's input too, as in the paper's code and in PEFT, which takes a second product by W0.

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, training, backend: as in `lora_linear`.
        magnitude: m (N,), of any float dtype.

    Returns:
        (..., N) in x's dtype (autocast's dtype under autocast). Differentiable once in x, weight, bias, lora_A, lora_B
        and magnitude, the norms taken for constants (section 4.3 of the paper).

    Raises:
        ValueError: as `lora_linear`; a magnitude that is not (N,) or lies on another device.

    Examples:
        >>> x, weight = torch.randn(4, 32, 64), torch.randn(128, 64)
        >>> lora_A, lora_B = torch.randn(8, 64), torch.zeros(128, 8)
        >>> dora_linear(x, weight, lora_A, lora_B, weight.norm(dim=1), scaling=2.0).shape
        torch.Size([4, 32, 128])

    Source: Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, equations 5 and 11.
    """
    call.check_probability(dropout_p, "dora_linear")
    adapter = Adapter(lora_A, lora_B, scaling, dropout_p if training else 0.0, magnitude)
    call.check_call(x, weight, adapter, bias, "dora_linear")
    return run(x, weight, adapter, bias, backend)


def run(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, backend: str, caller: str = "dora_linear"
) -> Tensor:
    """`dora_linear` of an adapter with a magnitude; all but the magnitude is checked."""
    lora_A, lora_B, scaling, dropout_p, magnitude, norm = adapter
    assert magnitude is not None
    _check_magnitude(weight, magnitude, caller)
    unrounded = weight
    narrow = call.autocast_enabled(x)
    if narrow:
        x, weight, bias = call.cast_for_autocast(x, weight, bias)
    call.check_one_dtype(x, weight, bias, caller)
    tensors = (x, weight, bias, lora_A, lora_B, magnitude)
    if weight.numel() == 0 or x.is_nested or not call.takes_fused_path(*tensors):
        return reference.dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias, dropout_p)
    if norm is None:
        norm = norm_as_constant(unrounded, lora_A, lora_B, scaling, backend)
    rest = None
    if reads_wide_factors(x, lora_A, lora_B, narrow):
        dropped = kept = x
        if dropout_p > 0.0:
            kept = x * draw_keep_mask(x, dropout_p)  # exact: what the low-rank path reads
            dropped, scaling = kept * dropout_scale(dropout_p), scaling * dropout_scale(dropout_p)
            rest = F.linear(x - dropped, weight)
        z = F.linear(dropped, weight)
        y = scale_and_add(z, kept, lora_A, lora_B, scaling, magnitude, norm, bias, backend)
        return y if rest is None else rest + y
    if dropout_p > 0.0:
        # W0 x + (m/n − 1) ∘ W0 drop(x) + (m/n) ∘ s·B A drop(x): what is dropped keeps the frozen layer's length.
        dropped = F.dropout(x, dropout_p)
        rest, x = F.linear(x - dropped, weight), dropped
    z = lora_autograd.lora_linear(x, weight, None, lora_A, lora_B, scaling, 0.0, backend, narrow)
    y = scale(z, magnitude, norm, bias, lora_A, backend)
    return y if rest is None else rest + y


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str = "auto") -> Tensor:
    """‖W0 + s·B A‖ of every row (N,) of weight (N, K), in float32 (float64 for float64), without a gradient."""
    if not call.takes_fused_path(weight, lora_A, lora_B) or weight.is_meta:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + scaling * (lora_B.to(wide) @ lora_A.to(wide))).detach().norm(dim=1)
    return norm_as_constant(weight, lora_A, lora_B, scaling, backend)


def _check_magnitude(weight: Tensor, magnitude: Tensor, caller: str) -> None:
    if magnitude.shape != weight.shape[:1] or magnitude.device != weight.device or not magnitude.is_floating_point():
        raise ValueError(
            f"{caller}: magnitude: got {tuple(magnitude.shape)} {magnitude.dtype} on {magnitude.device}, want "
            f"floating-point ({weight.shape[0]},) on {weight.device}, a length for every row of weight"
        )
