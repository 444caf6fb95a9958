"""A small language model on real text, for GaLore: which byte of Python's own documentation comes next.

Every way at each of a few learning rates, over several seeds; the loss (nats a byte) is on text that was held out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.optim import GaLoreAdamW, galore_param_groups

CONTEXT, WIDTH, BATCH = 12, 128, 256
HELD_OUT = 20_000  # bytes
RANK, GAP = 16, 20
RATES = (0.01, 0.02, 0.04, 0.08)
SEEDS = (0, 1, 2)

Build = Callable[[nn.Module, float], torch.optim.Optimizer]


class Model(nn.Module):
    """Bytes embedded, a hidden layer, a residual one, and a head: three weights to project."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.first = nn.Linear(16 * CONTEXT, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, context: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.embedding(context).flatten(1)))
        return self.head(hidden + torch.tanh(self.second(self.norm(hidden))))


@cache
def text() -> Tensor:
    from pydoc_data import topics

    return torch.tensor(list(" ".join(topics.topics[name] for name in sorted(topics.topics)).encode()))


def batch(seed: int, size: int = BATCH, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Contexts (size, CONTEXT) and the byte after each."""
    split, end = len(text()) - HELD_OUT, len(text()) - CONTEXT - 1
    low, high = (split, end) if held_out else (0, split - CONTEXT - 1)
    first = torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(seed))
    window = text()[first.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return window[:, :CONTEXT], window[:, CONTEXT]


def train(build: Build, rate: float, steps: int, seed: int = 0, micro_batches: int = 1) -> float:
    """The loss on held-out text after training from scratch, with ten steps of warm-up and a linear decay."""
    torch.manual_seed(seed)
    model = Model()
    optimizer = build(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    for step in range(steps):
        for context, target in zip(*(tensor.chunk(micro_batches) for tensor in batch(1000 * seed + step))):
            (nn.functional.cross_entropy(model(context), target) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    context, target = batch(0, 4096, held_out=True)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(context), target).item()


def galore(rank: int = RANK, **settings: Any) -> Build:
    """Whose learning rate is the projected weights' own (α = 1)."""

    def build(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        groups = galore_param_groups(model, rank, update_proj_gap=GAP, scale=1.0)
        return GaLoreAdamW(groups, rate, model=model, **settings)

    return build


def official(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return GaLoreAdamW.official(galore_param_groups(model, RANK, update_proj_gap=GAP, scale=1.0), rate)


def without_the_projected_weights(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    for layer in (model.first, model.second, model.head):
        layer.weight.requires_grad_(False)  # type: ignore[union-attr]
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], rate)


WAYS: dict[str, Build] = {
    "torch.optim.AdamW": lambda model, rate: torch.optim.AdamW(model.parameters(), rate),
    "GaLore": galore(),
    'GaLore, moments="rotate"': galore(moments="rotate"),
    'GaLore, moments="keep"': galore(moments="keep"),
    "GaLore, official": official,
    'GaLore, refresh="svd"': galore(refresh="svd"),
    'GaLore, refresh="streamed"': galore(refresh="streamed"),
    'GaLore, refresh="streamed", refresh_steps=1': galore(refresh="streamed", refresh_steps=1),
    "GaLore, factored": galore(gradients="factored"),
    "GaLore, 8 bits": galore(optim_bits=8),
    "projected weights frozen": without_the_projected_weights,
}


def measure(steps: int) -> dict[str, dict[str, float]]:
    """Way -> learning rate -> mean loss over the seeds."""
    return {
        name: {str(rate): statistics.mean(train(build, rate, steps, seed) for seed in SEEDS) for rate in RATES}
        for name, build in WAYS.items()
    }


def table(losses: dict[str, dict[str, float]]) -> str:
    width = max(map(len, losses))
    head = " " * width + "".join(f"{rate:>9}" for rate in map(str, RATES))
    return "\n".join(
        [head]
        + [name.ljust(width) + "".join(f"{loss:9.4f}" for loss in line.values()) for name, line in losses.items()]
    )
