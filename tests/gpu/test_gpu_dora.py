"""DoRA's kernels on a GPU, against fp64; and a whole layer on each backend. These tests have not run so far."""

import contracts
import pytest
import torch
from gpu_problems import GpuProblem, make

from fastlora.functional import dora_linear

pytestmark = pytest.mark.gpu


def magnitude_of(problem: GpuProblem) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(3)
    return torch.rand(len(problem.weight), device="cuda", generator=generator) + 0.5


def test_in_a_cuda_graph():
    p = make(512, 1024, 1024)
    x, magnitude = p.x.clone(), magnitude_of(p)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return dora_linear(x, p.weight, p.lora_A, p.lora_B, magnitude, p.scaling, p.bias)

    want = call().clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    p.lora_B.mul_(0.5)  # the norms are made within the graph
    graph.replay()
    torch.testing.assert_close(y, call())
    p.lora_B.mul_(2.0)
    graph.replay()
    assert torch.equal(y, want)


class TestDora(contracts.Dora):
    places = contracts.ON_A_GPU
    sizes = {  # noqa: RUF012
        "odd": {"shape": (777,), "n": 1001, "k": 1003, "r": 20},
        "large": {"shape": (2048,), "n": 5632, "k": 2048, "r": 16},
        "row": {"shape": (1,), "n": 1024, "k": 4096, "r": 128},
    }
