"""DoRA, as a case to measure: `python -m bench dora`.

One layer on the same tensors: the frozen layer, LoRA and DoRA here, DoRA in eager PyTorch, and PEFT's own layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, device, nn

from fastlora.functional import dora_linear, lora_linear
from fastlora.ops import reference

from ..harness.contenders import Contender, Tensors, Unavailable
from ..harness.counting import Problem
from ..harness.runner import layer_case
from ..harness.turns import Case, rotation

SHAPES = {  # (M, N, K)
    "cuda": [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 1024, 4096)],
    "cpu": [(512, 1024, 1024), (512, 2048, 1024), (64, 1024, 1024), (1, 1024, 1024)],
    "tiny": [(6, 24, 20)],
}


def dora_case(problem: Problem, on: device) -> Case:
    """The magnitudes are the weight's norms."""
    t = Tensors.random(problem, on)
    magnitude = t.weight.float().norm(dim=1).to(t.lora_a.dtype).requires_grad_()
    leaves, settings = (t.lora_a, t.lora_b, magnitude), (t.scaling, t.bias, problem.dropout)

    def contender(name: str, forward: Callable[[Tensor], Tensor], leaves: tuple[Tensor, ...]) -> Any:
        return lambda: Contender(name, forward, leaves, parameters=(t.weight,))

    builders = {
        "frozen": contender("frozen", lambda x: F.linear(x, t.weight, t.bias), ()),
        "fastlora LoRA": contender(
            "fastlora LoRA", lambda x: lora_linear(x, t.weight, t.lora_a, t.lora_b, *settings), leaves[:2]
        ),
        "eager": contender("eager", lambda x: reference.dora_linear(x, t.weight, *leaves, *settings), leaves),
        "fastlora": contender("fastlora", lambda x: dora_linear(x, t.weight, *leaves, *settings), leaves),
        "peft": lambda: peft(t, magnitude),
    }
    inputs = t.inputs(rotation(problem.x + problem.y, on), on)
    return layer_case(problem, inputs, builders, floors=("frozen", "fastlora LoRA"))


def peft(t: Tensors, magnitude: Tensor) -> Contender:
    """PEFT's own layer, in training mode."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not installed: {error}") from None
    p = t.problem
    base = nn.Linear(p.k, p.n, bias=p.bias, device="meta")
    base.weight = nn.Parameter(t.weight, requires_grad=False)
    config = LoraConfig(
        r=p.r, lora_alpha=int(t.scaling * p.r), lora_dropout=p.dropout, target_modules=["0"], use_dora=True
    )
    layer: Any = inject_adapter_in_model(config, nn.Sequential(base))[0]  # type: ignore[index]
    layer.lora_A["default"].weight = nn.Parameter(t.lora_a.detach())
    layer.lora_B["default"].weight = nn.Parameter(t.lora_b.detach())
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude.detach())
    layer.train()
    leaves = tuple(
        layer.get_parameter(f"{name}.default.weight") for name in ("lora_A", "lora_B", "lora_magnitude_vector")
    )
    return Contender("peft", layer, leaves, parameters=(t.weight,))
