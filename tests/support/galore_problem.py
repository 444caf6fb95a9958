"""What GaLore's tests train: a small network of every kind of parameter, and batches for it, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.optim import GaLoreAdamW, galore_param_groups

RANK = 4


class Net(nn.Module):
    """Wide, tall and square weights, with and without biases, a norm; an embedding that trains whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.square = nn.Linear(20, 20, bias=False)
        self.down = nn.Linear(20, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(tokens)))
        return self.down(hidden + torch.tanh(self.square(self.norm(hidden))))


PROJECTED = ("up.weight", "square.weight", "down.weight")


def net(dtype: torch.dtype = torch.float64, kind: Callable[[], nn.Module] = Net) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (24, 5), and what the last layer is to tell of them."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 11, (24, 5), generator=generator)
    return tokens, (tokens * 7 + 3) % 9


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def optimizer_of(model: nn.Module, groups: dict[str, Any] | None = None, **settings: Any) -> GaLoreAdamW:
    made = galore_param_groups(model, RANK, **{"update_proj_gap": 6, "scale": 1.0, **(groups or {})})
    if settings.get("gradients") == "factored":
        settings["model"] = model
    return GaLoreAdamW(made, **{"lr": 1e-2, **settings})


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, micro_batches: int = 1, start: int = 0
) -> list[float]:
    """The loss of every step."""
    losses = []
    for step in range(start, start + steps):
        losses.append(backward(model, step, micro_batches))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def backward(model: nn.Module, step: int, micro_batches: int = 1) -> float:
    total = 0.0
    for tokens, targets in zip(*(tensor.chunk(micro_batches) for tensor in batch(step))):
        loss = loss_of(model, tokens, targets) / micro_batches
        loss.backward()
        total += loss.item()
    return total


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def difference(model: nn.Module, other: nn.Module) -> float:
    """Relative, over all parameters."""
    mine, theirs = parameters_of(model), parameters_of(other)
    return float((mine - theirs).norm() / theirs.norm())
