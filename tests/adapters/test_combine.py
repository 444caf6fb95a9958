"""Adapters out of others, against the weighted sum of their deltas in fp64; and switching between tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from bench.harness.memory import allocations_of
from fastlora.adapters import combine

K, N = 24, 20


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N, dtype=dtype), nn.Linear(N, K, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def model_of(dtype: torch.dtype = torch.float64, **third: Any) -> Any:
    """Three tasks: "a", "b" with another rank and rsLoRA, and "c" in one layer alone."""
    model: Any = Net(dtype)
    fastlora.patch(model, r=3, lora_alpha=6, adapter_name="a")
    fastlora.patch(model, r=2, lora_alpha=3, use_rslora=True, adapter_name="b")
    fastlora.patch(model, r=4, adapter_name="c", target_modules=["up"], **third)
    with torch.no_grad():
        for layer in (model.up, model.down):
            for name in layer.lora_B:
                layer.lora_B[name].normal_()
    return model


def deltas(model: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    """Σ wᵢ·ΔWᵢ by layer."""
    layers = {"up": model.up, "down": model.down}
    return {
        name: torch.stack([weight * layer.get_delta_weight(a) for a, weight in weights.items() if a in layer.r]).sum(0)
        for name, layer in layers.items()
    }


WEIGHTS = {"a": 0.7, "b": -0.25, "c": 2.0}


def test_the_sum_itself():
    model = model_of()
    want = deltas(model, WEIGHTS)
    found = fastlora.add_weighted_adapter(model, WEIGHTS, "mix")
    assert found == {"up": (9, 1.0), "down": (5, 1.0)}
    for name, layer in (("up", model.up), ("down", model.down)):
        torch.testing.assert_close(layer.get_delta_weight("mix"), want[name])
        assert layer.active_adapters == ["a"]
        assert not layer.lora_A["mix"].requires_grad
    x = torch.randn(5, K, dtype=torch.float64)
    fastlora.set_adapter(model, "mix")
    base = Net()
    torch.testing.assert_close(
        model(x),
        torch.tanh(x @ (base.up.weight + want["up"]).t() + base.up.bias) @ (base.down.weight + want["down"]).t(),
    )


@pytest.mark.parametrize("r", [1, 3, 5, 100])
def test_the_best_of_a_rank(r):
    """As far from the sum as Eckart and Young's bound, and what is captured is told."""
    model = model_of()
    want = deltas(model, WEIGHTS)
    found = fastlora.add_weighted_adapter(model, WEIGHTS, "mix", r=r)
    for name, layer, most in (("up", model.up, 9), ("down", model.down, 5)):
        assert found[name].r == layer.r["mix"] == min(r, most)
        values = torch.linalg.svdvals(want[name]).square()
        error = (layer.get_delta_weight("mix") - want[name]).square().sum()
        torch.testing.assert_close(error, values[r:].sum(), rtol=1e-8, atol=1e-10)
        assert found[name].captured == pytest.approx(float(values[:r].sum() / values.sum()), rel=1e-10)


def test_a_rank_above_the_layers_sides():
    """More ranks together than the layer has: still exact."""
    model = model_of()
    fastlora.patch(model, r=19, adapter_name="wide")
    with torch.no_grad():
        model.up.lora_B["wide"].normal_()
        model.down.lora_B["wide"].normal_()
    want = deltas(model, {"a": 1.0, "wide": 1.0})
    found = fastlora.add_weighted_adapter(model, {"a": 1.0, "wide": 1.0}, "mix", r=64)
    assert {name: one.r for name, one in found.items()} == {"up": 20, "down": 20}
    torch.testing.assert_close(model.up.get_delta_weight("mix"), want["up"])
    assert found["up"].captured == pytest.approx(1.0)


def test_recompressing_one_adapter():
    """One weight of 1: the adapter itself, at a lower rank."""
    model = model_of()
    fastlora.add_weighted_adapter(model, {"a": 1.0}, "small", r=2)
    u, s, vh = torch.linalg.svd(model.up.get_delta_weight("a"))
    torch.testing.assert_close(model.up.get_delta_weight("small"), u[:, :2] * s[:2] @ vh[:2])


def test_zero_deltas():
    model = model_of()
    found = fastlora.add_weighted_adapter(model, {"a": 0.0}, "none", r=2)
    assert found["up"] == (2, 1.0)
    assert not model.up.get_delta_weight("none").any()


def test_half_precision_and_a_changed_scale():
    model = model_of(torch.bfloat16)
    model.up.scaling["a"] = 5.0
    want = deltas(model, WEIGHTS)
    fastlora.add_weighted_adapter(model, WEIGHTS, "mix", r=6)
    assert model.up.lora_A["mix"].dtype == torch.float32
    u, s, vh = torch.linalg.svd(want["up"].double())
    torch.testing.assert_close(
        model.up.get_delta_weight("mix").double(), u[:, :6] * s[:6] @ vh[:6], rtol=1e-4, atol=1e-5
    )


