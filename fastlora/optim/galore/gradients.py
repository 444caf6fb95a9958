"""How the gradients of projected weights reach `GaLoreAdamW` during a backward pass, so that none of them stays.

`hook` takes p.grad the moment that autograd has finished it, and frees it: one layer's gradient exists at a time.
`factored` takes a linear layer's input X and its output's gradient dY, from which every product with G = dYᵀX comes
without G. The weight is frozen for autograd meanwhile, which therefore computes no dW.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...introspect import taps, targets
from ...linalg import native
from ...linalg.operators import Factored, LinearOperator, Rows

Observe = Callable[[Tensor, LinearOperator], None]
Undo = Callable[[], None]
_taken: set[int] = set()  # weights whose gradients some optimiser takes: another one would never see them


class Factors(Factored):
    """G = dYᵀX, multiplied by the compiled ops where they run."""

    def matmul(self, v: Tensor) -> Tensor:
        return native.factored_product(self.x, self.dy, v, 1.0)

    def rmatmul(self, u: Tensor) -> Tensor:
        return native.factored_product(self.dy, self.x, u, 1.0)


def without_autocast(tensors: Iterable[Tensor]) -> contextlib.ExitStack:
    """Under autocast products of float32 tensors, and the states made of them, would be in bfloat16."""
    stack = contextlib.ExitStack()
    for kind in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def is_free(weight: Tensor) -> bool:
    """Whether no optimiser takes its gradients."""
    return id(weight) not in _taken


def check_free(weights: Collection[Tensor]) -> None:
    """Raises ValueError where another optimiser takes one of these weights' gradients."""
    for weight in weights:
        if not is_free(weight):
            raise ValueError(
                f"GaLoreAdamW: params: another GaLoreAdamW takes the gradients of a weight {tuple(weight.shape)} in "
                "the backward pass; want it to release() them first"
            )


def taken_twice(weight: Tensor, gradients: str) -> ValueError:
    """The error of a weight whose gradient both the backward pass and autograd gave."""
    return ValueError(
        f"GaLoreAdamW.step: params: the gradient of a weight {tuple(weight.shape)} was taken in the backward pass "
        f"(gradients={gradients!r}) and is in p.grad as well: want weights that nobody unfreezes and that "
        "DistributedDataParallel does not reduce (reduce_across_ranks before it wraps the model)"
    )


def check_dense(gradients: Iterable[Tensor | None]) -> None:
    """Raises ValueError where one is sparse."""
    if any(gradient is not None and gradient.is_sparse for gradient in gradients):
        raise ValueError("GaLoreAdamW.step: params: got a sparse gradient, want dense ones (Embedding(sparse=False))")


def check_unscaled(said: dict[str, Any], gradients: str, reduced: bool) -> None:
    """Raises ValueError where a GradScaler left something for `step`: it asks each process by itself whether p.grad,
    as far as there is any, overflowed. What it left is taken away, since it does not do so after an error."""
    if any([said.pop(name, None) is not None for name in ("grad_scale", "found_inf")]):
        summed = " and reduce_across_ranks" if reduced else ""
        raise ValueError(
            f"GaLoreAdamW.step: got gradients that a GradScaler scaled, with gradients={gradients!r}{summed}; want "
            "gradients='plain' without reduce_across_ranks, or bfloat16, which needs no scaler"
        )


def hook(weights: Collection[Tensor], observe: Observe) -> Undo:
    """`observe(weight, G)` once a backward pass for each weight that it reaches, tied ones too."""

    def take(weight: Tensor) -> None:
        if weight.grad is not None:
            observe(weight, Rows(weight.grad))
            weight.grad = None

    seen = [weight for weight in weights if weight.requires_grad]
    handles = [weight.register_post_accumulate_grad_hook(take) for weight in seen]
    _taken.update(map(id, seen))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        _taken.difference_update(map(id, seen))

    return undo


def factored(
    model: nn.Module, weights: Collection[Tensor], idle: Collection[Tensor], observe: Observe
) -> tuple[Undo, list[Tensor]]:
    """`observe(weight, dYᵀX)` for each call of each layer in a backward pass, but of the weights that are `idle` then.

    Returns what undoes it, and the weights that are seen so. The others (frozen ones; tied to an embedding; of a layer
    that computes something of its own or whose weight is read from outside; with hooks on their gradients) are left as
    they are. Raises ValueError where the model has none of them.
    """
    layers: dict[str, nn.Module] = {}
    owners: dict[Tensor, list[str | None]] = {weight: [] for weight in weights if weight.requires_grad}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in owners:
                owners[parameter].append(name if key == "weight" and _shows_gradient(module, parameter) else None)
                layers[name] = module
    if owners and not any(owners.values()):
        raise ValueError(
            f"GaLoreAdamW: model: none of the {len(owners)} projected weights is in this {type(model).__name__}, want "
            "the model that they are trained in"
        )
    seen = [weight for weight, names in owners.items() if names and None not in names]
    tapped = {name: layers[name] for weight in seen for name in owners[weight] if name is not None}

    def look(name: str, x: Tensor, dy: Tensor, _: taps.Pass) -> None:
        layer = tapped[name]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if weight in idle:
            return
        with torch.no_grad():
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            observe(weight, Factors(dy, x) if targets.is_conv1d(layer) else Factors(x, dy))

    detach = taps.attach(model, tapped, look)
    for weight in seen:
        weight.requires_grad_(False)
    _taken.update(map(id, seen))

    def undo() -> None:
        detach()
        for weight in seen:
            weight.requires_grad_(weight not in idle)
        _taken.difference_update(map(id, seen))

    return undo, seen


def _shows_gradient(module: nn.Module, weight: Tensor) -> bool:
    """Whether dYᵀX is what p.grad would be."""
    linear = type(module) is nn.Linear or targets.is_conv1d(module)
    return linear and "forward" not in module.__dict__ and not weight._backward_hooks
