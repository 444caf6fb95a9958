"""Models of a few linear layers, of the kinds that `patch` meets outside transformers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Block(nn.Module):
    """Two linear layers, a Conv1D, a norm, and a plain list that holds one of the layers a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.conv = Conv1D(8, 10)
        self.down = nn.Linear(8, 6, bias=False)
        self.listed = [self.up, self.down]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.listed[1](self.conv(self.norm(self.listed[0](x))))


class Net(nn.Module):
    """Two blocks and a head, as `blocks.0.up`, ..., `head`; some parameters are frozen from the start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)
        self.head.bias.requires_grad_(False)
        cast(Block, self.blocks[1]).up.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LINEARS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "conv", "down")] + ["head"]


def submodule(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, and one linear layer registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.output = nn.Linear(5, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.again(self.first(self.embedding(tokens)).relu()))
