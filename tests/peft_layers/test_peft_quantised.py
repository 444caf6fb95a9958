"""PEFT models on quantised bases: patched against the same model unpatched, and both against fp64."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64
from peft.tuners.lora import bnb as peft_bnb
from quantised_models import qlora, quantise, quantised_model
from tiny_models import tiny_batch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastlora
from bench.harness.memory import allocations_of
from fastlora.integrations.peft import adopt as peft_adopt
from fastlora.integrations.peft.bnb import FusedLinear4bit, FusedLinear8bitLt
from fastlora.integrations.peft.quantised import INFERENCE, FusedQuantisedLayer
from fastlora.ops import reference
from fastlora.ops.quant import weights

BITS = pytest.mark.parametrize("bits", [4, 8])
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT4: Any = getattr(torch, "int4", None)  # torch's own type stubs do not know it
K, N, R = 128, 192, 8


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(K, N, bias=bias)
        self.down = nn.Linear(N, K, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def lora(model: Any, seed: int = 0, **config: Any) -> Any:
    """Under PEFT, with adapters that are not zero."""
    torch.manual_seed(seed)
    settings = {"r": R, "lora_alpha": 16, "target_modules": ["up", "down"], "init_lora_weights": False, **config}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def model_of(kind: str, dtype: torch.dtype = FP32, bias: bool = True, **config: Any) -> Any:
    torch.manual_seed(0)
    model = Mlp(bias)
    if kind.startswith("torchao"):
        torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is optional")
        group = torchao.PerGroup(32)
        int4 = torchao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=group)
        torchao.quantize_(model.to(dtype), torchao.Int8WeightOnlyConfig() if kind == "torchao8" else int4)
        return lora(model, **config)
    options = {"bnb4fp4": {"quant_type": "fp4", "compress_statistics": False}}.get(kind, {})
    return lora(quantise(model, int(kind[3]), dtype, **options), **config)


def patched_copy(model: Any) -> Any:
    model = copy.deepcopy(model)
    assert len(fastlora.patch(model).patched) == len(layers_of(model))
    return model


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def fused_calls(model: nn.Module) -> list[int]:
    return [layer.calls.fused for layer in layers_of(model)]


def run(model: Any, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Output and gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_agree(plain: Any, fused: Any, x: Tensor, tolerance: float = 1e-5) -> None:
    want, got = run(plain, x), run(fused, x)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        if tensor.numel() == 0:
            continue
        error = (got[name].double() - tensor.double()).abs().max() / tensor.double().abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


KINDS = ("bnb4", "bnb4fp4", "bnb8", "torchao8", "torchao4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_outputs_and_gradients_in_fp32(kind, dropout):
    model = model_of(kind, lora_dropout=dropout)
    fused = patched_copy(model)
    x = torch.randn(2, 5, K)
    assert_agree(model, fused, x)
    assert fused_calls(fused) == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, FP32), (BF16, BF16), (FP16, FP32)], ids=str)
def test_at_most_twice_pefts_error(kind, dropout, dtype, adapter_dtype):
    """One layer, its output and every gradient, against fp64 with the weight that the quantised one stands for.

    Beside fp32 adapters, eager is the specification in the layer's dtype, which is what PEFT does under autocast;
    without it PEFT's low-rank path is fp32 throughout.
    """
    model = model_of(kind, dtype, lora_dropout=dropout)
    plain = model.base_model.model.up
    for part in (plain.lora_A, plain.lora_B):
        part.to(adapter_dtype)
    fused = patched_copy(model).base_model.model.up
    torch.manual_seed(2)
    x, dy = torch.randn(64, K).to(dtype), torch.randn(64, N).to(dtype)

    def gradients(layer: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = layer(leaf)
        parameters = [leaf, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return [y.detach(), *torch.autograd.grad(y, parameters, dy)]

    got, eager = gradients(fused), gradients(plain)
    assert fused.calls.fused == 1
    weight = weights.dequantised(plain.base_layer, dtype).double()
    down, up = (part["default"].weight.detach() for part in (plain.lora_A, plain.lora_B))
    torch.manual_seed(3)
    keep = F.dropout(torch.ones_like(x), dropout) != 0 if dropout else None
    bias = plain.base_layer.bias.detach().double()

    def specified(tensors: list[Tensor], base: tuple[Tensor, Tensor], upstream: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = reference.lora_linear(leaves[0], base[0], leaves[1], leaves[2], 2.0, base[1], dropout, keep)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    wanted = specified([t.double() for t in (x, down, up)], (weight, bias), dy.double())
    if adapter_dtype != dtype:
        eager = specified([x, down, up], (weight.to(dtype), bias.to(dtype)), dy)
    for name, ours, theirs, want in zip(("y", "x", "lora_A", "lora_B"), got, eager, wanted, strict=True):
        assert_close_to_fp64(ours, want, theirs, name)


@BITS
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_autocast_to_the_compute_dtype(x_dtype, bits):
    """Trainer's way: outputs and gradients have PEFT's dtypes."""
    model = model_of(f"bnb{bits}", BF16)
    fused = patched_copy(model)
    x = torch.randn(6, K).to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = run(model, x), run(fused, x)
    assert fused_calls(fused) == [1, 1]
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert (got[name] - tensor).norm() <= 0.03 * tensor.norm(), name


def test_layers_with_one_input_share_its_copy():
    """q, k and v under autocast: one bf16 copy of x is saved, for as long as it is unchanged."""
    torch.manual_seed(0)
    model = lora(quantise(nn.ModuleList(nn.Linear(K, N) for _ in range(3)), 4, BF16), target_modules=["0", "1", "2"])
    layers = layers_of(patched_copy(model))
    x = torch.randn(16, K, requires_grad=True)
    saved: list[Tensor] = []

    def copies_of_x() -> int:
        return len({tensor.data_ptr() for tensor in saved if tensor.shape == (16, K)})

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = [layer(x) for layer in layers]
        assert copies_of_x() == 1
        with torch.no_grad():
            x.mul_(2)
        outputs.append(layers[0](x))
        assert copies_of_x() == 2
        wanted = [layer(x.detach() / 2) for layer in layers_of(model)] + [layers_of(model)[0](x.detach())]
    for got, want in zip(outputs, wanted, strict=True):
        assert (got - want).norm() <= 0.02 * want.norm()
    sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]
    assert x.grad is not None and x.grad.dtype == FP32


def test_lora_bias_and_a_trained_bias():
    model = model_of("bnb4", lora_bias=True, lora_dropout=0.1)
    for layer in layers_of(model):
        layer.lora_B["default"].bias.data.normal_()
    assert_agree(model, patched_copy(model), torch.randn(6, K))
    model = model_of("bnb8", bias=False)
    assert_agree(model, patched_copy(model), torch.randn(6, K))
    model = model_of("bnb4")
    model.base_model.model.up.base_layer.bias.requires_grad_(True)
    assert_agree(model, patched_copy(model), torch.randn(6, K))


@BITS
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_trains_the_same(bits, reentrant):
    model = peft.get_peft_model(
        quantised_model(bits), peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2)
    )
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    fused = patched_copy(model)
    losses = []
    for one in (model.train(), fused.train()):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(3):
            loss = one(**tiny_batch("llama")).loss
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][2] != losses[0][0]
    assert all(calls >= 6 for calls in fused_calls(fused))


# What is kept, and for how long.
@BITS
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_of_the_weights_size_is_kept(bits, dropout):
    """Saved for the backward pass of a layer: x, S and the mask, beside A and B themselves."""
    model = patched_copy(model_of(f"bnb{bits}", BF16, lora_dropout=dropout))
    layer = model.base_model.model.up
    layer.lora_A.to(BF16)
    layer.lora_B.to(BF16)
    m, saved = 16, []
    x = torch.randn(m, K, dtype=BF16, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
        storages.pop(parameter.untyped_storage().data_ptr())
    assert sum(storages.values()) == 2 * m * (K + R + (K if dropout else 0))
    y.sum().backward()
    assert x.grad is not None


@BITS
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_after_the_first_pass_no_weight_is_allocated(bits, dtype):
    """The allocator sees nothing of 2·N·K bytes or more in a whole training step, within the libraries either."""
    model = lora(quantise(Wide(), bits, dtype), target_modules=["0", "1"])
    fused = patched_copy(model)
    x = torch.randn(8, WIDE, dtype=dtype)
    run(fused, x)
    _, seen = allocations_of(lambda: run(fused, x))
    assert fused_calls(fused) == [2, 2]
    assert seen.sizes and max(seen.sizes) < WIDE * WIDE * 2
    _, theirs = allocations_of(lambda: run(model, x))
    assert max(theirs.sizes) >= WIDE * WIDE * 2  # the watch sees PEFT's


WIDE = 640


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False))


@BITS
def test_peak_memory_is_below_pefts(bits):
    """fp32 adapters in bf16, with dropout: a step's peak, the shared buffer included."""
    model = lora(quantise(Wide(), bits, BF16), target_modules=["0", "1"], lora_dropout=0.1)
    fused = patched_copy(model)
    x = torch.randn(512, WIDE, dtype=BF16)
    weights.release_buffers()
    _, ours = allocations_of(lambda: run(fused, x))
    _, theirs = allocations_of(lambda: run(model, x))
    assert fused_calls(fused) == [1, 1]
    assert ours.peak < theirs.peak, (ours.peak, theirs.peak)


