"""What a LoRA linear keeps for its backward pass on a GPU, and its peak, beside eager PyTorch."""

import pytest
import torch

from bench.harness.contenders import Tensors, build
from bench.harness.counting import Problem
from bench.harness.memory import saved_bytes
from bench.harness.turns import step_values

pytestmark = pytest.mark.gpu
SEED = 8  # bytes: one int64


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", ["cublas", "triton"])
def test_less_is_saved_and_the_peak_is_lower(backend, adapter_dtype, dropout):
    device = torch.device("cuda")
    problem = Problem(4096, 2048, 1024, 16, adapter_dtype=adapter_dtype, dropout=dropout)
    tensors = Tensors.random(problem, device)
    ((x, dy),) = tensors.inputs(1, device)
    ours, eager = build(backend, tensors), build("eager", tensors)
    assert saved_bytes(ours, x) == problem.x + problem.s + (SEED if dropout else 0)
    assert saved_bytes(ours, x) <= saved_bytes(eager, x)
    if dropout:
        assert saved_bytes(ours, x) < saved_bytes(eager, x)
    assert step_values(ours, x, dy)[0] < step_values(eager, x, dy)[0]
