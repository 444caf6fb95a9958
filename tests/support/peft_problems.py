"""A small PEFT model, and the same model patched beside it: outputs, every gradient, what ran."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from adalora_problem import TARGET
from torch import nn

import fastlora
from fastlora.integrations.peft import adopt as peft_adopt
from fastlora.introspect.fused import FusedPeftLayer

K, N = 24, 20


class Mlp(nn.Module):
    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        self.up = nn.Linear(K, N, bias=bias, dtype=dtype)
        self.down = nn.Linear(N, K, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def peft_model(base=None, seed=0, **config) -> Any:
    """A PEFT model whose adapters are not zero."""
    torch.manual_seed(seed)
    base = Mlp() if base is None else base
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], "init_lora_weights": False, **config}
    return peft.get_peft_model(base, peft.LoraConfig(**config))


def adalora_config(**config) -> peft.AdaLoraConfig:
    settings = {"init_r": 4, "target_r": TARGET, "total_step": 12, "lora_alpha": 8, "target_modules": ["up", "down"]}
    return peft.AdaLoraConfig(**{**settings, "init_lora_weights": False, **config})


def adalora_model(base=None, seed=0, **config) -> Any:
    """As `peft_model`, with adapters not so large that nothing else counts."""
    torch.manual_seed(seed)
    return calm(peft.get_peft_model(Mlp() if base is None else base, adalora_config(**config)))


def calm(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data *= 0.3
    return model


def dora_model(base=None, dtype=torch.float64, **config: Any) -> Any:
    """Its magnitudes are not the norms any more."""
    model = peft_model(Mlp(dtype=dtype) if base is None else base, use_dora=True, **config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_((torch.rand(len(parameter), generator=generator) + 0.5).to(parameter))
    return model.to(dtype) if dtype == torch.float64 else model


def fused_layers(model) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedPeftLayer)]


def predicted(layer):
    return peft_adopt.prediction(layer) or ""


def left_alone(layer):
    return peft_adopt.unsupported(layer) or ""


def patched_copy(model, **settings: Any) -> Any:
    model = copy.deepcopy(model)
    fastlora.patch(model, **settings)
    assert fastlora.is_patched(model)
    return model


def counts(model, kind="fused"):
    return [getattr(layer.calls, kind) for layer in fused_layers(model)]


def run(model, x, seed=1, **kwargs) -> tuple[Any, Any, dict[str, Any]]:
    """Output, gradient of x, gradients of every trainable parameter by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **kwargs)
    y.float().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y.detach(), x.grad, grads


def assert_agree(plain, fused, x, tolerance=1e-6, **kwargs):
    y, dx, grads = run(plain, x, **kwargs)
    y2, dx2, grads2 = run(fused, x, **kwargs)
    assert y.dtype == y2.dtype
    pairs = {"output": (y, y2), "x": (dx, dx2), **{name: (grads[name], grads2[name]) for name in grads}}
    assert grads.keys() == grads2.keys()
    for name, (want, got) in pairs.items():
        assert (want is None) == (got is None), name
        if want is not None:
            assert want.dtype == got.dtype, name
            error = (want.double() - got.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
            assert error <= tolerance, f"{name}: {error:.1e}"


def assert_within_twice_in_bf16(model, fused, x, autocast=False):
    """At most twice PEFT's error against fp64 plus one bf16 rounding, for the output and every gradient, and the same
    dtypes; the fused model's gradients."""
    want_y, want_dx, want = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, dx, grads = run(model, x)
        y2, dx2, grads2 = run(fused, x)
    pairs = [(want_y, y, y2), (want_dx, dx, dx2)] + [(want[name], grads[name], grads2[name]) for name in want]
    for exactly, theirs, ours in pairs:
        assert theirs.dtype == ours.dtype
        ulp = torch.finfo(torch.bfloat16).eps * exactly.abs().max()
        assert (ours.double() - exactly).abs().max() <= 2 * (theirs.double() - exactly).abs().max() + ulp
    return grads2