# PEFT's state.
@BITS
def test_inference_and_merged_weights_are_pefts(bits):
    model = qlora(bits, init_lora_weights=False)
    fused = patched_copy(model)
    before = [layer.base_layer.weight for layer in layers_of(fused)]
    batch: Any = tiny_batch("llama")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, fused(**batch).logits)
    assert {layer.calls.last_reason for layer in layers_of(fused)} == {INFERENCE}
    with fused.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, fused(**batch).logits)
    for one in (model, fused):
        with pytest.warns(UserWarning, match="rounding"):
            one.merge_adapter()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, fused(**batch).logits)
    fused.unmerge_adapter()  # not PEFT's, which quantises a third time
    assert all(layer.base_layer.weight is weight for layer, weight in zip(layers_of(fused), before, strict=True))
    with torch.no_grad():
        fused.train()(**batch)
    assert all(calls == 1 for calls in fused_calls(fused))  # in training mode as with gradients, for checkpointing


@BITS
def test_adapters_come_and_go(bits):
    model = model_of(f"bnb{bits}")
    fused = patched_copy(model)
    x = torch.randn(6, K)
    for one in (model, fused):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
        one.add_adapter("other", config)
        one.set_adapter("other")
    assert_agree(model, fused, x)
    for one in (model, fused):
        one.base_model.set_adapter(["default", "other"])
    assert_agree(model, fused, x)
    assert fused_calls(fused) == [2, 2]
    for one in (model, fused):
        one.delete_adapter("other")
        one.set_adapter("default")
        layers_of(one)[0].set_scale("default", 0.5)
    assert_agree(model, fused, x)
    assert fused_calls(fused) == [3, 3]


