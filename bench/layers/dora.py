"""DoRA, as a case to measure: `python -m bench dora`.

One layer on the same tensors: the frozen layer, LoRA and DoRA here, DoRA in eager PyTorch, and PEFT's own layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, device

from fastlora.functional import dora_linear, lora_linear
from fastlora.ops import reference

from ..harness.contenders import Contender, Tensors, peft
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
