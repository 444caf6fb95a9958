"""What every op shares: the adapter's tuple, shapes, autocast, and the checks, which name the function that was called.

One interface (docs/architecture.md), three implementations: `torch`, `cublas`, `triton`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # one may outlive its transform
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

SMALL = 1 << 17  # elements of x; below, on a CPU, ATen's own autograd is faster (54 against 66 µs at 8×64)


def backward_pass(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `gradients(ctx, *grads)` the backward pass of an `autograd.Function`: it runs outside autocast, under which
    ATen would cast some operands and not others, and its gradients cannot be differentiated again.

    Torch's own decorator for the latter costs every call 2 µs: it is asked only where a graph of the gradients is made.
    """
    once = once_differentiable(gradients)

    @functools.wraps(gradients)
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        run = once if torch.is_grad_enabled() else gradients
        if torch._C._is_any_autocast_enabled():
            for grad in grads:
                if grad is not None and autocast_enabled(grad):
                    with torch.autocast(grad.device.type, enabled=False):
                        return run(ctx, *grads)
        return run(ctx, *grads)

    return backward


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device (the meta device knows none, and raises when asked)."""
    return torch._C._is_any_autocast_enabled() and not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Outside autocast for as long as it lasts, if autocast is on for the tensor's device."""
    if not autocast_enabled(tensor):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def low_rank_dtype(x: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, narrow: bool) -> torch.dtype:
    """The dtype of the low-rank path, S and dS: the widest of x's and the adapters', or x's where they are to be cast
    to it (`narrow`: under autocast, which does the same to eager PyTorch's)."""
    dtype = x.dtype
    if not narrow:
        for factor in (lora_A, lora_B):
            if factor is not None and factor.dtype != dtype:
                dtype = torch.promote_types(dtype, factor.dtype)
    return dtype


def as_2d(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def as_shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) as (..., N). Without gradients (a Function's forward too) not as a view: autograd lets nobody write into
    one later, and `ReLU(inplace=True)` does."""
    if x.dim() == 2:
        return y
    shape = (*x.shape[:-1], y.shape[-1])
    return y.view(shape) if torch.is_grad_enabled() else torch.ops.aten._unsafe_view(y, shape)


PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Adapter(NamedTuple):
    """One low-rank term s·(drop(x) Aᵀ) Bᵀ: lora_A (r, K), lora_B (N, r), the scale s and the dropout probability in
    force (0 in eval mode).

    With a magnitude (N,) it is DoRA's, and not only a term: see `dora_linear`. `norm` (N,): the norms of the rows of
    W0 + s·B A where they are known already.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0
    magnitude: Tensor | None = None
    norm: Tensor | None = None


class GroupLayer(NamedTuple):
    """One layer of `lora_group`: weight (N, K), its adapters (any number), bias (N,) or None."""

    weight: Tensor
    adapters: Sequence[Adapter]
    bias: Tensor | None = None


def as_one_adapter(adapters: Sequence[Adapter]) -> Adapter | None:
    """A layer's adapters as a single one, where its term is one product: not without adapters, nor where one of several
    drops something, nor with a magnitude."""
    if len(adapters) == 1:
        return adapters[0] if adapters[0].magnitude is None else None
    if not adapters or any(adapter.dropout_p > 0.0 for adapter in adapters):
        return None
    if any(adapter.magnitude is not None for adapter in adapters):
        return None
    return concatenate(adapters)


def check_one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, caller: str = "lora_linear") -> None:
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        got = f"x {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ValueError(f"{caller}: x, weight and bias: got {got}, want one dtype (adapters may have another)")


def takes_fused_path(*tensors: Tensor | None) -> bool:
    """False for what sees into operations: tensor subclasses (DTensor, quantised weights), torch.func transforms,
    torch.jit.trace."""
    if torch.compiler.is_compiling():
        return not torch._C._are_functorch_transforms_active()
    return are_plain(*tensors)


def are_plain(*tensors: Tensor | None) -> bool:
    """`takes_fused_path` where nothing is compiled."""
    for tensor in tensors:  # a loop: a generator costs every call half a microsecond
        kind = type(tensor)
        if kind is Parameter or tensor is None:  # what a transform wraps is no parameter
            continue
        if kind is not Tensor or is_functorch_wrapped_tensor(tensor):
            return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._is_tracing())


def cast_for_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to F.linear's arguments: floats, but not doubles, go to its dtype. Adapters are cast further
    down, in their kernels."""
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in (x, weight, bias)
    ]
    return cast[0], cast[1], cast[2]  # type: ignore[return-value]


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """Several adapters without dropout as one of rank Σ rᵢ; scales that differ go into B."""
    if len(adapters) == 1:
        return adapters[0]
    scaling = adapters[0].scaling
    lora_A = torch.cat([adapter.lora_A for adapter in adapters])
    if all(adapter.scaling == scaling for adapter in adapters):
        return Adapter(lora_A, torch.cat([adapter.lora_B for adapter in adapters], dim=1), scaling)
    return Adapter(lora_A, torch.cat([adapter.lora_B * adapter.scaling for adapter in adapters], dim=1), 1.0)


def check_probability(dropout_p: float, caller: str = "lora_linear") -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{caller}: dropout_p: got {dropout_p}, want a probability in [0, 1]")


def check_call(x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, caller: str = "lora_linear") -> None:
    """Raises ValueError for what no backend could mean, in the name of the function that was called; cheap enough for
    every call (about 2 µs)."""
    lora_A, lora_B = adapter.lora_A, adapter.lora_B
    check_probability(adapter.dropout_p, caller)
    if x.dim() < 1 or weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            f"{caller}: dimensions: got x {x.dim()}-D, weight {weight.dim()}-D, lora_A {lora_A.dim()}-D, "
            f"lora_B {lora_B.dim()}-D, want x at least 1-D and the others 2-D"
        )
    n, k = weight.shape
    r = lora_A.shape[0]
    if x.size(-1) != k or lora_A.shape[1] != k or lora_B.shape[0] != n or lora_B.shape[1] != r or r < 1:
        raise ValueError(
            f"{caller}: shapes: got x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_A {tuple(lora_A.shape)}, "
            f"lora_B {tuple(lora_B.shape)}, want x (..., K), weight (N, K), lora_A (r, K), lora_B (N, r) with r >= 1"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        raise ValueError(
            f"{caller}: bias: got shape {tuple(bias.shape)}, want ({n},) to match weight {tuple(weight.shape)}"
        )
    device = x.device
    if (
        weight.device != device
        or lora_A.device != device
        or lora_B.device != device
        or (bias is not None and bias.device != device)
    ):
        raise ValueError(
            f"{caller}: devices: got x on {device}, weight on {weight.device}, lora_A on {lora_A.device}, "
            f"lora_B on {lora_B.device}{'' if bias is None else f', bias on {bias.device}'}, want all on one: move the "
            "model, adapters included, with model.to(device)"
        )
    if not (x.is_floating_point() and lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise ValueError(
            f"{caller}: dtypes: got x {x.dtype}, lora_A {lora_A.dtype}, lora_B {lora_B.dtype}, "
            "want floating-point tensors"
        )
