# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""`lora_mlp` against fp64, for every activation; what it saves; where it leaves the work to eager PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import contracts
import pytest
import torch
import torch.nn.functional as F
from problems import path, spied_mlps
from torch import Tensor

from fastlora.functional import Adapter, GroupLayer, lora_activated_linear, lora_mlp
from fastlora.ops import reference
from fastlora.ops.mlp import mlp as mlp_op

EAGER = {
    "silu": lambda t: t * torch.sigmoid(t) if t.dtype == torch.float64 else F.silu(t),
    "gelu": lambda t: 0.5 * t * (1 + torch.erf(t / 2**0.5)) if t.dtype == torch.float64 else F.gelu(t),
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": lambda t: t.clamp_min(0.0),
}
K, N, OUT, R = 20, 33, 18, 4
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def fused_at_every_size():
    with path("function"):
        yield


@pytest.fixture
def fused_calls(monkeypatch):
    return spied_mlps(monkeypatch)


def tensors(gated=True, dtype=FP32, adapter_dtype=None, bias=True, shape=(3, 7)) -> dict[str, Any]:
    """x, and of each layer the weight, bias, lora_A and lora_B, by name."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size, scale=1.0, of=dtype):
        return (torch.randn(size, generator=generator, dtype=FP64) * scale).to(of)

    found = {"x": randn(*shape, K), "dy": randn(*shape, OUT)}
    for name, n, k in (("gate", N, K), ("up", N, K), ("down", OUT, N)):
        if name == "up" and not gated:
            continue
        found[f"{name}.weight"] = randn(n, k, scale=k**-0.5)
        found[f"{name}.bias"] = randn(n) if bias else None
        found[f"{name}.lora_A"] = randn(R, k, scale=k**-0.5, of=adapter_dtype or dtype)
        found[f"{name}.lora_B"] = randn(n, R, scale=R**-0.5, of=adapter_dtype or dtype)
    return found


def layer(of: dict, name: str, dropout_p: float = 0.0) -> GroupLayer | None:
    if f"{name}.weight" not in of:
        return None
    adapter = Adapter(of[f"{name}.lora_A"], of[f"{name}.lora_B"], 1.5, dropout_p)
    return GroupLayer(of[f"{name}.weight"], [adapter], of[f"{name}.bias"])


def fused(of, activation, dropout_p=0.0, **options):
    gate, up, down = (layer(of, name, dropout_p) for name in ("gate", "up", "down"))
    assert gate is not None and down is not None
    return lora_mlp(of["x"], gate, up, down, activation, **options)


def eager(of, activation, masks=None):
    masks = masks or {}

    def run(x, name):
        parts = [of[f"{name}.{part}"] for part in ("weight", "lora_A", "lora_B")]
        p = 0.25 if masks else 0.0
        return reference.lora_linear(x, *parts, 1.5, of[f"{name}.bias"], p, masks.get(name))

    h = EAGER[activation](run(of["x"], "gate"))
    return run(h * run(of["x"], "up") if "up.weight" in of else h, "down")


def outcome(function, of, activation, trained=None, **options) -> dict[str, Tensor]:
    """The output, and the gradient of each trained tensor."""
    trained = trained if trained is not None else [name for name in of if "lora" in name] + ["x"]
    leaves = {n: None if t is None else t.detach().clone().requires_grad_(n in trained) for n, t in of.items()}
    torch.manual_seed(5)
    y = function(leaves, activation, **options)
    grads = torch.autograd.grad(y, [leaves[name] for name in trained], of["dy"]) if trained else ()
    return {"y": y.detach(), **dict(zip(trained, grads, strict=True))}


ACTIVATIONS = pytest.mark.parametrize("activation", mlp_op.ACTIVATIONS)
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


@ACTIVATIONS
@GATED
def test_gradients_are_the_functions_own(activation, gated):
    of = tensors(gated, FP64, shape=(3,))
    names = [name for name in of if "lora" in name] + ["x", "down.bias"]
    leaves = [of[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *_: fused(of, activation), leaves, fast_mode=True)


def test_dropout_is_off_outside_training():
    of = tensors()
    assert torch.equal(fused(of, "gelu", 0.5, training=False), fused(of, "gelu"))


def test_noncontiguous_gate_and_up():
    of = tensors(dtype=FP64)
    down = layer(of, "down")
    assert down is not None
    gate, up = (torch.randn(N, 6, 2, dtype=FP64).transpose(0, 2).requires_grad_() for _ in range(2))
    y = lora_activated_linear(gate, up, down, "gelu")
    got = torch.autograd.grad(y.square().sum(), (gate, up))
    plain = reference.lora_linear(F.gelu(gate) * up, down.weight, *down.adapters[0][:3], down.bias)
    torch.testing.assert_close((y, *got), (plain, *torch.autograd.grad(plain.square().sum(), (gate, up))))


def saved_bytes(function) -> int:
    """Bytes of distinct memory kept for the backward pass, parameters left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
        assert y.requires_grad
    return sum(kept.values())


