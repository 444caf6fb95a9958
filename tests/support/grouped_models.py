"""Models with layers that share an input, what a model may do with them, and what groups promise in either family."""

import pytest
import torch
from problems import path
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora.layers import group as grouping
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


def at_every_size():
    """For a fixture."""
    with path("function"):
        yield
    grouping._here.round = None


def counted_rounds(monkeypatch):
    """How many members each opened round has. For a fixture."""
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


def assert_near(got, want, tolerance):
    """Each within this relative error, in the norm: some of their numbers went through bfloat16."""
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and (one - other).norm() <= tolerance * other.norm()


def itself(model):
    return model


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


def _x_modified(model):
    def forward(x):
        x = x * 1
        with torch.no_grad():
            q = model.q_proj(x)
        x.mul_(2)
        return torch.cat((q, model.k_proj(x), model.v_proj(x)), -1)

    return forward


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


SURROUNDINGS = {"x modified": _x_modified, "no_grad first": _no_grad_first, "autocast in between": _autocast_in_between}


def around_one(name, reentrant):
    def run(model):
        def call(layer, x):
            return checkpoint(layer, x, use_reentrant=reentrant) if layer is getattr(model, name) else layer(x)

        return lambda x: torch.cat([call(layer, x) for layer in (model.q_proj, model.k_proj, model.v_proj)], -1)

    return run


class Groups:
    """What a group promises in a model patched plainly and in PEFT's: the numbers of its layers run one by one.

    A family says how it makes the same model twice, where its layers are, and how a layer stops dropping.
    """

    def pair(self, module_class=Attention, dtype=torch.float64, dropout=0.0):
        """(the model run one by one, the same with groups)."""
        raise NotImplementedError

    def inner(self, model):
        return model

    def fuse(self, model):
        """Runs the model's layers on fastlora, one by one: PEFT's own would copy x to float32."""

    def undrop(self, layer):
        raise NotImplementedError

    def check(self, pair, run, rounds, shrinks, **options):
        """`run(model)` gives a function of x; `rounds`: how many members are in each of the grouped model's rounds."""
        alone, grouped = pair
        want = step(alone, run(self.inner(alone)), **options)
        shrinks.clear()
        got = step(grouped, run(self.inner(grouped)), **options)
        assert shrinks == rounds
        torch.testing.assert_close(got, want)

    def test_a_block_runs_the_groups_kernels(self, shrinks):
        alone, grouped = self.pair(Block)
        self.check((alone, grouped), itself, [3, 2], shrinks)
        assert grouping._here.round is None
        y = self.inner(grouped).attn.q_proj(randn(3, K).requires_grad_())
        assert type(y.grad_fn).__name__ == "GroupFunctionBackward"

    @pytest.mark.parametrize("name", CALLS)
    def test_what_models_do(self, name, shrinks):
        run, rounds = CALLS[name]
        self.check(self.pair(), run, rounds, shrinks)

    @pytest.mark.parametrize("name", SURROUNDINGS)
    def test_other_surroundings_in_between(self, name, shrinks):
        autocast = "autocast" in name
        dtype = torch.float32 if autocast else torch.float64
        x = randn(3, 5, K).to(dtype)
        want, got = (step(m, SURROUNDINGS[name](self.inner(m)), x=x.clone()) for m in self.pair(dtype=dtype))
        assert_near(got, want, 2e-2 if autocast else 1e-12)
        assert len(shrinks) >= 2

    def test_dropout_on_a_cpu_draws_what_it_draws_alone(self, shrinks):
        pair = self.pair(Block, dropout=0.5)
        self.check(pair, itself, [], shrinks)
        for model in map(self.inner, pair):
            self.undrop(model.attn.k_proj)
            self.undrop(model.attn.v_proj)
        self.check(pair, itself, [2], shrinks)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_checkpointing_a_block(self, reentrant, dropout):
        alone, grouped = self.pair(Block, dropout=dropout)
        for model in map(self.inner, (alone, grouped)):
            self.undrop(model.gate_proj)
            self.undrop(model.up_proj)
        run = lambda module: lambda x: checkpoint(module, x, use_reentrant=reentrant)  # noqa: E731
        once = step(grouped)
        for want, got in zip(once, step(grouped, run(self.inner(grouped))), strict=True):
            assert torch.equal(want, got)
        torch.testing.assert_close(once, step(alone, run(self.inner(alone))))

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
    def test_checkpointing_one_member(self, reentrant, name):
        alone, grouped = self.pair()
        run = around_one(name, reentrant)
        for _ in range(2):
            torch.testing.assert_close(step(grouped, run(self.inner(grouped))), step(alone, run(self.inner(alone))))

    def test_compile_and_inference_mode_run_one_by_one(self, shrinks):
        alone, grouped = self.pair()
        compiled = torch.compile(self.inner(grouped), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(grouped, compiled), step(alone))
        with torch.inference_mode():
            torch.testing.assert_close(grouped(randn(3, K)), alone(randn(3, K)))
        assert shrinks == []
        with torch.no_grad():
            torch.testing.assert_close(grouped(randn(3, K)), alone(randn(3, K)))
        assert shrinks == [3]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_half_precision(self, dtype, autocast, shrinks):
        x = randn(3, 5, K).to(dtype)
        alone, grouped = self.pair(dtype=dtype)
        self.fuse(alone)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got, want = step(grouped, x=x.clone()), step(alone, x=x.clone())
        assert shrinks == [3]
        assert_near(got, want, 2e-2)
