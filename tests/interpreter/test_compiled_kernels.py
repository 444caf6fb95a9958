"""The Triton kernels inside a compiled graph: the graph calls the op, the op runs the backend that was asked for."""

from typing import Any

import pytest
import torch
from numerics import assert_close_to_fp64

from fastlora.functional import lora_linear
from fastlora.kernels.dropout import reference_keep_mask
from fastlora.ops import reference
from fastlora.ops.lora import cublas
from fastlora.ops.lora import triton as lora_triton

MODULES = {"cublas": cublas, "triton": lora_triton}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves() -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = {"x": torch.randn(2, 9, 40), "weight": torch.randn(33, 40), "bias": torch.randn(33)}
    adapters = {"lora_A": torch.randn(5, 40), "lora_B": torch.randn(33, 5)}
    trained = ("x", "lora_A", "lora_B")
    return {name: t.requires_grad_(name in trained) for name, t in (tensors | adapters).items()}


def run(call, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    y = call(**tensors)
    names = [name for name, t in tensors.items() if t.requires_grad]
    gradients = torch.autograd.grad(y, [tensors[name] for name in names], torch.ones_like(y))
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def assert_as_right_as_eager(got, call) -> None:
    eager = run(call, leaves())
    exact = run(call, {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in leaves().items()})
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], eager[name], what=name)


@pytest.mark.parametrize("backend", list(MODULES))
def test_values_and_gradients(backend, monkeypatch):
    calls = []
    for direction in ("forward", "backward"):
        original = getattr(MODULES[backend], direction)
        monkeypatch.setattr(
            MODULES[backend],
            direction,
            lambda *a, original=original, direction=direction: calls.append(direction) or original(*a),
        )

    def call(x, weight, bias, lora_A, lora_B):
        return lora_linear(x, weight, lora_A, lora_B, 1.5, bias, backend=backend)

    got = run(torch.compile(call, backend="aot_eager", fullgraph=True), leaves())
    assert calls == ["forward", "backward"]
    assert_as_right_as_eager(
        got, lambda x, weight, bias, lora_A, lora_B: reference.lora_linear(x, weight, lora_A, lora_B, 1.5, bias)
    )


@pytest.mark.parametrize("backend", list(MODULES))
def test_dropout_by_a_seed_from_the_graph(backend):
    """What a graph for a GPU does: the seed is drawn in the graph, the kernels make the mask from it."""
    p = 0.25

    def call(x, weight, bias, lora_A, lora_B):
        seed = torch.randint(2**62, (1,), dtype=torch.int64)
        arguments = (x.reshape(-1, 40), weight, bias, lora_A, lora_B, seed, 1.5, p, backend, False)
        return torch.ops.fastlora.lora_linear_any_scale(*arguments), seed

    tensors = leaves()
    y, seed = torch.compile(call, backend="aot_eager", fullgraph=True)(**tensors)
    names = [name for name, t in tensors.items() if t.requires_grad]
    gradients = torch.autograd.grad(y, [tensors[name] for name in names], torch.ones_like(y))
    got = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
    keep = reference_keep_mask(seed, 18, 40, p).reshape(2, 9, 40) / (1 - p)

    def dropped(x, weight, bias, lora_A, lora_B):
        s = torch.nn.functional.linear(x * keep, lora_A)
        y = torch.nn.functional.linear(x, weight, bias) + 1.5 * torch.nn.functional.linear(s, lora_B)
        return y.reshape(18, 33)

    assert_as_right_as_eager(got, dropped)
