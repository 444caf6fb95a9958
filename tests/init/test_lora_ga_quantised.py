"""Gradient sketches and init_lora_ga on 4-bit and 8-bit bases, with bitsandbytes' own CPU kernels."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from model_state import ModelState
from quantised_models import bnb, qlora, quantised_linear, quantised_model
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft.starts import StartedLinear
from fastlora.ops.quant.weights import dequantised

R, ALPHA = 2, 6
BITS = pytest.mark.parametrize("bits", [4, 8])


def batch() -> Any:
    return tiny_batch("llama")


def sketch_of(model: nn.Module) -> fastlora.GradientSketch:
    with fastlora.GradientSketch(model, r=R) as sketch:
        model(**batch()).loss.backward()
    return sketch


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@BITS
@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("use_rslora, scale", [(False, "stable"), (True, "weight_svd")])
def test_from_the_sketch_to_the_saved_adapter(tmp_path, use_rslora, scale, bits, patched):
    model = qlora(bits, use_rslora=use_rslora)
    kind = "Linear4bit" if bits == 4 else "Linear8bitLt"
    # In evaluation mode bitsandbytes' 8-bit layers round their inputs to 8 bits; fused ones do not.
    tolerance = 5e-3 if patched and bits == 8 else 1e-5
    if patched:
        assert len(fastlora.patch(model).patched) == 14
    assert {type(layer).__name__ for layer in layers_of(model).values()} == {f"Fused{kind}" if patched else kind}
    before = model(**batch()).logits
    weights = {name: layer.base_layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    sizes = fastlora.init_lora_ga(model, sketch_of(model), scale=scale, norm_clip=0.5)
    assert len(sizes) == 14 and all(0 < size <= 0.5 for size in sizes.values())
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.base_layer.weight, weights[name])
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        start = layer.scaling["default"] * (up.trained @ down.trained).norm() / dequantised(layer.base_layer).norm()
        assert start.item() == pytest.approx(sizes[name], rel=1e-3)
    assert_close(model(**batch()).logits, before)
    losses = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        loss = model(**batch()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = model(**batch()).logits
    if patched:
        assert all(layer.calls.fused >= 3 for layer in layers_of(model).values())
    assert losses[2] < losses[1] < losses[0] and (trained - before).abs().max() > 0.05 * before.abs().max()
    model.save_pretrained(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(quantised_model(bits), tmp_path).eval()
    assert loaded.peft_config["default"].r == 2 * R
    assert_close(loaded(**batch()).logits, trained, tolerance)
    with model.disable_adapter():
        assert_close(model(**batch()).logits, before, tolerance)


@BITS
def test_the_sketch_is_that_of_the_dequantised_model(bits):
    """Only X and dY are looked at: the same factors as from a float model with the dequantised weights."""
    model = qlora(bits)
    plain: Any = tiny_model("llama")
    for name, layer in layers_of(model).items():
        linear = plain.get_submodule(name.removeprefix("base_model.model."))
        linear.weight.data.copy_(dequantised(layer.base_layer))
    with fastlora.GradientSketch(plain, r=R) as sketch:
        plain(**batch()).loss.backward()
    got, want = sketch_of(model).report().layers, sketch.report().layers
    for ours, theirs in zip(got, want, strict=True):
        assert ours.name == f"base_model.model.{theirs.name}"
        # 8-bit layers quantise their inputs too
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-3 if bits == 4 else 0.1)
        assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-2 if bits == 4 else 0.3)


@BITS
def test_dequantised_is_what_the_layer_multiplies_with(bits):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    layer = quantised_linear(linear, bits)
    # 4-bit codes lie up to 0.15 of a block's maximum apart, 8-bit ones 1/127 of a row's
    bound = (0.16 if bits == 4 else 1 / 127) * linear.weight.abs().max()
    for _ in range(2):  # before a forward, and after it: an 8-bit layer moves its scales
        weight = dequantised(layer)
        assert weight.shape == (32, 64) and 0 < (weight - linear.weight).abs().max() < bound
        # an 8-bit layer rounds its inputs; a row of the identity survives that
        assert_close(layer(torch.eye(64)).t(), weight, 1e-5 if bits == 4 else 1e-2)


def test_dequantised_after_inference_on_a_cpu_that_packs_weights():
    layer = quantised_linear(nn.Linear(64, 32, bias=False), 4).eval()
    layer.support_avx512bf16_for_cpu = True
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs 4-bit weights")
    before = dequantised(layer)
    layer.requires_grad_(False)(torch.randn(3, 64))
    packed = layer.weight.data.clone()
    assert layer.weight.quant_state.packing_format_for_cpu and packed.shape == (32, 32)
    assert_close(dequantised(layer), before, 2**-7)
    assert layer.weight.quant_state.packing_format_for_cpu and torch.equal(layer.weight.data, packed)


@BITS
def test_what_is_refused(bits):
    model = qlora(bits)
    sketch = sketch_of(model)
    state = ModelState(model)
    with pytest.raises(ValueError, match=r'base: got "offset", but the weight of .* is a (Params4bit|Int8Params)'):
        fastlora.init_lora_ga(model, sketch, base="offset")
    state.assert_unchanged()
    assert not any(isinstance(module, StartedLinear) for module in model.modules())
    plain = quantised_model(bits)
    sketch = sketch_of(plain)
    state = ModelState(plain)
    with pytest.raises(ValueError, match=r"is a Linear(4bit|8bitLt), quantised.* \(peft\.get_peft_model\)"):
        fastlora.init_lora_ga(plain, sketch)
    state.assert_unchanged()


@BITS
def test_merging_into_the_quantised_weight(bits):
    model = qlora(bits)
    fastlora.init_lora_ga(model, sketch_of(model), norm_clip=0.5)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_B["default"].trained.mul_(1.5)
    trained, layer = model(**batch()).logits, next(iter(layers_of(model).values()))
    weight = dequantised(layer.base_layer)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = model.merge_and_unload()
    wanted = weight + ALPHA / R * up @ down
    got = dequantised(merged.get_submodule("model.layers.0.self_attn.q_proj"))
    assert (got - wanted).norm() < (0.12 if bits == 4 else 0.01) * wanted.norm()  # rounded to 4 or 8 bits again
    assert_close(merged(**batch()).logits, trained, 0.3 if bits == 4 else 0.03)
