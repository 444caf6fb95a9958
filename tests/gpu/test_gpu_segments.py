# pyright: reportArgumentType=false

"""Batches of several adapters on a GPU: against fp64, in a CUDA
graph, without a synchronisation. Never run so far."""

import contracts
import pytest
import torch

from fastlora.functional import Adapter, lora_mixed_batch
from fastlora.kernels.segment_plan import BASE, Segments

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
BATCHES = {  # ids, tokens, ranks
    "all rows adapted": ([1, 0, 2, 1, 0, 2, 1, 1], 256, (16, 8, 64)),
    "some bare": ([1, BASE, 0, BASE, 1, 0, BASE, 2], 200, (16, 7, 64)),
    "a token each": ([i % 5 - 1 for i in range(64)], 1, (16, 16, 8, 32)),
    "wide": ([0, 1, 0, BASE], 100, (256, 16)),
}


def make(name, dtype=BF16, adapter_dtype=BF16, p=0.0, k=1024, n=1000):
    ids, tokens, ranks = BATCHES[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape, scale=1.0, to=dtype):
        return (torch.randn(shape, device="cuda", generator=generator) * scale).to(to)

    adapters = [
        Adapter(
            randn(r, k, scale=k**-0.5, to=adapter_dtype).requires_grad_(),
            randn(n, r, scale=r**-0.5, to=adapter_dtype).requires_grad_(),
            0.5 + i,
            p,
        )
        for i, r in enumerate(ranks)
    ]
    x = randn(len(ids), tokens, k).requires_grad_()
    return ids, x, randn(n, k, scale=k**-0.5), randn(n), adapters, randn(len(ids), tokens, n)


def leaves_of(x, adapters):
    return [x, *(factor for adapter in adapters for factor in adapter[:2])]


def run(ids, x, weight, bias, adapters, dy, **options):
    torch.manual_seed(0)
    y = lora_mixed_batch(x, weight, adapters, ids, bias, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves_of(x, adapters), dy)]


def test_a_list_of_ids_costs_no_synchronisation():
    problem = make("some bare", p=0.1)
    run(*problem)  # self-checks and compilation
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph():
    ids, x, weight, bias, adapters, dy = make("some bare")
    ids = Segments(ids, x.shape[1])
    want = run(ids, x, weight, bias, adapters, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(ids, x, weight, bias, adapters, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_mixed_batch(x, weight, adapters, ids, bias)
        got = [y.detach(), *torch.autograd.grad(y, leaves_of(x, adapters), dy)]
    filler = [torch.randn(1 << 16).pin_memory() for _ in range(8)]  # over what was freed
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True)) and filler


class TestMixedBatch(contracts.MixedBatch):
    places = contracts.ON_A_GPU
    sizes = {  # noqa: RUF012
        name: {"ids": ids, "shape": (len(ids), tokens), "k": 1024, "n": 1000, "ranks": ranks}
        for name, (ids, tokens, ranks) in BATCHES.items()
    }
    shapes = ()
