"""`plain_models.Net` in training: its losses, sketches of their gradients, adapters in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain_models import LINEARS, Net
from torch import Tensor, nn

import fastlora
from fastlora import FusedLoraLinear
from fastlora.adapters import first_forward

R = 2
BASES = ["exact", "offset"]
SKETCHED = LINEARS[:-1]  # the head is 3×6: too small for 2r


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    x = inputs(seed).to(next(model.parameters()).dtype)
    return (model(x) * torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(seed + 1))).mean()


def sketch_of(model: nn.Module, r: int = R, loss: Callable[[nn.Module], Tensor] = loss_of, **options: Any) -> Any:
    with fastlora.GradientSketch(model, r=r, **options) as sketch:
        loss(model).backward()
    return sketch


def patched(**options: Any) -> Net:
    """With adapters that are not zero."""
    model = Net()
    torch.manual_seed(2)
    fastlora.patch(model, **{"r": R, "init_lora_weights": False, "target_modules": LINEARS, **options})
    first_forward.forget(model)  # its hooks go with the first training forward
    return model


def move_adapters(model: nn.Module) -> None:
    """As training would, away from the start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def optimizer_of(model: nn.Module, kind: Any = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    return kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **options})


def layers_of(model: nn.Module) -> dict[str, FusedLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)}