@BITS
def test_swapped_and_back(bits, tmp_path):
    model = model_of(f"bnb{bits}")
    classes = {4: (peft_bnb.Linear4bit, FusedLinear4bit), 8: (peft_bnb.Linear8bitLt, FusedLinear8bitLt)}[bits]
    keys = set(model.state_dict())
    report = fastlora.patch(model)
    assert len(report.patched) == 2 and fastlora.is_patched(model)
    assert {type(layer) for layer in layers_of(model)} == {classes[1]} and set(model.state_dict()) == keys
    assert all("already" in line.reason for line in fastlora.patch(model).modules)
    x = torch.randn(4, K)
    want = run(model, x)["y"]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(layer) for layer in layers_of(again)} == {classes[1]}
        assert torch.equal(run(again, x)["y"], want)
    model.save_pretrained(tmp_path)
    fastlora.unpatch(model)
    assert {type(layer) for layer in layers_of(model)} == {classes[0]} and not fastlora.is_patched(model)
    assert not any(name in layer.__dict__ for layer in layers_of(model) for name in FusedQuantisedLayer.STATE)
    assert (run(model, x)["y"] - want).abs().max() <= 1e-5 * want.abs().max()


def test_adapters_added_after_patch_are_adopted():
    model = lora(quantise(Mlp(), 4), target_modules=["up"])
    fastlora.patch(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["down"]))
    assert {type(layer) for layer in layers_of(model)} == {FusedLinear4bit}


