"""`FusedLoraLinear`: construction, named adapters, merging without drift, copies, pickles, state_dict."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import FusedLoraLinear

K, N = 24, 40
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

KINDS = {"lora": {}, "dora": {"use_dora": True}, "adalora": {"use_adalora": True}}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def layer(kind: str = "lora", **settings) -> FusedLoraLinear:
    """A layer whose adapter changes the output."""
    torch.manual_seed(0)
    made = FusedLoraLinear(K, N, **KINDS[kind], **settings)
    randomise(made)
    return made


def randomise(module: nn.Module, scale: float = 0.2) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.normal_(std=scale if "lora_E" not in name else 1.0)


def spelled_out(made: FusedLoraLinear, x: Tensor, names: list[str] | None = None) -> Tensor:
    """What the layer's attributes say it computes, without dropout."""
    weight = made.weight.t() if made.fan_in_fan_out else made.weight
    y = F.linear(x, weight, made.bias)
    for name in made.active_adapters if names is None else names:
        a = made.lora_A[name] * made.lora_E[name] if name in made.lora_E else made.lora_A[name]
        delta = made.scaling[name] * made.lora_B[name] @ a
        if name in made.lora_magnitude_vector:
            whole = weight + delta
            delta = (made.lora_magnitude_vector[name] / whole.detach().norm(dim=1))[:, None] * whole - weight
        y = y + x @ delta.t()
    return y


# Construction.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_layer_is_the_base_layer(bias, dtype):
    made = FusedLoraLinear(K, N, r=4, bias=bias, dtype=dtype)
    assert isinstance(made, nn.Linear) and (made.in_features, made.out_features) == (K, N)
    assert {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in made.named_parameters()} == {
        "weight": ((N, K), dtype, False),
        **({"bias": ((N,), dtype, False)} if bias else {}),
        "lora_A.default": ((4, K), dtype, True),
        "lora_B.default": ((N, 4), dtype, True),
    }
    assert made.active_adapters == ["default"]
    assert made.lora_A["default"].any() and not made.lora_B["default"].any()
    x = torch.randn(3, K, dtype=dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias), rtol=eps, atol=eps)


def test_initial_values_are_torch_s_and_kaiming_s():
    torch.manual_seed(0)  # of 30 biases none may come near the bound
    made = FusedLoraLinear(K, N, r=200)
    bound = 1 / math.sqrt(K)  # Kaiming-uniform with a = √5, as for the weight of an nn.Linear
    for values in (made.lora_A["default"], made.weight, made.bias):
        assert 0.9 * bound < values.abs().max() <= bound
    made.reset_adapter("default", "gaussian")
    assert abs(made.lora_A["default"].std().item() * 200 - 1) < 0.1 and not made.lora_B["default"].any()
    made.reset_adapter("default", False)
    assert made.lora_B["default"].abs().max() <= 1 / math.sqrt(200) and made.lora_B["default"].any()


