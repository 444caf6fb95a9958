# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""`lora_mlp` against fp64, for every activation; what it saves; where it leaves the work to eager PyTorch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import contracts
import pytest
import torch
import torch.nn.functional as F
from problems import path, spied_mlps, through_the_function
from torch import Tensor, nn

from fastlora.functional import Adapter, GroupLayer, lora_activated_linear, lora_mlp
from fastlora.ops import reference
from fastlora.ops.mlp import mlp as mlp_op

FP32, FP64 = torch.float32, torch.float64
MLP, CPU = contracts.Mlp(), contracts.ATEN[0]


the_function = pytest.fixture(autouse=True)(through_the_function)


@pytest.fixture
def fused_calls(monkeypatch):
    return spied_mlps(monkeypatch)


def problem(activation="silu", gated=True, dtype=FP32, **size) -> contracts.Case:
    return MLP.make(CPU, (dtype, dtype), activation=activation, gated=gated, **size)


def fused(of, case, dropout_p=0.0, **options) -> Tensor:
    return MLP.op(of, replace(case, ps=(dropout_p,) * len(case.ps)), **options)[0]


def eager(of, case) -> Tensor:
    return MLP.specification(of, case, [None] * len(case.ps))[0]


ACTIVATIONS = pytest.mark.parametrize("activation", mlp_op.ACTIVATIONS)
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def test_dropout_is_off_outside_training():
    case = problem("gelu")
    assert torch.equal(fused(case.tensors, case, 0.5, training=False), fused(case.tensors, case))


def test_noncontiguous_gate_and_up():
    case = problem(dtype=FP64)
    down = MLP.layer(case.tensors, case, "down")
    gate, up = (torch.randn(33, 6, 2, dtype=FP64).transpose(0, 2).requires_grad_() for _ in range(2))
    y = lora_activated_linear(gate, up, down, "gelu")
    got = torch.autograd.grad(y.square().sum(), (gate, up))
    plain = reference.lora_linear(F.gelu(gate) * up, down.weight, *down.adapters[0][:3], down.bias)
    torch.testing.assert_close((y, *got), (plain, *torch.autograd.grad(plain.square().sum(), (gate, up))))


def saved_bytes(function) -> int:
    """Bytes of distinct memory kept for the backward pass, parameters left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
        assert y.requires_grad
    return sum(kept.values())


def as_parameters(case):
    """All but x and dy are Parameters, of which the adapters are trained."""
    return {
        name: t.requires_grad_() if name == "x" else t if "dy" in name else nn.Parameter(t, name[:2] in ("A.", "B."))
        for name, t in case.tensors.items()
    }


@ACTIVATIONS
@GATED
def test_saves_gate_up_x_and_s_and_eager_more(activation, gated):
    case = problem(activation, gated, shape=(64,))
    of, (rows, size, k, n, r) = as_parameters(case), (64, 4, 20, 33, 4)
    layers = 3 if gated else 2
    want = rows * size * (k + (layers - 1) * n + layers * r)
    assert saved_bytes(lambda: fused(of, case)) == want
    relu_keeps_its_result_only = activation == "relu"
    more = rows * size * n * (2 if gated and not relu_keeps_its_result_only else 1)
    assert saved_bytes(lambda: eager(of, case)) >= want + more - relu_keeps_its_result_only * rows * size * n


def test_saves_less_than_peft():
    peft = pytest.importorskip("peft")
    from transformers.models.llama.modeling_llama import LlamaMLP

    config: Any = SimpleNamespace(hidden_size=20, intermediate_size=33, mlp_bias=False, hidden_act="silu")
    model = peft.get_peft_model(
        nn.Sequential(LlamaMLP(config)),
        peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["gate_proj", "up_proj", "down_proj"]),
    )
    case = problem(shape=(64,), out=20)
    of = as_parameters(case)
    assert saved_bytes(lambda: fused(of, case, 0.1)) < 0.75 * saved_bytes(lambda: model(of["x"]))


def test_what_is_left_to_eager_pytorch_is_the_same(fused_calls):
    case = problem(dtype=FP64)
    of = case.tensors
    gate, up, down = (MLP.layer(of, case, name) for name in ("gate", "up", "down"))
    got = lora_mlp(of["x"], gate, up, down._replace(adapters=[]), "silu")
    torch.testing.assert_close(got, eager(of | {"B.down": of["B.down"] * 0}, case))
    trained = of["weight.down"].requires_grad_()
    fused(of, case).sum().backward()
    assert trained.grad is not None
    with path("composed"):
        fused(of, case)
    assert fused_calls == []


def test_autocast_is_left_to_eager_pytorch(fused_calls):
    case = problem()
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(case.tensors, case)
    assert got.dtype == torch.bfloat16 and fused_calls == []
    torch.testing.assert_close(got.float(), eager(case.tensors, case), rtol=0.05, atol=0.1)


def test_torch_func_is_left_to_eager_pytorch(fused_calls):
    case = problem(dtype=FP64)
    loss = lambda x: fused(case.tensors | {"x": x}, case).sum()  # noqa: E731
    got, x = torch.func.grad(loss)(case.tensors["x"]), case.tensors["x"].clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(loss(x), x)[0])
    assert len(fused_calls) == 1  # the second one's


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "tanh"}, "activation: got 'tanh', want one of silu, gelu, gelu_tanh, relu"),
        ({"up": GroupLayer(torch.randn(34, 20), [])}, "gate and up: got"),
        (
            {"down": GroupLayer(torch.randn(18, 34), [Adapter(torch.randn(2, 34), torch.randn(18, 2), 1.0)])},
            "shapes",
        ),
    ],
)
def test_errors_say_what_is_wanted(change, message):
    case = problem()
    arguments = {name: MLP.layer(case.tensors, case, name) for name in ("gate", "up", "down")} | change
    with pytest.raises(ValueError, match=message):
        lora_mlp(case.tensors["x"], **arguments)


class TestMlp(contracts.Mlp):
    places = contracts.ATEN[:1]  # small ones are eager PyTorch's own
    dtypes = contracts.Mlp.dtypes[:3]
