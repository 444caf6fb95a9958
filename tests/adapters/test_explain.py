"""fastlora.explain: says what runs, and what does run is what it says."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGpu, backend_with
from torch import nn

import fastlora
from fastlora import functional
from fastlora.adapters import explain
from fastlora.layers.fused import Terms
from fastlora.ops import call as ops_call
from fastlora.ops.lora import choice


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("FASTLORA_BACKEND", "FASTLORA_MEASURE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choice, "_choices", {})


def layer(**how) -> fastlora.FusedLoraLinear:
    torch.manual_seed(0)
    return fastlora.FusedLoraLinear(8, 6, r=3, **how)


def test_on_a_cpu(monkeypatch):
    found = fastlora.explain(layer(), torch.randn(2, 5, 8))
    assert (found.forward, found.backward, found.layer) == ("torch", "torch", "FusedLoraLinear")
    assert "not on a GPU" in found.reason and "ATen's own autograd" in found.reason
    assert found.call == "M16 N6 K8 r3 float32+float32" and found.times == {}
    assert found.candidates["torch"] == "needs no check" and "CUDA device" in found.candidates["cublas"]
    assert "NVIDIA GPU" in found.needed[0]
    text = repr(found)
    for part in (
        "FusedLoraLinear: M16 N6",
        "forward   torch",
        "backward  torch",
        "because   not on a GPU",
        "needed    an",
    ):
        assert part in text
    monkeypatch.setattr(ops_call, "SMALL", 0)
    assert "ATen's own autograd" not in fastlora.explain(layer(), torch.randn(5, 8)).reason


def test_a_request_and_its_fall_are_told():
    asked = layer()
    asked.backend = "cublas"
    found = fastlora.explain(asked, torch.randn(5, 8).double())
    assert found.forward == "torch" and found.reason.startswith("cublas: ")
    asked.backend = "torch"
    assert fastlora.explain(asked, torch.randn(5, 8)).reason.startswith("asked for")


def test_adapters_that_do_not_run():
    plain = layer()
    x = torch.randn(5, 8)
    plain.disable_adapters = True
    assert fastlora.explain(plain, x).forward == "base"
    assert "disabled" in fastlora.explain(plain, x).reason
    plain.disable_adapters = False
    plain.merge()
    assert "merged" in fastlora.explain(plain, x).reason
    plain.unmerge()
    plain.active_adapters = []
    assert "not active" in fastlora.explain(plain, x).reason


def test_several_adapters_are_told_as_they_run():
    several = layer(lora_dropout=0.1)
    for name in ("b", "c", "d"):
        several.add_adapter(name, r=4, lora_dropout=0.5 if name == "d" else 0.0)
    several.set_adapter(["default", "b", "c", "d"])
    found = fastlora.explain(several, torch.randn(5, 8))
    assert found.call.startswith("M16 N6 K8 r8 ") and "dropout" not in found.call
    assert "2 of 4 adapters have dropout of their own" in found.reason
    several.eval()
    assert fastlora.explain(several, torch.randn(5, 8)).call.startswith("M16 N6 K8 r15 ")
    several.train().set_adapter("d")
    assert fastlora.explain(several, torch.randn(5, 8)).call.endswith(" dropout")


def test_autocast_counts():
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16+float32" in fastlora.explain(layer(), torch.randn(5, 8)).call


def test_what_is_not_fastloras():
    found = fastlora.explain(nn.Linear(8, 6), torch.randn(5, 8))
    assert (found.forward, found.needed) == ("eager", ("fastlora.patch(model)",))
    with pytest.raises(ValueError, match=r"explain: x: got torch.float32 of shape \(5, 9\), want .* shape \(..., 8\)"):
        fastlora.explain(layer(), torch.randn(5, 9))
    with pytest.raises(ValueError, match="explain: x: got list"):
        fastlora.explain(layer(), [1.0])  # type: ignore[arg-type]


def test_a_peft_layer_before_and_after():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 6))
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["0"]), model)
    x = torch.randn(5, 8)
    before = fastlora.explain(model[0], x)
    assert before.forward == "eager" and before.reason == "PEFT's own layer" and "patch" in before.needed[0]
    fastlora.patch(model)
    after = fastlora.explain(model[0], x)
    assert after.forward == "torch" and after.call == "M16 N6 K8 r3 float32+float32"
    handle = model[0].lora_A["default"].register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    assert fastlora.explain(model[0], x).reason.startswith("left to PEFT's forward: hooks")
    handle.remove()
    model[0].merge()  # type: ignore[operator]
    assert "merged" in fastlora.explain(model[0], x).reason


def test_on_a_gpu_before_and_after_measuring(monkeypatch, tmp_path):
    gpu = PretendedGpu(monkeypatch, tmp_path)
    gpu.put("cublas", backend_with())
    call = gpu.call()
    input_3d: Any = types.SimpleNamespace(is_cuda=True, device=call.x.device, shape=(5, 8), reshape=lambda *_: call.x)
    adapters = [functional.Adapter(call.lora_A, call.lora_B, 1.0)]
    monkeypatch.setattr(ops_call, "autocast_enabled", lambda x: False)
    monkeypatch.setattr(ops_call, "takes_fused_path", lambda *_: True)
    monkeypatch.setattr(type(call.weight), "numel", lambda self: 48, raising=False)

    def explained(measure: bool) -> explain.Explanation:
        return explain._fused("layer", input_3d, Terms(call.weight, None, adapters), "auto", measure, composed=True)

    before = explained(False)
    assert before.forward == "cublas" and before.times == {} and gpu.checks == 0
    assert before.candidates["cublas"] == "not checked yet" and "measure=True" in before.needed[0]
    after = explained(True)
    assert set(after.times["forward"]) == {"cublas", "torch"} and after.reason.startswith("measured: ")
    assert after.candidates["cublas"] == "passed its self-check" and after.needed == ()
    assert "measured: cublas " in repr(after) and " µs" in repr(after)
