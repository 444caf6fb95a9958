# pyright: reportArgumentType=false

"""Batches of several adapters on a GPU: against fp64, against each sequence alone, the same bits every time, in a CUDA
graph, without a synchronisation. Never run so far."""

import pytest
import torch
from numerics import assert_close_to_fp64

from fastlora.functional import Adapter, lora_mixed_batch, multi_lora_linear
from fastlora.kernels.segment_plan import BASE, Segments
from fastlora.ops import reference
from fastlora.ops.mixed import mixed as mixed_op
from fastlora.ops.mixed import triton as mixed_triton

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


def specification(ids, x, weight, bias, adapters, dy, double):
    change = (lambda t: t.detach().double()) if double else (lambda t: t.detach())
    x = change(x).requires_grad_()
    changed = [
        a._replace(**{f: change(getattr(a, f)).requires_grad_() for f in ("lora_A", "lora_B")}) for a in adapters
    ]
    segments = Segments(ids, x.shape[1])
    assert len(segments.adapters) == len(adapters)
    y = reference.mixed_batch_lora_linear(x, change(weight), changed, segments.sequences, change(bias))
    return [y.detach(), *torch.autograd.grad(y, leaves_of(x, changed), change(dy))]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, BF16), (BF16, FP32), (FP32, FP32), (torch.float16, FP32)])
def test_against_fp64(name, dtype, adapter_dtype, kernel_backend):
    problem = make(name, dtype, adapter_dtype)
    got = run(*problem, backend=kernel_backend)
    exact, eager = (specification(*problem, double=double) for double in (True, False))
    for i, (one, want, plain) in enumerate(zip(got, exact, eager, strict=True)):
        assert_close_to_fp64(one, want, plain, f"result {i}")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, BF16), (BF16, FP32), (torch.float16, BF16), (FP32, FP32)])
def test_passes_its_self_check(device, dtype, adapter_dtype, dropout):
    assert mixed_op.self_check(mixed_triton, device, dtype, adapter_dtype, dropout) is None


@pytest.mark.parametrize("name", BATCHES)
def test_same_bits_every_time(name):
    problem = make(name, p=0.1)
    first = run(*problem)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, run(*problem), strict=True))


def test_each_sequence_as_alone():
    ids, x, weight, bias, adapters, _ = make("some bare")
    y = lora_mixed_batch(x, weight, adapters, ids, bias)
    for row, i, got in zip(x, ids, y, strict=True):
        want = multi_lora_linear(row, weight, [] if i == BASE else [adapters[i]], bias)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


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
