"""A GPT over bytes, small enough to pretrain in a few minutes on one core: 0.91M parameters, all its projections are
plain `nn.Linear` layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

BYTES = 256


@dataclass(frozen=True)
class Shape:
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self._split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, heads, tokens, width / heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and next to a residual connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down_proj(nn.functional.gelu(self.up_proj(self.mlp_norm(x))))


class ByteGPT(nn.Module):
    """Logits (batch, tokens, 256) of the byte after each of `tokens` (batch, tokens), tokens <= context."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(BYTES, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def next_byte(model: nn.Module, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, 256) and labels (n,) of every byte but the first of `windows` (batch, length)."""
    return model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
