"""What changes between the calls of a compiled model, and what that costs: scales, adapters, shapes, steps. And what
torch.compile, torch.export and torch.jit.trace make of a whole transformers model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from numerics import assert_close_to_fp64
from problems import eager, make_problem, path, run
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.jit.frontend import NotSupportedError

import fastlora
from fastlora.functional import lora_linear
from fastlora.integrations.peft.lora import FusedPeftLinear
from fastlora.ops.lora import autograd as lora_autograd

WAYS = pytest.mark.parametrize("way", ["patched", "PEFT patched"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with path("function"):
        yield
    torch._dynamo.reset()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 32), nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def make(way: str) -> Any:
    """A model with the adapters "default" (active) and "second" on its two layers, both random."""
    torch.manual_seed(1)
    model: Any = Mlp()
    if way == "patched":
        fastlora.patch(model, r=4, init_lora_weights=False)
        fastlora.patch(model, r=4, adapter_name="second", init_lora_weights=False)
        return model
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.add_adapter("second", config)
    fastlora.patch(model, strict=True)
    return model


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (fastlora.FusedLoraLinear, FusedPeftLinear))]


def set_adapter(model: Any, name: str) -> None:
    model.set_adapter(name) if isinstance(model, peft.PeftModel) else fastlora.set_adapter(model, name)


def disabled(model: Any) -> Any:
    return model.disable_adapter() if isinstance(model, peft.PeftModel) else fastlora.disable_adapter(model)


def merge(model: Any) -> None:
    model.merge_adapter() if isinstance(model, peft.PeftModel) else fastlora.merge(model)


def unmerge(model: Any) -> None:
    model.unmerge_adapter() if isinstance(model, peft.PeftModel) else fastlora.unmerge(model)


def step(model: nn.Module, forward: Any, x: Tensor) -> dict[str, Tensor]:
    """The output, and every gradient by its name."""
    model.zero_grad()
    y = forward(x)
    y.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


def no_recompilation() -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True)


@WAYS
@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
def test_a_scale_that_changes(way, dynamic):
    """Its first change makes it an input of the graph, which it is at once with dynamic=True; after that no value is
    compiled for."""
    model, x = make(way), torch.randn(2, 6, 20)
    forward, seen = compiled(model, dynamic=dynamic), []
    for i, scale in enumerate((2.0, 3.0, 0.7, 0.3, -1.1)):
        for layer in layers(model):
            layer.scaling["default"] = scale
        want = step(model, model, x)
        first = 2 if dynamic is None else 1
        with torch._dynamo.config.patch(error_on_recompile=i >= first):
            got = step(model, forward, x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        seen.append(want["y"])
    assert not any(torch.allclose(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_in_the_graph_is_as_right_as_eager(adapter_dtype):
    """It rounds B once more, within the rule: at most twice eager PyTorch's error."""
    problem = make_problem(12, 20, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, scaling=0.7)
    got = run(problem, torch.compile(lora_linear, backend="aot_eager", fullgraph=True, dynamic=True))
    in_same_dtype, exact = eager(problem), eager(problem.mapped(Tensor.double))
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], in_same_dtype[name], what=name)


@WAYS
def test_adapters_that_take_turns(way):
    """A graph for each of the states, and none is made twice."""
    model, x = make(way), torch.randn(2, 6, 20)
    forward, seen = compiled(model), []
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            for name in ("default", "second"):
                set_adapter(model, name)
                want = step(model, model, x)
                torch.testing.assert_close(step(model, forward, x), want)
                seen.append(want["y"])
            with torch.no_grad():
                with disabled(model):
                    torch.testing.assert_close(forward(x), model(x))
                    seen.append(model(x))
                merge(model)
                torch.testing.assert_close(forward(x), seen[-2])
                unmerge(model)
    first, second, none = seen[:3]
    assert not torch.allclose(first, second) and not torch.allclose(second, none)


