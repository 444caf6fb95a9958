"""`lora_linear` on a GPU, every backend, real shapes: values against fp64, determinism, and the places it must work
in."""

import gc

import contracts
import pytest
import torch
from gpu_problems import assert_right, call, leaves, make, run
from numerics import assert_close_to_fp64

from fastlora.functional import lora_linear

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32_follows_torchs_switch(kernel_backend, precision):
    problem = make(512, 512, 512, dtype=FP32)
    former = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        exact = run(problem, "torch")
        torch.backends.cuda.matmul.fp32_precision = precision
        got = run(problem, kernel_backend)
        assert_right(problem, kernel_backend)
    finally:
        torch.backends.cuda.matmul.fp32_precision = former
    error = ((got["y"] - exact["y"]).norm() / exact["y"].norm()).item()
    assert error < 1e-5 if precision == "ieee" else 1e-5 < error < 2e-3


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_graph_replays_with_fresh_masks(kernel_backend, p):
    problem = make(256, 512, 384, dropout_p=p, bias=False)
    given = leaves(problem)

    def step():
        y = call(problem, given, kernel_backend)
        return y.detach(), *torch.autograd.grad(y, list(given.values()), problem.dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    graph.replay()
    first = [value.clone() for value in outputs]
    graph.replay()
    second = [value.clone() for value in outputs]
    if p == 0.0:
        eager = step()
        for got, again, want in zip(first, second, eager, strict=True):
            assert torch.equal(got, again)
            assert torch.equal(got, want)
    else:
        assert not torch.equal(first[0], second[0]), "a replay drew the same mask again"


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_nothing_waits_for_the_gpu(backend, p):
    problem = make(256, 512, 384, dropout_p=p)
    given = leaves(problem)

    def step():
        torch.autograd.grad(call(problem, given, backend), list(given.values()), problem.dy)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast_dtype", [BF16, FP16])
def test_autocast(backend, autocast_dtype):
    problem = make(128, 256, 192, dtype=FP32)
    given = leaves(problem)
    with torch.autocast("cuda", autocast_dtype):
        y = call(problem, given, backend)
        eager = torch.nn.functional.linear(problem.x, problem.weight, problem.bias) + problem.scaling * (
            torch.nn.functional.linear(torch.nn.functional.linear(problem.x, problem.lora_A), problem.lora_B)
        )
    assert y.dtype == autocast_dtype
    exact = problem.x.double() @ problem.weight.double().t() + problem.bias.double()  # type: ignore[union-attr]
    exact += problem.scaling * (problem.x.double() @ problem.lora_A.double().t()) @ problem.lora_B.double().t()
    assert_close_to_fp64(y.detach(), exact, eager, what="y")
    grads = torch.autograd.grad(y, list(given.values()), problem.dy.to(y.dtype))
    assert [grad.dtype for grad in grads] == [FP32] * 3


def test_grad_scaler_sees_an_overflow_and_recovers(backend):
    problem = make(64, 96, 80, dtype=FP32)
    given = leaves(problem)
    optimizer = torch.optim.SGD([given["lora_A"], given["lora_B"]], lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=1)
    before = given["lora_B"].detach().clone()
    skipped = 0
    while skipped < 60:
        optimizer.zero_grad()
        with torch.autocast("cuda", FP16):
            loss = call(problem, given, backend).float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if not torch.equal(before, given["lora_B"]):
            break
        skipped += 1
    assert 0 < skipped < 60, "the first step should overflow, a later one should not"
    assert given["lora_B"].isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saves_nothing_as_large_as_the_input_beside_it(kernel_backend, p):
    """Between forward and backward: y, S and a seed. Not x̂, a mask, a cast copy of x, or anything of size N·K."""
    problem = make(4096, 1024, 4096, adapter_dtype=FP32, dropout_p=p, bias=False)
    given = leaves(problem)
    call(problem, given, kernel_backend)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = call(problem, given, kernel_backend)
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    s_bytes = problem.x.shape[0] * 16 * 2
    assert 0 <= saved <= 2 * s_bytes + 4096, f"{saved} bytes saved beside y; S is {s_bytes}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel_replicas():
    from fastlora import FusedLoraLinear

    layer = FusedLoraLinear(64, 96, r=8, device="cuda")
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(10, 64, device="cuda")
    replicated = torch.nn.DataParallel(layer)
    torch.testing.assert_close(replicated(x), layer(x))
    replicated(x).sum().backward()
    assert layer.lora_A["default"].grad is not None
    assert layer.lora_A["default"].grad.isfinite().all()


def test_runs_on_the_tensors_device_whatever_the_current_one(kernel_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make(64, 96, 80)
    given = {name: leaf.detach().to("cuda:1").requires_grad_() for name, leaf in leaves(problem).items()}
    y = lora_linear(
        given["x"], problem.weight.to("cuda:1"), given["lora_A"], given["lora_B"], 1.5, backend=kernel_backend
    )
    assert y.device.index == 1
    assert y.isfinite().all()


class TestLoraLinear(contracts.LoraLinear):
    places = contracts.ON_A_GPU
    dtypes = (*contracts.LoraLinear.dtypes, (FP16, FP32), (FP32, BF16))
    sizes = {  # noqa: RUF012
        "odd": {"shape": (333,), "n": 1000, "k": 1001, "r": 17},
        "square": {"shape": (2048,), "n": 4096, "k": 4096, "r": 16},
        "up": {"shape": (512,), "n": 14336, "k": 4096, "r": 16},
        "down": {"shape": (512,), "n": 4096, "k": 14336, "r": 16},
        "kv": {"shape": (2048,), "n": 1024, "k": 4096, "r": 16},
        "row": {"shape": (1,), "n": 4096, "k": 4096, "r": 128},
    }


class TestLoraLinearByAten(TestLoraLinear):
    places = contracts.ATEN_ON_A_GPU