def as_parameters(of):
    return {
        name: torch.nn.Parameter(t, requires_grad="lora" in name) if t is not None and "." in name else t
        for name, t in of.items()
    }


@ACTIVATIONS
@GATED
def test_saves_gate_up_x_and_s_and_eager_more(activation, gated):
    of = as_parameters(tensors(gated, shape=(64,), bias=False))
    of["x"].requires_grad_()
    rows, size = 64, 4
    layers = 3 if gated else 2
    want = rows * size * (K + (layers - 1) * N + layers * R)
    assert saved_bytes(lambda: fused(of, activation)) == want
    relu_keeps_its_result_only = activation == "relu"
    more = rows * size * N * (2 if gated and not relu_keeps_its_result_only else 1)
    assert saved_bytes(lambda: eager(of, activation)) >= want + more - relu_keeps_its_result_only * rows * size * N


def test_saves_less_than_peft():
    peft = pytest.importorskip("peft")
    from transformers.models.llama.modeling_llama import LlamaMLP

    config: Any = SimpleNamespace(hidden_size=K, intermediate_size=N, mlp_bias=False, hidden_act="silu")
    model = peft.get_peft_model(
        torch.nn.Sequential(LlamaMLP(config)),
        peft.LoraConfig(r=R, lora_dropout=0.1, target_modules=["gate_proj", "up_proj", "down_proj"]),
    )
    x = torch.randn(64, K, requires_grad=True)
    of = as_parameters(tensors(shape=(64,), bias=False)) | {"x": x}
    assert saved_bytes(lambda: fused(of, "silu", 0.1)) < 0.75 * saved_bytes(lambda: model(x))


def test_what_is_left_to_eager_pytorch_is_the_same(fused_calls):
    of = tensors(dtype=FP64)
    gate, up, down = (layer(of, name) for name in ("gate", "up", "down"))
    assert gate is not None and down is not None
    bare = down._replace(adapters=[])
    got = lora_mlp(of["x"], gate, up, bare, "silu")
    torch.testing.assert_close(got, eager(of | {"down.lora_B": of["down.lora_B"] * 0}, "silu"))
    trained = of["down.weight"].requires_grad_()
    fused(of, "silu").sum().backward()
    assert trained.grad is not None
    with path("composed"):
        fused(of, "silu")
    assert fused_calls == []


def test_autocast_is_left_to_eager_pytorch(fused_calls):
    of = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(of, "silu")
    assert got.dtype == torch.bfloat16 and fused_calls == []
    torch.testing.assert_close(got.float(), eager(of, "silu"), rtol=0.05, atol=0.1)


def test_torch_func_is_left_to_eager_pytorch(fused_calls):
    of = tensors(dtype=FP64)

    def loss(x):
        return fused(of | {"x": x}, "silu").sum()

    got = torch.func.grad(loss)(of["x"])
    torch.testing.assert_close(got, outcome(fused, of | {"dy": torch.ones_like(of["dy"])}, "silu")["x"])
    assert len(fused_calls) == 1  # the second one's


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "tanh"}, "activation: got 'tanh', want one of silu, gelu, gelu_tanh, relu"),
        ({"up": GroupLayer(torch.randn(N + 1, K), [])}, "gate and up: got"),
        (
            {"down": GroupLayer(torch.randn(OUT, N + 1), [Adapter(torch.randn(2, N + 1), torch.randn(OUT, 2), 1.0)])},
            "shapes",
        ),
    ],
)
def test_errors_say_what_is_wanted(change, message):
    of = tensors()
    arguments = {name: layer(of, name) for name in ("gate", "up", "down")} | change
    with pytest.raises(ValueError, match=message):
        lora_mlp(of["x"], **arguments)


class TestMlp(contracts.Mlp):
    places = contracts.ATEN[:1]  # small ones are eager PyTorch's own
    dtypes = contracts.Mlp.dtypes[:3]
