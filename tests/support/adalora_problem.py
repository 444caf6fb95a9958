"""Small models with AdaLoRA's adapters, and the paper's equations in float64, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.layers.schedule import RankSchedule

SIZES = [(6, 10), (10, 10), (10, 3)]  # of the layers, in and out
R, TARGET = 4, 2


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(k, n, dtype=dtype) for k, n in SIZES])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == 0 else layer(torch.tanh(x))
        return x


NAMES = [f"layers.{i}" for i in range(len(SIZES))]


def plain(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(dtype)


def patched(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    model = plain(dtype, seed)
    fastlora.patch(model, **{"r": R, "lora_alpha": 8, "use_adalora": True, **settings})
    return model


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, SIZES[0][0], generator=generator).to(dtype)
    return x, torch.sin(x[:, :3] * 2 + x[:, 3:])


def loss_of(model: Any, step: int, gamma: float = 0.1) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    loss = (model(x) - y).square().mean()
    return loss + fastlora.variants.orthogonality_penalty(model, gamma) if gamma else loss


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=lr)


def triplets(model: Any) -> dict[str, dict[str, Tensor]]:
    """By layer P (out, r), e (r, 1), Q (r, in): the parameters."""
    found = {}
    for name, layer in model.named_modules():
        if "default" in getattr(layer, "lora_E", ()):
            found[name] = {"P": layer.lora_B["default"], "e": layer.lora_E["default"], "Q": layer.lora_A["default"]}
    return found


class Paper:
    """Equations 7 to 13 of arXiv 2303.10512, in float64, with loops where the paper has indices; the budget is the
    continuous one. `see` is given the weights and the gradients, `keep` says what is kept after a step."""

    def __init__(self, schedule: RankSchedule, ranks: dict[str, int]) -> None:
        self.schedule, self.ranks = schedule, ranks
        self.smooth: dict[tuple[str, str], Tensor] = {}
        self.unsure: dict[tuple[str, str], Tensor] = {}
        self.scores: list[tuple[float, str, int]] = []
        self.kept = {name: [True] * r for name, r in ranks.items()}
        self.t = 0

    def see(self, weights: dict[str, dict[str, Tensor]], gradients: dict[str, dict[str, Tensor]]) -> None:
        s: dict[tuple[str, str], Tensor] = {}
        for name, factors in weights.items():
            for key, weight in factors.items():
                place = (name, key)
                importance = (weight.detach().double() * gradients[name][key].double()).abs()
                zero = torch.zeros_like(importance)
                beta1, beta2 = self.schedule.beta1, self.schedule.beta2
                self.smooth[place] = beta1 * self.smooth.get(place, zero) + (1 - beta1) * importance
                difference = (importance - self.smooth[place]).abs()
                self.unsure[place] = beta2 * self.unsure.get(place, zero) + (1 - beta2) * difference
                s[place] = self.smooth[place] * self.unsure[place]
        self.scores = []
        for name, r in self.ranks.items():
            d1, d2 = len(weights[name]["P"]), weights[name]["Q"].shape[1]
            for i in range(r):
                of_p = sum(s[name, "P"][j, i].item() for j in range(d1)) / d1
                of_q = sum(s[name, "Q"][i, j].item() for j in range(d2)) / d2
                self.scores.append((s[name, "e"][i, 0].item() + of_p + of_q, name, i))

    def budget(self, t: int) -> int:
        t_i, t_f, total = self.schedule.t_init, self.schedule.t_final, self.schedule.total_steps
        b_0, b_t = sum(self.ranks.values()), self.schedule.target_r * len(self.ranks)
        if t < t_i:
            return b_0
        if t < total - t_f:
            return int(b_t + (b_0 - b_t) * (1 - (t - t_i) / (total - t_i - t_f)) ** 3)
        return b_t

    def keep(self) -> dict[str, list[bool]] | None:
        """After step t: which λ are kept, or None where none is touched."""
        self.t += 1
        last = self.schedule.total_steps - self.schedule.t_final
        if self.t <= self.schedule.t_init or (self.t < last and self.t % self.schedule.delta_t):
            return None
        if self.t <= last:
            best = sorted(self.scores, key=lambda triplet: -triplet[0])[: self.budget(self.t)]  # stable: as they came
            self.kept = {name: [False] * r for name, r in self.ranks.items()}
            for _, name, i in best:
                self.kept[name][i] = True
        return self.kept
