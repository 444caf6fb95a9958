"""The four-bit dequantisation kernel and QLoRA layers on a GPU, against bitsandbytes and PEFT."""

from __future__ import annotations

import copy
from typing import Any

import contracts
import pytest
import torch

pytestmark = pytest.mark.gpu
bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class TestNf4(contracts.Nf4):
    device = "cuda"
    shapes = ((4096, 4096), (777, 1000), (64, 4096), (3, 10))


def layer_of(bits: int, dropout: float = 0.0) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if bits == 4:
        base = bnb.nn.Linear4bit(1024, 768, compute_dtype=BF16, quant_type="nf4")
    else:
        base = bnb.nn.Linear8bitLt(1024, 768, has_fp16_weights=False)
    model = torch.nn.Sequential(base).to("cuda", BF16 if bits == 8 else None)
    setattr(model, f"is_loaded_in_{bits}bit", True)
    config = peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout)
    return peft.get_peft_model(model, config).to("cuda")


def gradients(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    parameters = [leaf, *layer.base_model.model[0].lora_A.parameters(), *layer.base_model.model[0].lora_B.parameters()]
    return [y.detach(), *torch.autograd.grad(y, parameters, torch.ones_like(y))]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_beside_pefts(bits):
    """Within bf16's rounding; 8-bit layers of bitsandbytes round their inputs too, so that theirs are further off."""
    import fastlora

    model = layer_of(bits)
    fused = copy.deepcopy(model)
    assert fastlora.patch(fused).patched
    x = torch.randn(512, 1024, device="cuda", dtype=BF16)
    for ours, theirs in zip(gradients(fused, x), gradients(model, x), strict=True):
        assert (ours.float() - theirs.float()).norm() <= (0.02 if bits == 4 else 0.05) * theirs.float().norm()
    assert fused.base_model.model[0].calls.fused == 1


def test_two_streams_do_not_share_a_buffer():
    """Each stream's products are of its own weight, whatever the other one writes meanwhile."""
    import fastlora

    models = [layer_of(4), layer_of(4)]
    models[1].base_model.model[0].base_layer.weight.quant_state.absmax.random_(0, 255)
    x = torch.randn(4096, 1024, device="cuda", dtype=BF16)
    for model in models:
        fastlora.patch(model)
    alone = [model(x).detach() for model in models]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for model, stream in zip(models, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(model(x).detach())
        torch.cuda.synchronize()
        for got, want in zip(results, alone, strict=True):
            assert torch.equal(got, want)


def test_a_captured_step_keeps_no_buffer():
    """What is allocated during capture belongs to the graph; a replay gives the eager step's numbers."""
    import fastlora
    from fastlora.ops.quant import weights

    model = layer_of(4)
    fastlora.patch(model)
    x = torch.randn(256, 1024, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = model(x).detach()
    torch.cuda.current_stream().wait_stream(stream)
    before = dict(weights._buffers.free)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    assert weights._buffers.free.keys() == before.keys()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_peak_memory_is_below_pefts():
    import fastlora
    from fastlora.ops.quant import weights

    peaks = []
    x = torch.randn(8192, 1024, device="cuda", dtype=BF16)
    for fused in (False, True):
        model = layer_of(4, dropout=0.1)
        if fused:
            fastlora.patch(model)
        gradients(model, x)
        weights.release_buffers()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(model, x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0]