def test_calls_left_to_peft_and_why():
    model = model_of("bnb4", BF16)
    fused = patched_copy(model)
    up, plain = fused.base_model.model.up, model.base_model.model.up

    def reason(x: Tensor, **kwargs: Any) -> str:
        before = up.calls.fused
        assert torch.equal(up(x, **kwargs), plain(x, **kwargs))
        assert up.calls.fused == before
        return up.calls.last_reason

    with torch.autocast("cpu", torch.float16):
        assert "under autocast to torch.float16" in reason(torch.randn(3, K, dtype=BF16))
    assert (
        reason(torch.randn(2, K, dtype=BF16), adapter_names=["default", "__base__"]) == "keyword argument adapter_names"
    )
    handle = up.base_layer.register_forward_hook(lambda *_: None)
    assert "hooks on the base layer" in reason(torch.randn(3, K, dtype=BF16))
    handle.remove()
    variant = lora(quantise(Mlp(), 4), alora_invocation_tokens=[1])
    with pytest.warns(UserWarning, match="variant ALoraLinearVariant"):
        assert not fastlora.patch(variant).patched
    fresh = model_of("bnb4")
    fresh.base_model.model.up.base_layer.weight.quant_state = None
    report = fastlora.patch(fresh)
    assert "not quantised yet" in report.left_alone["base_model.model.up"]
    assert peft_adopt.unsupported(fresh.base_model.model.up) == report.left_alone["base_model.model.up"]


@BITS
@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (2, 3, 4, K)], ids=str)
def test_inputs_of_any_shape(shape, bits):
    model = model_of(f"bnb{bits}", lora_dropout=0.2)
    assert_agree(model, patched_copy(model), torch.randn(shape))


def test_strided_and_expanded_inputs():
    model = model_of("bnb4")
    fused = patched_copy(model)
    for x in (torch.randn(5, 2, K).transpose(0, 1), torch.randn(4, 2 * K)[:, ::2], torch.randn(1, K).expand(6, K)):
        want, got = model(x), fused(x)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert fused_calls(fused) == [3, 3]


def test_a_plain_quantised_model_is_sent_to_peft():
    with pytest.raises(ValueError, match=r"Linear4bit is quantised: put PEFT's LoRA on it"):
        fastlora.patch(quantise(Mlp(), 4))


def test_explain():
    model = model_of("bnb4", BF16)
    x = torch.randn(3, K, dtype=BF16)
    up = model.base_model.model.up
    assert fastlora.explain(up, x).needed == ("fastlora.patch(model)",)
    fastlora.patch(model)
    explained = fastlora.explain(up, x)
    assert (explained.forward, explained.backward) == ("torch", "torch") and "small" not in explained.reason
    assert "x is wider" in fastlora.explain(up, x.float()).reason
    with model.disable_adapter():
        assert fastlora.explain(up, x).forward == "base"


def test_compiled_graphs_are_pefts():
    fused = patched_copy(model_of("bnb4"))
    x = torch.randn(3, K)
    want = run(fused, x)["y"]
    compiled = torch.compile(fused, backend="eager")
    assert (compiled(x) - want).abs().max() <= 1e-5 * want.abs().max()
    assert fused_calls(fused) == [1, 1]


def test_the_weight_is_not_needed_where_the_input_wants_no_gradient(monkeypatch):
    fused = patched_copy(model_of("bnb4")).base_model.model.up
    y = fused(torch.randn(4, K))
    monkeypatch.setattr(weights.FourBitWeight, "write", None)
    y.sum().backward()
    assert fused.lora_B["default"].weight.grad is not None


