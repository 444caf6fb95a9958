"""DoRA in PEFT's layers: patched against the same model unpatched; and DoRA's files, PEFT's and ours."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from numerics import assert_close_to_fp64
from peft_problems import (
    K,
    Mlp,
    assert_agree,
    counts,
    dora_model,
    fused_layers,
    patched_copy,
    peft_model,
    predicted,
    run,
)
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.ops.dora import aten as dora_aten

FP64, BF16 = torch.float64, torch.bfloat16


def test_in_float32():
    model = dora_model(dtype=torch.float32)
    assert_agree(model, patched_copy(model), torch.randn(2, 5, K), tolerance=4e-6)


def test_bf16_is_at_most_twice_as_far_from_fp64():
    """Of what PEFT computes with bf16 adapters; with fp32 ones it computes everything but W0 x in fp32."""
    model = dora_model(dtype=BF16, r=8).to(BF16)
    fused = patched_copy(model)
    exact = copy.deepcopy(model).double()
    x = torch.randn(40, K).to(BF16)
    results = [run(m, x.to(of)) for m, of in ((fused, BF16), (exact, FP64), (model, BF16))]
    for what, i in (("output", 0), ("x", 1)):
        assert_close_to_fp64(*(result[i] for result in results), what)  # type: ignore[misc]
    for name in results[0][2]:
        assert_close_to_fp64(*(result[2][name] for result in results), name)  # type: ignore[misc]


def test_what_is_left_to_peft():
    x = torch.randn(3, K)
    model = peft_model(use_dora=True)
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    fused = patched_copy(model)
    for one in (model, fused):
        one.base_model.set_adapter(["default", "plain"])
    torch.testing.assert_close(fused(x), model(x))
    layer = fused_layers(fused)[0]
    assert set(layer.calls.fallback) == {"DoRA beside other adapters"}
    assert predicted(layer) == "DoRA beside other adapters"
    fused.eval()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        fused(x, adapter_names=["default"] * 3)


def test_state_of_a_whole_model():
    """Disabled, merged, switched: PEFT's own operations on both models."""
    model = dora_model()
    fused = patched_copy(model)
    x = torch.randn(3, K, dtype=FP64)
    y = fused(x)
    with model.disable_adapter(), fused.disable_adapter():
        base = fused(x)
        assert torch.equal(base, model(x))
    bits = {name: p.clone() for name, p in fused.named_parameters() if "base_layer" in name}
    for one in (model, fused):
        one.merge_adapter()
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused(x), y)
    fused.unmerge_adapter()
    assert all(torch.equal(p, bits[name]) for name, p in fused.named_parameters() if name in bits)
    assert torch.equal(fused(x), y)
    fused.add_adapter("later", peft.LoraConfig(r=2, target_modules=["up", "down"], use_dora=True))
    fused.base_model.set_adapter("later")
    before = counts(fused)
    torch.testing.assert_close(fused(x), base, rtol=1e-5, atol=1e-5)  # a new adapter's factors are float32
    assert all(after == count + 1 for after, count in zip(counts(fused), before, strict=True))
    fastlora.unpatch(fused)
    assert not fused_layers(fused)


def test_norms_are_kept_on_request(monkeypatch):
    made: list[int] = []
    original = dora_aten.weight_norm
    monkeypatch.setattr(dora_aten, "weight_norm", lambda *a: made.append(1) or original(*a))
    fused = patched_copy(dora_model())
    x = torch.randn(3, K, dtype=FP64)
    with torch.no_grad(), fastlora.variants.kept_norms(fused):
        y = fused(x)
        assert torch.equal(fused(x), y)
        assert len(made) == 2
        for layer in fused_layers(fused):
            layer.set_scale("default", 0.5)
        changed = fused(x)
        assert len(made) == 4
    with torch.no_grad():
        assert torch.equal(fused(x), changed)
    assert not torch.equal(changed, y)


# Quantised bases.
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base(bits):
    """PEFT's numbers in fp32, nothing of the weight's size kept; with dropout PEFT's own forward."""
    from quantised_models import quantise

    # Built twice, and PEFT's run once: its DoRA on bitsandbytes' 8-bit layers loses their scales by then.
    torch.manual_seed(3)
    base = Mlp().state_dict()
    models = []
    for _ in range(2):
        one = Mlp()
        one.load_state_dict(base)
        models.append(peft_model(quantise(one, bits), use_dora=True))
        with torch.no_grad():
            models[-1].base_model.model.up.lora_magnitude_vector["default"].weight.mul_(1.5)
    model, fused = models
    assert fastlora.patch(fused).patched
    assert_agree(model, fused, torch.randn(2, 5, K), tolerance=2e-5)
    layer = fused.base_model.model.up
    assert (layer.calls.fused, layer.calls.fallback) == (1, {})
    x = torch.randn(3, K).requires_grad_()
    assert torch.equal(fused(x), fused(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).isfinite().all()
    dropped = peft_model(quantise(Mlp(), bits), use_dora=True, lora_dropout=0.2)
    fastlora.patch(dropped)
    dropped(x)
    assert set(dropped.base_model.model.up.calls.fallback) == {
        "DoRA with dropout, whose second product needs the weight twice"
    }


# Files.
def plain_model(dora: bool = True) -> Any:
    torch.manual_seed(0)
    model = Mlp()
    fastlora.patch(model, r=4, lora_alpha=8, use_dora=dora)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.lora_B["default"].normal_()  # type: ignore[union-attr, operator]
            if dora:
                layer.lora_magnitude_vector["default"].mul_(1.25)  # type: ignore[union-attr, operator]
    return model


def base_model() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def test_files_that_do_not_fit(tmp_path):
    fastlora.save_adapter(plain_model(), tmp_path)
    with pytest.raises(ValueError, match=r"'default' of .* has use_dora=False, the file use_dora=True"):
        fastlora.load_adapter(plain_model(dora=False), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.up.lora_magnitude_vector"
    for change, message in (
        ({key: torch.ones(3)}, "lora_magnitude_vector of 'up': got shape"),
        ({key: torch.ones(2, 2)}, "no LoRA matrices: .*lora_magnitude_vector"),
        ({key: None}, "lora_magnitude_vector for every module, got only some of them for up"),
    ):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, path)
        model = base_model()
        with pytest.raises(ValueError, match=message):
            fastlora.load_adapter(model, tmp_path)
        assert not fastlora.is_patched(model)


def test_a_trained_module_beside_it_is_no_concern():
    """LoRA+'s groups put the magnitudes apart from B, and without decay."""
    model = nn.Sequential(plain_model(), nn.Linear(K, 2))
    groups = fastlora.optim.lora_plus_param_groups(model, lr=1e-3, weight_decay=0.1)
    magnitudes = [layer.lora_magnitude_vector["default"] for layer in (model[0].up, model[0].down)]  # type: ignore[union-attr, index]
    (group,) = [group for group in groups if any(p is magnitudes[0] for p in group["params"])]
    assert (group["name"], group["lr"], group["weight_decay"]) == ("other_no_decay", 1e-3, 0.0)