@pytest.mark.parametrize("use_rslora, scaling", [(False, 32 / 4), (True, 32 / 2)])
def test_scaling(use_rslora, scaling):
    made = layer(r=4, lora_alpha=32, use_rslora=use_rslora)
    assert made.scaling == {"default": scaling}
    x = torch.randn(5, K)
    torch.testing.assert_close(made(x), spelled_out(made, x))
    made.scaling["default"] = -1.0  # a run-time number
    torch.testing.assert_close(made(x), spelled_out(made, x))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_from_linear_shares_and_freezes(dtype):
    linear = nn.Linear(K, N, dtype=dtype).eval()
    made = FusedLoraLinear.from_linear(linear, r=3, lora_alpha=6, lora_dropout=0.1, use_rslora=True)
    assert made.weight is linear.weight and made.bias is linear.bias and not made.weight.requires_grad
    assert not made.training
    assert made.lora_A["default"].dtype == (dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    assert (made.r, made.lora_alpha, made.lora_dropout) == ({"default": 3}, {"default": 6}, {"default": 0.1})
    assert made.scaling["default"] == 6 / math.sqrt(3)
    x = torch.randn(2, K, dtype=dtype)
    assert made(x).dtype == dtype
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    other = FusedLoraLinear.from_linear(linear, adapter_dtype=torch.bfloat16)
    assert other.lora_A["default"].dtype == torch.bfloat16


# Adapters.


@EVERY_KIND
def test_adapters_by_name(kind):
    made = layer(kind, r=4)
    made.add_adapter("second", r=2, lora_alpha=3, lora_dropout=0.5, init_lora_weights=False, **KINDS[kind])
    assert made.active_adapters == ["default"]

    def trained() -> set[str]:
        return {name.rpartition(".")[2] for name, parameter in made.named_parameters() if parameter.requires_grad}

    assert trained() == {"default"}
    extra = {"dora": "lora_magnitude_vector", "adalora": "lora_E"}
    factors = ["lora_A", "lora_B", *([extra[kind]] if kind in extra else [])]
    same = zip(made.trained_parameters("default"), factors, strict=True)
    assert all(parameter is getattr(made, factor)["default"] for parameter, factor in same)
    randomise(made)
    made.eval()
    x = torch.randn(6, K)
    torch.testing.assert_close(made(x), spelled_out(made, x, ["default"]))
    made.set_adapter("second")
    assert trained() == {"second"}
    torch.testing.assert_close(made(x), spelled_out(made, x, ["second"]))
    made.set_adapter(["default", "second", "default"])
    assert made.active_adapters == ["default", "second"]
    torch.testing.assert_close(made(x), spelled_out(made, x, ["default", "second"]))
    made.set_adapter([])
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    made.add_adapter("third")
    assert made.active_adapters == []  # not the layer's first
    made.set_adapter(["default", "second"])
    made.delete_adapter("default")
    assert made.active_adapters == ["second"] and list(made.lora_A) == list(made.lora_B) == ["second", "third"]
    assert kind not in extra or list(getattr(made, extra[kind])) == ["second"]
    assert all("default" not in state for state in (made.r, made.scaling, made.lora_alpha, made.lora_dropout))
    torch.testing.assert_close(made(x), spelled_out(made, x, ["second"]))


def test_dropout_only_in_training():
    made = layer(lora_dropout=0.5)
    x = torch.randn(6, K)
    assert not torch.equal(made(x), made(x))
    made.eval()
    torch.testing.assert_close(made(x), spelled_out(made, x))
    made.train()
    made.lora_dropout["default"] = 0.0
    torch.testing.assert_close(made(x), spelled_out(made, x))


def test_disabling():
    made = layer()
    x = torch.randn(6, K)
    made.disable_adapters = True
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    made.disable_adapters = False
    torch.testing.assert_close(made(x), spelled_out(made, x))
    with pytest.raises(ValueError, match=r"init_lora_weights: got .loftq., which quantises the base model"):
        made.add_adapter("more", init_lora_weights="loftq")


@pytest.mark.parametrize("name", ["a b", "été", "weight", "0", "lora_A", "T", "x" * 200, "-1", "class"])
def test_names_that_can(name):
    made = layer()
    made.add_adapter(name, r=2)
    made.set_adapter(name)
    randomise(made)
    x = torch.randn(3, K)
    torch.testing.assert_close(made(x), spelled_out(made, x, [name]))
    other = FusedLoraLinear(K, N)
    other.add_adapter(name, r=2)
    other.load_state_dict(made.state_dict())
    other.set_adapter(name)
    assert torch.equal(other(x), made(x))


def test_reset_parameters_starts_anew():
    made = layer()
    before = made.weight.clone()
    made.reset_parameters()
    assert not torch.equal(made.weight, before) and not made.lora_B["default"].any()


def test_extra_repr():
    made = layer(r=4, lora_alpha=6, lora_dropout=0.1)
    made.add_adapter("second", r=2)
    assert repr(made).startswith(
        f"FusedLoraLinear(\n  in_features={K}, out_features={N}, bias=True, "
        "default: r=4, scaling=1.5, dropout=0.1, second (inactive): r=2, scaling=8"
    )
    made.merge()
    assert "merged=['default']" in repr(made)


# Merging.


def test_while_merged():
    made = layer()
    made.add_adapter("second")
    made.merge()
    merged = made.weight.clone()
    for refused in (made.merge, lambda: made.set_adapter("second"), lambda: made.delete_adapter("default")):
        with pytest.raises(ValueError, match=r"merged.*call fastlora.unmerge\(model\) first"):
            refused()
    assert torch.equal(made.weight, merged) and list(made.lora_A) == ["default", "second"]
    made.delete_adapter("second")
    x = torch.randn(3, K)
    made.disable_adapters = True  # the base model's output, so the weight is unmerged for it
    y = made(x)
    assert made.merged_adapters == []
    assert torch.equal(y, F.linear(x, made.weight, made.bias)) and not torch.equal(made.weight, merged)


def test_merging_nothing_does_nothing():
    made = layer()
    made.set_adapter([])
    bits = made.weight.clone()
    made.merge()
    assert torch.equal(made.weight, bits) and made.merged_adapters == []


def test_merging_between_a_forward_and_its_backward_is_noticed():
    """dX needs the weight as it was."""
    made = layer()
    x = torch.randn(3, K, requires_grad=True)
    y = made(x)
    made.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merging_in_inference_mode_and_training_afterwards():
    made = layer()
    bits = made.weight.clone()
    with torch.inference_mode():
        made.merge()
        made(torch.randn(3, K))
    made.unmerge()
    assert torch.equal(made.weight, bits)
    made(torch.randn(3, K, requires_grad=True)).sum().backward()
    assert made.lora_A["default"].grad is not None


def test_get_delta_weight():
    made = layer(r=4, lora_alpha=6, dtype=torch.float64)
    want = 1.5 * made.lora_B["default"] @ made.lora_A["default"]
    assert made.get_delta_weight("default").dtype == torch.float64
    torch.testing.assert_close(made.get_delta_weight("default"), want.detach())
    half = made.to(torch.bfloat16)
    assert half.get_delta_weight("default").dtype == torch.float32


# Conv1D, whose weight is (in, out).


@EVERY_KIND
def test_conv1d_layout(kind):
    conv = Conv1D(N, K)
    nn.init.normal_(conv.bias)
    weight = conv.weight
    fastlora.patch(conv, **KINDS[kind])
    randomise(conv)
    assert isinstance(conv, FusedLoraLinear) and conv.fan_in_fan_out and conv.weight is weight
    assert conv.lora_A["default"].shape == (8, K) and conv.lora_B["default"].shape == (N, 8)
    x = torch.randn(2, 5, K, requires_grad=True)
    y, want = conv(x), spelled_out(conv, x)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    leaves = [x, *conv.trained_parameters("default")]
    got, expected = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    bits = weight.detach().clone()
    assert conv.get_delta_weight("default").shape == weight.shape
    conv.merge()
    torch.testing.assert_close(conv(x), y, rtol=1e-5, atol=1e-5)
    assert not torch.equal(conv.weight, bits)
    conv.unmerge()
    assert torch.equal(conv.weight, bits)


# What modules do.


def duplicates(made: FusedLoraLinear) -> list[FusedLoraLinear]:
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    return [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(buffer, weights_only=False)]


@EVERY_KIND
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("patched", [False, True])
def test_copies_live_their_own_lives(patched, merged, kind):
    made: Any = layer(kind, r=4, lora_dropout=0.25)
    if patched:
        made = nn.Linear(K, N)
        fastlora.patch(made, r=4, lora_dropout=0.25, **KINDS[kind])
    made.add_adapter("second", r=2, **KINDS[kind])
    made.set_adapter(["default", "second"])
    randomise(made)
    made.eval()
    x = torch.randn(3, K)
    unmerged, bits = made(x), made.weight.clone()
    if merged:
        made.merge()
    y = made(x)
    for twin in duplicates(made):
        assert type(twin) is FusedLoraLinear and torch.equal(twin(x), y)
        assert repr(twin) == repr(made)
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in made.parameters()]
        twin.unmerge()
        assert torch.equal(twin(x), unmerged)
        randomise(twin)
        twin.scaling["default"] = 7.0
        twin.set_adapter("second")
        assert torch.equal(made(x), y)
        if patched:
            fastlora.unpatch(twin)
            assert type(twin) is nn.Linear and torch.equal(twin(x), F.linear(x, bits, made.bias))


