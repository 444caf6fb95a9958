"""Microbenchmarks of one LoRA linear for pytest-benchmark: `pytest bench/bench_lora_linear.py`.

Small on purpose: they catch a change that makes a path slower between two commits on one machine
(`--benchmark-autosave`, `--benchmark-compare`). Numbers to report come from `python -m bench lora_linear`, which
interleaves the contenders.
"""

from __future__ import annotations

import pytest
import torch

from .harness.contenders import Tensors, Unavailable, build
from .harness.counting import Problem
from .harness.runner import DTYPES
from .layers.lora_linear import SHAPES, contender_names

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = SHAPES[DEVICE.type][0]


def problem(kind: str, dropout: float) -> Problem:
    return Problem(*SHAPE, 16, *DTYPES[kind], dropout=dropout)


@pytest.fixture(params=["forward", "backward", "both"])
def direction(request) -> str:
    return request.param


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", contender_names(DEVICE))
def test_lora_linear(benchmark, name, kind, dropout, direction):
    tensors = Tensors.random(problem(kind, dropout), DEVICE)
    try:
        contender = build(name, tensors)
    except Unavailable as error:
        pytest.skip(str(error))
    ((x, dy),) = tensors.inputs(1, DEVICE)
    benchmark.group = f"{SHAPE} {kind} dropout {dropout} {direction}"

    def synchronized(result):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    if direction == "forward":
        result = benchmark(lambda: synchronized(contender.forward(x)))
        assert result.shape == dy.shape
    elif direction == "both":
        grads = benchmark(lambda: synchronized(contender.backward(contender.forward(x), x, dy)))
        assert grads[0].shape == x.shape
    else:
        grads = benchmark.pedantic(
            lambda y: synchronized(contender.backward(y, x, dy)),
            setup=lambda: ((contender.forward(x),), {}),
            rounds=20,
            warmup_rounds=2,
        )
        assert grads[0].shape == x.shape
