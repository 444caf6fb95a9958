"""torch.compile on a GPU, with inductor: values, and CUDA graphs ("reduce-overhead") with fresh dropout masks."""

import pytest
import torch
from gpu_problems import call, leaves, make, run_reference
from numerics import assert_close_to_fp64
from torch import nn

import fastlora

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_as_right_as_without(backend):
    problem = make(256, 512, 384)
    given = leaves(problem)
    y = torch.compile(lambda given: call(problem, given, backend), fullgraph=True)(given)
    gradients = torch.autograd.grad(y, list(given.values()), problem.dy)
    got = {"y": y.detach(), **dict(zip(given, gradients, strict=True))}
    exact = run_reference(problem, None, double=True)
    plain = run_reference(problem, None, double=False)
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], plain[name], what=f"{backend} {name}")


def patched_mlp(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", torch.bfloat16)
    fastlora.patch(model, r=8, lora_dropout=dropout, init_lora_weights=False)
    return model


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_patched_model_trains(mode):
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    histories = []
    for compile_it in (False, True):
        model = patched_mlp(0.0)
        forward = torch.compile(model, fullgraph=True, mode=mode) if compile_it else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            loss = forward(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[1] == pytest.approx(histories[0], rel=2e-2)
    assert histories[0][0] > histories[0][-1]


def test_cuda_graphs_draw_fresh_masks():
    model = patched_mlp(0.5).train()
    forward = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        outputs.append(forward(x).detach().clone())
    assert not any(torch.equal(outputs[-1], other) for other in outputs[:-1])