# What `prepare_model_for_kbit_training` leaves: float32 activations into layers that compute in bfloat16.
def recipe(compute: torch.dtype = BF16, bias: bool = True, **config: Any) -> tuple[Any, Any]:
    """(PEFT's model, the same patched)."""
    torch.manual_seed(0)
    model = lora(quantise(Mlp(bias), 4, compute), **config)
    return model, patched_copy(model)


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=["plain", "dropout", "DoRA"])
@pytest.mark.parametrize("autocast", [False, True])
def test_wider_activations_than_the_layer_computes_in(config, autocast):
    """Twice eager's error against fp64, in which the frozen weight is the dequantised one and nothing is rounded."""
    model, fused = recipe(**config)
    exact = copy.deepcopy(model).double()
    for layer, base in zip(layers_of(exact), layers_of(model), strict=True):
        layer.base_layer = nn.Linear(base.in_features, base.out_features, dtype=torch.float64)
        layer.base_layer.weight.data = weights.dequantised(base.base_layer, BF16).double()
        layer.base_layer.bias.data = base.base_layer.bias.data.double()
        layer.__class__ = peft.tuners.lora.Linear
        layer.fan_in_fan_out = False
    x = torch.randn(2, 5, K)
    results = []
    for one, given in ((exact, x.double()), (model, x), (fused, x)):
        with torch.autocast("cpu", BF16, enabled=autocast and one is not exact):
            results.append(run(one, given) if not config.get("lora_dropout") or one is not exact else None)
    want, theirs, ours = results
    assert fused_calls(fused) == [1, 1] and ours["y"].dtype == theirs["y"].dtype == FP32
    for name, tensor in theirs.items():
        if "base_layer" in name:
            continue
        if want is None:  # one mask in both
            assert (ours[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
            continue
        reference_value = want[name]
        scale = reference_value.norm()
        error, allowed = ((one.double() - reference_value).norm() / scale for one in (ours[name], tensor))
        assert error <= 2 * allowed + 2**-23, f"{name}: {error:.1e}, PEFT {allowed:.1e}"


def test_the_low_rank_path_keeps_float32s_digits():
    """With a base of zeros nothing is rounded to bfloat16."""
    model, fused = recipe(bias=False)
    for one in (model, fused):
        for layer in layers_of(one):
            layer.base_layer.weight.quant_state.state2.absmax.zero_()
            layer.base_layer.weight.quant_state.offset.zero_()
    assert_agree(model, fused, torch.randn(2, 5, K), tolerance=1e-6)
    assert fused_calls(fused) == [1, 1]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_usual_recipe_runs_fused(autocast):
    from tiny_models import tiny_model

    model = quantise(tiny_model("llama"), 4, BF16)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    fused = patched_copy(model)
    batch: Any = tiny_batch("llama")
    losses = []
    for one in (model, fused):
        with torch.autocast("cpu", BF16, enabled=autocast):
            losses.append(one(**batch).logits.float().square().mean())
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    assert all(layer.calls.fused == 1 and layer.calls.latest is None for layer in layers_of(fused))
    layer = layers_of(fused)[0]
    explained = fastlora.explain(layer, torch.randn(2, layer.in_features))
    assert explained.forward == "torch"
    assert fastlora.fallbacks(fused) == {} and set(fastlora.fallbacks(model).values()) == {"PEFT's own layer"}


def test_half_precision_into_a_layer_that_computes_in_float32():
    """bitsandbytes' default compute dtype: computed in float32 and rounded once."""
    model, fused = recipe(FP32)
    x = torch.randn(2, 5, K).to(BF16)
    want, got = run(model, x), run(fused, x)
    assert fused_calls(fused) == [1, 1] and got["y"].dtype == BF16
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-2, atol=2e-2 * float(tensor.abs().max()))


def test_a_fallback_of_all_layers_is_a_warning_and_is_listed():
    _, fused = recipe()
    x = torch.randn(3, K, dtype=BF16)
    with torch.no_grad(), torch.autocast("cpu", FP16):
        fused(x)
        assert len(fastlora.fallbacks(fused)) == 2
    fused(x)
    assert fastlora.fallbacks(fused) == {}
    copied = copy.deepcopy(fused)
    for one in (fused, copied):
        with (
            torch.autocast("cpu", FP16),
            pytest.warns(UserWarning, match="each of the 2 patched layers has left a call"),
        ):
            one(x)
        with torch.autocast("cpu", FP16), warnings.catch_warnings():
            warnings.simplefilter("error")
            one(x)
