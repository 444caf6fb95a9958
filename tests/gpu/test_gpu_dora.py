"""DoRA's kernels on a GPU, against fp64; and a whole layer on each backend. These tests have not run so far."""

import pytest
import torch
from gpu_problems import GpuProblem, make
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty

from fastlora.functional import dora_linear
from fastlora.ops import reference
from fastlora.ops.dora import dora as dora_op

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SIZES = [(2048, 5632, 2048, 16), (777, 1001, 1003, 20), (1, 1024, 4096, 128)]  # M, N, K, r
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)]


def workspace(size: int) -> torch.Tensor | None:
    return torch.full((size,), float("nan"), device="cuda") if size else None


def magnitude_of(problem: GpuProblem) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(3)
    return torch.rand(len(problem.weight), device="cuda", generator=generator) + 0.5


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms(size, dtypes):
    from fastlora.kernels import dora

    p = make(*size, *dtypes)
    norm = torch.full((len(p.weight),), float("nan"), device="cuda")
    scaling = p.scaling
    dora.dora_norm(p.weight, p.lora_A, p.lora_B, scaling, norm, workspace(dora.norm_workspace(p.weight, p.lora_A)))
    exact = (p.weight.double() + scaling * (p.lora_B.double() @ p.lora_A.double())).norm(dim=1)
    torch.testing.assert_close(norm.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("m, n", [(2048, 5632), (777, 1001), (1, 4096), (8192, 64)])
def test_scaling_and_its_gradients(m, n, dtype):
    from fastlora.kernels import dora

    generator = torch.Generator("cuda").manual_seed(m + n)
    z, dy = (torch.randn(m, n, device="cuda", generator=generator).to(dtype) for _ in range(2))
    magnitude, norm = (torch.rand(n, device="cuda", generator=generator) + 0.5 for _ in range(2))
    bias = torch.randn(n, device="cuda", generator=generator).to(dtype)
    y, dz = (poisoned_empty(m, n, dtype=dtype, device="cuda", layout="offset") for _ in range(2))
    sums = torch.full((2, n), float("nan"), device="cuda")
    space = workspace(dora.scale_backward_workspace(dy))
    dora.scale(z, magnitude, norm, bias, y)
    dora.scale_backward(dy, z, magnitude, norm, dz, sums, space, needs_bias=True)

    def eager(of: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(of).requires_grad_() for t in (z, magnitude, bias)]
        result = leaves[1] / norm.to(of) * leaves[0] + leaves[2]
        return [result.detach(), *torch.autograd.grad(result, leaves, dy.to(of))]

    got = [y, dz, sums[0].to(dtype), sums[1].to(dtype)]
    for what, one, exact, near in zip(("y", "dz", "dm", "db"), got, eager(FP64), eager(dtype), strict=True):
        assert_close_to_fp64(one, exact, near, what)
    assert_surroundings_untouched(y)
    assert_surroundings_untouched(dz)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_self_checks_pass(dtypes, device):
    from fastlora.ops.dora import triton as dora_triton

    assert dora_op.self_check(dora_triton, device, *dtypes) is None


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_layer(size, dtypes, kernel_backend):
    """Output and every gradient, and the same bits on every run."""
    p = make(*size, *dtypes)
    magnitude = magnitude_of(p)

    def step(function, of, adapter_of, **settings) -> list[torch.Tensor]:
        tensors = (p.x.to(of), p.lora_A.to(adapter_of), p.lora_B.to(adapter_of), magnitude.to(adapter_of))
        x, a, b, m = (t.detach().clone().requires_grad_() for t in tensors)
        bias = None if p.bias is None else p.bias.to(of)
        y = function(x, p.weight.to(of), a, b, m, p.scaling, bias, **settings)
        return [y.detach(), *torch.autograd.grad(y, (x, a, b, m), p.dy.to(of))]

    first, second = (step(dora_linear, *dtypes, backend=kernel_backend) for _ in range(2))
    exact, near = step(reference.dora_linear, FP64, FP64), step(reference.dora_linear, *dtypes)
    for what, one, other, want, eager in zip(("y", "dX", "dA", "dB", "dm"), first, second, exact, near, strict=True):
        assert torch.equal(one, other), what
        assert_close_to_fp64(one, want, eager, what)


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