@WAYS
def test_an_adapter_that_gets_other_numbers(way):
    """Optimiser steps, a state dict loaded, factors written over: the graph stays."""
    model, x = make(way), torch.randn(2, 6, 20)
    forward = compiled(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = step(model, forward, x)["y"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with no_recompilation():
        for _ in range(2):
            torch.testing.assert_close(step(model, forward, x), step(model, model, x))
            optimizer.step()
        assert not torch.allclose(forward(x), first)
        model.load_state_dict(before)
        assert torch.equal(forward(x), first)


@WAYS
def test_batches_of_every_length(way):
    """The first other length makes a dynamic graph; no later one, 1 apart, makes another."""
    model = make(way)
    forward = compiled(model)
    for i, length in enumerate((6, 5, 9, 2, 40)):
        x = torch.randn(2, length, 20)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            got = step(model, forward, x)
        torch.testing.assert_close(got, step(model, model, x), rtol=1e-5, atol=1e-6)


def test_a_transformers_model_in_one_graph():
    """fullgraph=True: three steps of training, dropout on."""
    histories = []
    for compile_it in (False, True):
        model: Any = tiny_model("llama").train()
        model.config.use_cache = False
        torch.manual_seed(2)
        fastlora.patch(model, r=4, init_lora_weights=False, lora_dropout=0.1)
        forward = compiled(model) if compile_it else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(3)
        losses = []
        for _ in range(3):
            loss = forward(**tiny_batch("llama")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[0] == pytest.approx(histories[1], rel=1e-6) and histories[0][0] != histories[0][2]


@WAYS
def test_export(way):
    """A plain patched model is exported with the op in it; a PEFT one as PEFT's own operations, since torch.export
    installs global module hooks, which the fused path would leave out."""
    model, x = make(way).eval(), torch.randn(2, 6, 20)
    batch = torch.export.Dim("batch", min=2)
    shapes: Any = ({0: batch},)
    program = torch.export.export(model, (x,), dynamic_shapes=(shapes,) if way == "PEFT patched" else shapes)
    other = torch.randn(5, 6, 20)
    torch.testing.assert_close(program.module()(other), model(other))
    decomposed = program.run_decompositions()
    torch.testing.assert_close(decomposed.module()(other), model(other))
    ops = [str(node.target) for node in decomposed.graph.nodes if "fastlora" in str(node.target)]
    assert ops == (["fastlora.lora_linear.default"] * 2 if way == "patched" else [])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("architecture", ["llama", "vit"])
def test_jit_trace(architecture):
    """Traced as eager PyTorch's operations, for inputs of that shape."""
    model: Any = tiny_model(architecture)
    fastlora.patch(model, r=4, init_lora_weights=False)
    (name,) = {"input_ids", "pixel_values"} & tiny_batch(architecture).keys()
    x = tiny_batch(architecture)[name]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(**{name: x}).logits

    traced: Any = torch.jit.trace(Logits(), (x,), check_trace=False)
    x = x.flip(-1)
    torch.testing.assert_close(traced(x), Logits()(x), rtol=1e-4, atol=1e-5)
    assert "fastlora::" not in str(traced.inlined_graph)


def test_jit_script_is_not_supported():
    with pytest.raises((NotSupportedError, ValueError)):  # TorchScript's own words for what it cannot read
        torch.jit.script(make("patched"))


# torch.func transforms and second derivatives.
def transformed(transform: str) -> Any:
    p = make_problem(3, 4, 20)

    def loss(a: Tensor, x: Tensor) -> Tensor:
        return lora_linear(x, p.weight, a, p.lora_B, 1.5, p.bias).square().sum()

    return {
        "grad": lambda: torch.func.grad(loss)(p.lora_A, p.x),
        "vmap": lambda: torch.vmap(loss, in_dims=(None, 0))(p.lora_A, p.x),
        "per-sample gradients": lambda: torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(p.lora_A, p.x),
        "jvp": lambda: torch.func.jvp(lambda a: loss(a, p.x), (p.lora_A,), (torch.ones_like(p.lora_A),))[1],
        "hessian": lambda: torch.func.hessian(lambda a: loss(a, p.x))(p.lora_A),
    }[transform]


@pytest.mark.parametrize("transform", ["grad", "vmap", "per-sample gradients", "jvp", "hessian"])
def test_functorch_transforms_inside_a_compiled_graph(transform):
    call = transformed(transform)
    got = torch.compile(call, backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(got, call(), rtol=1e-4, atol=1e-4)


def test_second_derivatives_raise():
    """Of a compiled graph, and of the ops themselves."""
    p = make_problem(12, 20)
    a = p.lora_A.requires_grad_()
    forward = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(forward(p.x, p.weight, a, p.lora_B, 1.5).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()
    y, _ = torch.ops.fastlora.lora_linear(p.x, p.weight, p.bias, a, p.lora_B, None, 1.5, 0.0, "auto", False)
    (gradient,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear is differentiable once"):
        gradient.sum().backward()


# The ops.
def test_opcheck_of_the_op_that_takes_any_scale():
    p = make_problem(12, 20)
    tensors = (p.x.requires_grad_(), p.weight, p.bias, p.lora_A.requires_grad_(), p.lora_B.requires_grad_())
    torch.library.opcheck(torch.ops.fastlora.lora_linear_any_scale.default, (*tensors, None, 1.5, 0.0, "auto", False))


def test_every_op_is_opchecked():
    """Every operator that fastlora's sources define is given to opcheck by a test."""
    root = Path(__file__).resolve().parents[2]
    sources = [*(root / "fastlora").rglob("*.py"), *(root / "csrc").glob("*.cpp")]
    defined = set(re.findall(r'def(?:ine)?\(\s*"(\w+)\(', "\n".join(s.read_text(encoding="utf-8") for s in sources)))
    tests = [test.read_text(encoding="utf-8") for test in (root / "tests").rglob("test_*.py")]
    assert {"lora_linear", "lora_linear_backward", "lora_linear_any_scale", "jacobi_svd"} <= defined
    checking = "\n".join(test for test in tests if "library.opcheck(" in test)
    assert defined == {name for name in defined if re.search(rf'\.{name}\.default|"{name}": ', checking)}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_graph_for_a_gpu(dropout_p):
    """Traced with tensors that only say "cuda": the seed is drawn on the device, no mask and no cast copy of x is made,
    nothing is read back to the host, and the outputs have the promised dtypes and devices."""
    with FakeTensorMode(), torch.no_grad():

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(*shape, device="cuda", dtype=dtype)

        x, weight, bias = empty(6, 64), empty(32, 64), empty(32)
        lora_A, lora_B = empty(4, 64, dtype=torch.float32), empty(32, 4, dtype=torch.float32)

        def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
            return lora_autograd._compiled_lora_linear(x, weight, bias, lora_A, lora_B, 2.0, dropout_p, "auto", False)

        graph = make_fx(forward)(x, lora_A, lora_B).graph
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        calls = [t for t in targets if "getitem" not in t and "view" not in t]
        assert calls == ["aten.randint.default"] * (dropout_p > 0) + ["fastlora.lora_linear.default"]
        y = next(node for node in graph.nodes if "getitem" in str(node.target)).meta["val"]
        assert (y.dtype, y.device.type, y.shape) == (torch.bfloat16, "cuda", (6, 32))
        seed = torch.empty(1, device="cuda", dtype=torch.int64)
        outputs = torch.ops.fastlora.lora_linear_backward(
            empty(6, 32),
            x,
            weight,
            lora_A,
            lora_B,
            empty(6, 4),
            seed,
            2.0,
            dropout_p,
            [True, True, False],
            "auto",
            False,
        )
        assert [out.dtype for out in outputs[:2]] == [torch.bfloat16, torch.float32]
        assert [tuple(out.shape) for out in outputs] == [(6, 64), (4, 64), (0,)]
        assert {out.device.type for out in outputs} == {"cuda"}