def test_starts_away_from_zero_and_adalora_go_in_as_they_run():
    model = model_of(use_adalora=True)
    with torch.no_grad():
        model.up.lora_E["c"].normal_()
    a, b = torch.randn(3, K, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    model.up.set_initial_factors("a", a, b)
    with torch.no_grad():
        model.up.lora_B["a"].mul_(1.5)
    want = deltas(model, WEIGHTS)
    found = fastlora.add_weighted_adapter(model, WEIGHTS, "mix")
    assert found["up"].r == 6 + 2 + 4
    torch.testing.assert_close(model.up.get_delta_weight("mix"), want["up"])


def test_nothing_of_the_weights_size_is_made():
    layer = fastlora.FusedLoraLinear(1024, 1024, r=4)
    layer.add_adapter("b", r=4)
    model = nn.Sequential(layer)
    _, allocations = allocations_of(
        lambda: fastlora.add_weighted_adapter(model, {"default": 1.0, "b": 1.0}, "mix", r=4)
    )
    assert max(allocations.sizes) < 1024 * 1024 * 4 / 8


def test_the_saved_file_is_an_ordinary_adapter(tmp_path):
    model = model_of(torch.float32)
    fastlora.add_weighted_adapter(model, WEIGHTS, "mix", r=4)
    fastlora.set_adapter(model, "mix")
    fastlora.save_adapter(model, tmp_path, "mix")
    again: Any = Net(torch.float32)
    fastlora.load_adapter(again, tmp_path)
    x = torch.randn(5, K)
    torch.testing.assert_close(again(x), model(x))
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Net(torch.float32), str(tmp_path))(x), model(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({"x": 1.0}, "mix"), r"weights: got 'x', want some of \['a', 'b', 'c'\]"),
        (({}, "mix"), "want a dict of adapter names and weights"),
        ((["a"], "mix"), "want a dict of adapter names and weights"),
        (({"a": float("nan")}, "mix"), "weights: got nan for 'a', want a finite number"),
        (({"a": 1.0}, "b"), "adapter_name: 'b' is taken"),
        (({"a": 1.0}, "x.y"), "adapter_name: got 'x.y'"),
        (({"a": 1.0}, "mix", 0), "r: got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    model = model_of()
    with pytest.raises(ValueError, match=message):
        fastlora.add_weighted_adapter(model, *arguments)
    assert list(model.up.r) == ["a", "b", "c"]


def test_models_that_cannot():
    model = model_of(use_dora=True)
    with pytest.raises(ValueError, match="'c' is DoRA"):
        fastlora.add_weighted_adapter(model, {"a": 1.0, "c": 1.0}, "mix")
    fastlora.merge(model)
    with pytest.raises(ValueError, match="merged into 'up'"):
        fastlora.add_weighted_adapter(model, {"a": 1.0}, "mix")
    with pytest.raises(ValueError, match="has no LoRA layers"):
        fastlora.add_weighted_adapter(Net(), {"a": 1.0}, "mix")
    model = Net()
    fastlora.patch(model, r=2, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'default' has shifted the weight"):
        fastlora.add_weighted_adapter(model, {"default": 1.0}, "mix")
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="is PEFT's layer"):
        fastlora.add_weighted_adapter(model, {"default": 1.0}, "mix")


def test_undone_where_it_fails_half_way(monkeypatch):
    model = model_of()
    calls = []
    original = combine.truncated

    def second_fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(combine, "truncated", second_fails)
    with pytest.raises(KeyboardInterrupt):
        fastlora.add_weighted_adapter(model, WEIGHTS, "mix", r=2)
    assert "mix" not in model.up.r
    assert "mix" not in model.down.r
    assert all("mix" not in name for name, _ in model.named_parameters())


# Switching.
def test_switching_touches_no_weight():
    """Not a bit, not a version, and no other adapter's flag but those of the two."""
    model = model_of()
    x = torch.randn(5, K, dtype=torch.float64)
    outputs = {}
    for name in ("a", "b", "c"):
        fastlora.set_adapter(model, name)
        outputs[name] = model(x).detach()
    versions = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    for name in ("c", "a", "b", "a"):
        fastlora.set_adapter(model, name)
        assert torch.equal(model(x), outputs[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if n.endswith(f".{name}")}
    assert versions == {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    fastlora.set_adapter(model, "c", trainable=False)
    assert torch.equal(model(x), outputs["c"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    model.requires_grad_(True)  # by hand: the others are frozen again all the same
    fastlora.set_adapter(model, "b")
    assert not model.up.lora_A["a"].requires_grad


def test_peft_layers_are_switched_too():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(Net(torch.float32), config)
    model.add_adapter("second", config)
    fastlora.patch(model)
    x, flags = torch.randn(5, K), {name: p.requires_grad for name, p in model.named_parameters()}
    first = model(x)
    fastlora.set_adapter(model, "second", trainable=False)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    second = model(x)
    assert not torch.equal(first, second)
    fastlora.set_adapter(model, "second")
    assert torch.equal(model(x), second)
    assert model.base_model.model.up.lora_A["second"].weight.requires_grad
    assert not model.base_model.model.up.lora_A["default"].weight.requires_grad
