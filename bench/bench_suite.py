"""Microbenchmarks of groups, MLPs, mixed batches, blocks and a training step for pytest-benchmark:
`pytest bench/bench_suite.py`.

As bench_lora_linear.py: to compare two commits on one machine. Numbers to report come from `python -m bench suite`,
which interleaves the contenders. Tiny sizes without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from .harness import turns
from .harness.contenders import Unavailable
from .harness.counting import Problem
from .harness.runner import DTYPES
from .harness.turns import Case
from .layers import forms, mixed
from .models import blocks

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
SIZE = "cuda" if GPU else "tiny"
FORMS = ("group", "mlp", "mixed", "block", "train")
CONTENDERS = ("frozen", "eager", "peft", "addmm", "one by one", "group", "mlp", "mixed batch", "fastlora",
              "fastlora grouped", "fastlora fused")  # fmt: skip


def case_of(form: str, kind: str) -> Case:
    dtype, adapter_dtype = DTYPES[kind]
    like = Problem(0, 0, 0, 16, dtype, adapter_dtype)
    settings = blocks.Settings(2, 1024 if GPU else 256, dtype=dtype, adapter_dtype=adapter_dtype)
    if form == "group":
        name, (m, k, ns) = next(iter(forms.GROUPS[SIZE].items()))
        return forms.group_case(name, forms.Group(m, k, ns, 16, dtype, adapter_dtype), DEVICE)
    if form == "mlp":
        return forms.mlp_case(*forms.MLPS[SIZE], like, DEVICE)
    if form == "mixed":
        return mixed.mixed_case(mixed.BATCHES[SIZE][0], like, DEVICE)
    if form == "block":
        return blocks.block_case("llama-3-8b" if GPU else "tiny", settings, DEVICE, 1)
    return blocks.training_case("llama-400m" if GPU else "llama-tiny", settings, DEVICE, 1)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("kind", ["bf16", "mixed"] if GPU else ["fp32"])
@pytest.mark.parametrize("form", FORMS)
def test_form(benchmark, form, kind, name, direction):
    case = case_of(form, kind)
    if name not in case.builders:
        pytest.skip(f"{name} is no contender here")
    try:
        contender = case.builders[name]()
    except Unavailable as error:
        pytest.skip(str(error))
    x, dy = case.inputs[0]
    benchmark.group = f"{form} {kind} {direction}"

    def step() -> object:
        y = contender.forward(x)
        result = y if direction == "forward" else contender.backward(y, x, dy)
        if GPU:
            torch.cuda.synchronize()
        return result

    benchmark(step)
    turns.check_finite(turns.step_values(contender, x, dy)[1])
