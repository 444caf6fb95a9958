"""A mixture's experts on a GPU: against fp64, without a synchronisation, in a CUDA graph. Never run so far."""

import contracts
import pytest
import torch

from fastlora.functional import Routing, lora_grouped_linear

pytestmark = pytest.mark.gpu


def problem(tokens=300, experts=16, k=512, n=768, r=16):
    index = torch.randn(tokens, experts + 1, device="cuda").topk(4).indices  # some tokens to another rank's expert
    x, weight, a, b = (
        (torch.randn(*shape, device="cuda") * shape[-1] ** -0.5).bfloat16()
        for shape in ((tokens, k), (experts, n, k), (experts, r, k), (experts, n, r))
    )
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def step():
        y = lora_grouped_linear(
            x,
            weight,
            Routing(index, experts),
            [a],
            [b],
            [2.0],
            gathered=True,
            dropout_p=0.1,
            seed=torch.full_like(index[0, :1], 3),
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    return step


def test_the_same_bits_without_waiting_for_the_device():
    step = problem()
    want = step()  # compiled and checked here
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, want))


def test_in_a_cuda_graph():
    step = problem()
    want = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        graph.replay()
    assert all(map(torch.equal, got, want))


class TestExperts(contracts.Experts):
    places = contracts.ON_A_GPU[:1]
    sizes = {  # noqa: RUF012
        "gathered": {"tokens": 600, "top_k": 2, "n": 392, "k": 264, "ranks": (16, 7)},
        "transposed": {
            "tokens": 90,
            "top_k": 3,
            "n": 264,
            "k": 136,
            "ranks": (64,),
            "gathered": False,
            "transposed": True,
        },
        "unaligned": {"tokens": 70, "top_k": 1, "n": 101, "k": 75, "ranks": (8,), "strided": True},
    }


class TestExpertsByAten(contracts.Experts):
    places = contracts.ATEN_ON_A_GPU
