"""The taps of GradientSketch and of the monitor: which backward passes they look at, what they see of a layer that has
other hooks, and what copies of the model have of them. With GaLore they are tested in test_galore_gradients.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import GradientSketch
from fastlora.introspect import taps


def model_of() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * torch.linspace(0.1, 3.0, 9, dtype=output.dtype)


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    weights = [model.get_submodule(name).weight for name in ("0", "2")]
    return dict(zip(("0", "2"), torch.autograd.grad(loss_of(model), weights)))  # type: ignore[arg-type]


def assert_holds(sketch: GradientSketch, wanted: dict[str, Tensor], passes: int = 1) -> None:
    for name, g in wanted.items():
        q, z = sketch.layers[name].factors()
        error = ((q @ z.t()).double() - passes * g).norm() / (passes * g.norm())
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("by", ["grad", "inputs"])
def test_a_sketch_is_of_the_passes_that_train(by, freeze):
    model = model_of()
    wanted = gradients(model)
    with GradientSketch(model, r=2, width=32, freeze=freeze) as sketch:
        x = X.clone().requires_grad_()
        loss = loss_of(model, x)
        if by == "grad":
            torch.autograd.grad(loss, x)
        else:
            loss.backward(inputs=[x])
        assert not sketch.layers
        loss_of(model).backward()
        if not freeze:
            assert torch.allclose(model[0].weight.grad, wanted["0"])
    assert_holds(sketch, wanted)


def test_passes_over_a_kept_graph_count_each_time():
    model = model_of()
    wanted = gradients(model)
    with GradientSketch(model, r=2, width=32) as sketch:
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_holds(sketch, wanted, passes=2)


def test_a_sketch_sees_what_the_layer_itself_made():
    """Not what the hooks that are there make of it: the gradient is of the layer's output."""
    model = model_of()
    model[0].register_forward_hook(scale)
    wanted = gradients(model)
    with GradientSketch(model, r=2, width=32) as sketch:
        loss_of(model).backward()
    assert_holds(sketch, wanted)
    seen: dict[str, Tensor] = {}
    undo = taps.watch({"0": model[0]}, lambda name, x, dy, _: seen.update({name: dy.mT @ x}))
    loss_of(model).backward()
    undo()
    assert torch.allclose(seen["0"], wanted["0"])


def test_a_sketch_refuses_second_derivatives():
    model = model_of()
    with GradientSketch(model, r=2, freeze=False):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)  # which no weight's gradient is a part of
        with pytest.raises(RuntimeError, match=r"got a second derivative .* want first derivatives only in a Gradient"):
            gradient.square().sum().backward()


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("kind", ["attach", "watch"])
def test_copies_have_hooks_that_do_nothing(kind, way: Callable[[Any], Any]):
    model = nn.Sequential(nn.Embedding(5, 6), *model_of().float())
    tokens = torch.tensor([[1, 2, 4]])
    seen: list[str] = []
    layers: dict[str, nn.Module] = {"1": model[1], "3": model[3]}
    if kind == "attach":
        undo = taps.attach(model, layers, lambda *_: seen.append("tap"))
    else:
        undo = taps.watch(layers, lambda *_: seen.append("tap"))
    other = way(model)
    other(tokens).sum().backward()
    assert seen == [] and other[1].weight.grad is not None
    assert not way(model).requires_grad_(False)(tokens).requires_grad
    model(tokens).sum().backward()
    assert seen.count("tap") == 2
    undo()
    other(tokens).sum().backward()
    assert seen.count("tap") == 2 and not any(module._forward_hooks for module in model.modules())
