"""`lora_linear` under torch.compile, and the two ops that stand for it there."""

from __future__ import annotations

import pytest
import torch
from problems import NAMES, Problem, eager, fused, make_problem, path, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

import fastlora
from fastlora.functional import lora_linear

TRAINED = ("x", "lora_A", "lora_B")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def the_function():
    """The ops run the backend's two passes, so eager calls must too, for the same bits."""
    with path("function"):
        yield


def compiled(backend: str = "aot_eager", **options):
    return torch.compile(lora_linear, backend=backend, fullgraph=True, **options)


def assert_same_bits(problem: Problem, trained=TRAINED, **options):
    want = fused(problem, trained)
    torch.manual_seed(0)
    got = run(problem, compiled(**options), trained)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("x_shape", [(12, 20), (3, 4, 20)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype, adapter_dtype", [("float32", "float32"), ("bfloat16", "float32")])
def test_the_same_bits_as_without(x_shape, dropout_p, dtype, adapter_dtype):
    """One graph without breaks; dropout draws the same mask from the same generator."""
    assert_same_bits(
        make_problem(
            *x_shape,
            dtype=getattr(torch, dtype),
            adapter_dtype=getattr(torch, adapter_dtype),
            dropout_p=dropout_p,
        )
    )


@pytest.mark.parametrize("trained", [("lora_A",), ("lora_B",), ("x",), ("weight", "bias"), NAMES, ()], ids=str)
def test_each_gradient_alone(trained):
    assert_same_bits(make_problem(12, 20, dropout_p=0.25), trained)


def test_everything_dropped():
    problem = make_problem(12, 20, dropout_p=1.0)
    got = run(problem, compiled(), NAMES)
    torch.testing.assert_close(got, eager(problem, NAMES, torch.zeros(12, 20, dtype=torch.bool)))


def test_one_graph_for_many_batch_sizes():
    """A scale that is dynamic goes into B: the same bits where it is a power of two."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lora_linear, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for m in (12, 7, 30):
        problem = make_problem(3, m, 20, scaling=2.0)
        want = fused(problem)
        got = run(problem, function)
        assert all(torch.equal(got[name], want[name]) for name in want)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


def test_autocast_inside_the_graph():
    problem = make_problem(12, 20)

    def call(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear(*arguments).float()

    want = run(problem, call)
    got = run(problem, torch.compile(call, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(got[name], want[name]) for name in want)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(20, 32), nn.Linear(32, 20)

    def forward(self, x):
        return x + self.down(torch.relu_(self.up(x)))


def _step(model, forward, x):
    """Loss and gradients of one training step."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = forward(x).pow(2).mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def _patched_model() -> nn.Module:
    torch.manual_seed(1)
    model = _Model()
    fastlora.patch(model, r=4, lora_dropout=0.25, init_lora_weights=False)
    return model


def test_a_patched_model():
    model, x = _patched_model(), torch.randn(2, 6, 20)
    want = _step(model, model, x)
    got = _step(model, torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_adapter_state_is_looked_at_again():
    """Setting, disabling and merging adapters after compilation takes effect."""
    model, x = _patched_model().eval(), torch.randn(2, 6, 20)
    fastlora.patch(model, r=2, adapter_name="second", init_lora_weights=False)
    forward = torch.compile(model, backend="aot_eager")
    seen = []
    for change in (
        lambda: None,
        lambda: fastlora.set_adapter(model, "second"),
        lambda: fastlora.set_adapter(model, ["default", "second"]),
        lambda: fastlora.merge(model),
        lambda: fastlora.unmerge(model),
        lambda: [setattr(layer, "disable_adapters", True) for layer in (model.up, model.down)],
    ):
        change()
        torch.testing.assert_close(forward(x), model(x))
        seen.append(forward(x).detach())
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[2], seen[5])


@pytest.mark.slow
def test_a_patched_model_with_inductor():
    """Inductor holds the ops to the strides that they promise; dropout's mask is the same (fallback_random)."""
    model, x = _patched_model(), torch.randn(2, 6, 20)
    want = _step(model, model, x)
    with inductor_config.patch(fallback_random=True):
        got = _step(model, torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_opcheck_forward(bias, dropout_p, adapter_dtype):
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes."""
    p = make_problem(12, 20, bias=bias, adapter_dtype=getattr(torch, adapter_dtype))
    keep = (torch.rand(12, 20) > dropout_p).float() if dropout_p else None
    leaves = [t.requires_grad_() for t in (p.x, p.weight)]
    adapters = [t.requires_grad_() for t in (p.lora_A, p.lora_B)]
    torch.library.opcheck(
        torch.ops.fastlora.lora_linear.default, (*leaves, p.bias, *adapters, keep, p.scaling, dropout_p, "auto", False)
    )


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_opcheck_backward(needs, adapter_dtype):
    p = make_problem(12, 20, adapter_dtype=getattr(torch, adapter_dtype))
    s = torch.randn(12, 5)
    torch.library.opcheck(
        torch.ops.fastlora.lora_linear_backward.default,
        (p.dy, p.x, p.weight, p.lora_A, p.lora_B, s, None, p.scaling, 0.0, list(needs), "auto", False),
    )