@EVERY_KIND
def test_state_dict_keys_and_round_trip(kind):
    made = layer(kind, r=4)
    made.add_adapter("second", r=2, **KINDS[kind])
    state = made.state_dict()
    factors = ("lora_A", "lora_B", *{"dora": ["lora_magnitude_vector"], "adalora": ["lora_E"]}.get(kind, ()))
    assert set(state) == {"weight", "bias", *(f"{f}.{name}" for f in factors for name in ("default", "second"))}
    other = FusedLoraLinear(K, N, r=4, **KINDS[kind])
    other.add_adapter("second", r=2, **KINDS[kind])
    other.load_state_dict(state)
    x = torch.randn(3, K)
    assert torch.equal(other(x), made(x))
    assert nn.Linear(K, N).load_state_dict(state, strict=False).missing_keys == []
    missing = other.load_state_dict(nn.Linear(K, N).state_dict(), strict=False).missing_keys
    assert set(missing) == {key for key in state if key.startswith("lora_")}
    with pytest.raises(RuntimeError, match="size mismatch"):
        FusedLoraLinear(K, N, r=8, **KINDS[kind]).load_state_dict(state, strict=False)


def test_a_merged_layer_takes_no_other_weight():
    """`unmerge` would put the former one back."""
    made, other = layer(r=4), layer(r=4)
    with torch.no_grad():
        other.weight.mul_(2.0)
    made.merge()
    bits = made.weight.clone()
    with pytest.raises(
        ValueError, match=r"weight: adapters \['default'\] are merged .* call fastlora.unmerge\(model\)"
    ):
        made.load_state_dict(other.state_dict())
    assert torch.equal(made.weight, bits)
    made.load_state_dict({key: value for key, value in other.state_dict().items() if "lora" in key}, strict=False)
    made.unmerge()
    made.load_state_dict(other.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(made(x), other(x))


def test_state_dict_assigned_to_a_layer_on_the_meta_device():
    made = layer(r=4)
    other = FusedLoraLinear(K, N, r=4, device="meta")
    assert all(p.is_meta for p in other.parameters())
    assert other(torch.randn(3, K, device="meta")).shape == (3, N)
    other.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, K)
    assert torch.equal(other(x), made(x))


def test_delta_weight_is_float32_within_autocast() -> None:
    layer = FusedLoraLinear(24, 20, r=4)
    layer.reset_adapter("default", init_lora_weights=False)
    expected = layer.get_delta_weight("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = layer.get_delta_weight("default")
    assert delta.dtype == torch.float32
    assert torch.equal(delta, expected)
