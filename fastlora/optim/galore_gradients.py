"""How the gradients of projected weights reach `GaLoreAdamW` during a backward pass, so that none of them stays.

`hook` takes p.grad the moment that autograd has finished it, and frees it: one layer's gradient exists at a time.
`factored` takes a linear layer's input X and its output's gradient dY, from which every product with G = dYᵀX comes
without G. The weight is frozen for autograd meanwhile, which therefore computes no dW.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from .. import targets
from ..init import taps
from ..linalg import native
from ..linalg.operators import Factored, LinearOperator, Rows

Observe = Callable[[Tensor, LinearOperator], None]
Undo = Callable[[], None]
_taken: set[int] = set()  # weights whose gradients some optimiser takes: another one would never see them


class Factors(Factored):
    """G = dYᵀX, multiplied by the compiled ops where they run."""

    def matmul(self, v: Tensor) -> Tensor:
        return native.factored_product(self.x, self.dy, v, 1.0)

    def rmatmul(self, u: Tensor) -> Tensor:
        return native.factored_product(self.dy, self.x, u, 1.0)


def check_free(weights: Collection[Tensor]) -> None:
    """Raises ValueError where another optimiser takes one of these weights' gradients."""
    for weight in weights:
        if id(weight) in _taken:
            raise ValueError(
                f"GaLoreAdamW: params: another GaLoreAdamW takes the gradients of a weight {tuple(weight.shape)} in "
                "the backward pass; want it to release() them first"
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


def factored(model: nn.Module, weights: Collection[Tensor], observe: Observe) -> tuple[Undo, list[Tensor]]:
    """`observe(weight, dYᵀX)` for each call of each layer in a backward pass.

    Returns what undoes it, and the weights that are seen so. The others (frozen ones; tied to an embedding; of a layer
    that computes something of its own or whose weight is read from outside) are left as they are.
    """
    layers: dict[str, nn.Module] = {}
    owners: dict[Tensor, list[str | None]] = {weight: [] for weight in weights if weight.requires_grad}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in owners:
                tappable = key == "weight" and (type(module) is nn.Linear or targets.is_conv1d(module))
                owners[parameter].append(name if tappable else None)
                layers[name] = module
    seen = [weight for weight, names in owners.items() if names and None not in names]
    tapped = {name: layers[name] for weight in seen for name in owners[weight] if name is not None}

    def look(name: str, x: Tensor, dy: Tensor, _: float) -> None:
        layer = tapped[name]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            weight: Tensor = layer.weight  # type: ignore[assignment]
            observe(weight, Factors(dy, x) if targets.is_conv1d(layer) else Factors(x, dy))

    detach = taps.attach(model, tapped, lambda args, kwargs: 1.0, look)
    for weight in seen:
        weight.requires_grad_(False)
    _taken.update(map(id, seen))

    def undo() -> None:
        detach()
        for weight in seen:
            weight.requires_grad_(True)
        _taken.difference_update(map(id, seen))

    return undo, seen
