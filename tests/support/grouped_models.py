"""Models with layers that share an input, and what a model may do with them, for the tests of groups."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora.ops.group import group as group_op

K = 24


class Attention(nn.Module):
    """Four layers by their usual names; `order` says what forward does with q, k and v."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(K, 16), nn.Linear(K, 8)
        self.v_proj, self.o_proj = nn.Linear(K, 8, bias=False), nn.Linear(32, K)

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.o_proj(torch.cat((self.q_proj(x), self.k_proj(context), self.v_proj(context)), dim=-1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(K, 40), nn.Linear(K, 40), nn.Linear(40, K)

    def forward(self, x):
        x = x + self.attn(x)
        h = torch.relu(x)
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


def counted_rounds(monkeypatch):
    """How many members each opened round has."""
    opened = []
    original = group_op.SharedInput.__init__

    def counting(self, x, terms, *args, **kwargs):
        opened.append(len(terms))
        original(self, x, terms, *args, **kwargs)

    monkeypatch.setattr(group_op.SharedInput, "__init__", counting)
    return opened


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, run=None, x=None, seed=3):
    """Output, and every gradient, of one pass."""
    x = (randn(3, 5, K) if x is None else x).requires_grad_()
    for parameter in trained(model):
        parameter.grad = None
    torch.manual_seed(seed)
    y = (model if run is None else run)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in trained(model))]


CALLS = {
    "another order": (lambda m: lambda x: torch.cat((m.v_proj(x), m.q_proj(x), m.k_proj(x)), -1), [3]),
    "one skipped": (lambda m: lambda x: torch.cat((m.q_proj(x), m.v_proj(x)), -1), [3]),
    "one alone": (lambda m: lambda x: m.k_proj(x), [3]),
    "one twice": (lambda m: lambda x: torch.cat((m.q_proj(x), m.q_proj(x), m.k_proj(x), m.v_proj(x)), -1), [3, 3]),
    "twice at the end": (
        lambda m: lambda x: torch.cat((m.q_proj(x), m.k_proj(x), m.v_proj(x), m.k_proj(x)), -1),
        [3, 3],
    ),
    "all twice": (lambda m: lambda x: torch.cat([f(x) for f in 2 * (m.q_proj, m.k_proj, m.v_proj)], -1), [3, 3]),
    "cross-attention": (lambda m: lambda x: m(x, torch.tanh(x)), [3, 3]),
    "an equal tensor": (lambda m: lambda x: torch.cat((m.q_proj(x), m.k_proj(x * 1)), -1), [3, 3]),
    "a view": (lambda m: lambda x: torch.cat((m.q_proj(x), m.k_proj(x.view_as(x))), -1), [3, 3]),
}


def _no_grad_first(model):
    def forward(x):
        with torch.no_grad():
            q = model.q_proj(x)
        return torch.cat((q, model.k_proj(x), model.v_proj(x), model.q_proj(x)), -1)

    return forward


def _autocast_in_between(model):
    def forward(x):
        q = model.q_proj(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            k = model.k_proj(x)
        return torch.cat((q, k.to(x.dtype), model.v_proj(x)), -1)

    return forward


SURROUNDINGS = {"no_grad first": _no_grad_first, "autocast in between": _autocast_in_between}


def around_one(name, reentrant):
    def run(model):
        def call(layer, x):
            return checkpoint(layer, x, use_reentrant=reentrant) if layer is getattr(model, name) else layer(x)

        return lambda x: torch.cat([call(layer, x) for layer in (model.q_proj, model.k_proj, model.v_proj)], -1)

    return run
