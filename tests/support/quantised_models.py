"""Layers and a tiny model quantised by bitsandbytes' CPU kernels. Without it, who imports this is skipped."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional: there are no quantised layers")


def quantised_linear(linear: nn.Linear, bits: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A linear layer's weight in 4 bits (NF4 with doubly quantised maxima) or 8, to be computed with in `dtype`."""
    sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
    options = {"bias": linear.bias is not None, **sizes, **options}
    if bits == 4:
        layer = bnb.nn.Linear4bit(**{"quant_type": "nf4", "compute_dtype": dtype, **options})
        layer.support_avx512bf16_for_cpu = False  # where a CPU has it, inference rounds to bfloat16
    else:
        layer = bnb.nn.Linear8bitLt(**{"has_fp16_weights": False, "threshold": 0.0, **options})
    layer.load_state_dict(linear.state_dict())
    return layer.requires_grad_(False).to("cpu")  # which quantises


def quantised_model(bits: int) -> Any:
    """A tiny Llama with every linear layer but the head quantised, as transformers would load it."""
    return quantise(tiny_model("llama"), bits)


def quantise(model: Any, bits: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model with every linear layer but "lm_head" quantised."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised_linear(module, bits, dtype, **options))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT looks at this
    return model


def qlora(bits: int, **config: Any) -> Any:
    """The tiny Llama under PEFT, r = 2 and alpha = 6 unless said otherwise."""
    settings = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", **config}
    return peft.get_peft_model(quantised_model(bits), peft.LoraConfig(**settings)).eval()
