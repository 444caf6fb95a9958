# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

"""`lora_mixed_batch` on the Triton kernels, interpreted: against fp64, and its self-check."""

from types import SimpleNamespace

import pytest
import torch
from numerics import assert_close_to_fp64

from fastlora.functional import Adapter, lora_mixed_batch
from fastlora.kernels import dropout as kernels_dropout
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.kernels.segment_plan import BASE, Segments
from fastlora.ops import reference
from fastlora.ops.lora import choice
from fastlora.ops.mixed import mixed as mixed_op
from fastlora.ops.mixed import triton as mixed_triton

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_remembered():
    yield
    choice.reset()


def draw(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


@pytest.mark.parametrize("ids", [[1, 0, BASE, 1], [2, 0, 1, 0]], ids=["some bare rows", "none bare"])
@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.5)], ids=["no dropout", "dropout"])
def test_output_and_gradients(ids, ps, monkeypatch):
    torch.manual_seed(0)
    tokens, k, n, ranks = 9, 40, 33, (4, 6, 3)
    x = draw(len(ids), tokens, k, dtype=BF16).requires_grad_()
    weight, bias = draw(n, k, dtype=BF16, scale=k**-0.5), draw(n, dtype=BF16)
    adapters = [
        Adapter(draw(r, k, scale=k**-0.5).requires_grad_(), draw(n, r, scale=r**-0.5).requires_grad_(), 1.5, p)
        for r, p in zip(ranks, ps, strict=True)
    ]
    seeds = []
    new_seed = kernels_dropout.new_seed
    monkeypatch.setattr(mixed_triton, "new_seed", lambda device: seeds.append(new_seed(device)) or seeds[-1])
    y = lora_mixed_batch(x, weight, adapters, ids, bias, backend="cublas")
    segments = Segments(ids, tokens)
    used = [adapters[i] for i in segments.adapters]
    leaves = [x, *(factor for adapter in used for factor in adapter[:2])]
    dy = draw(*y.shape, dtype=BF16)
    got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert len(seeds) == (max(ps) > 0)

    rows, starts = segments.rows(CPU).long(), segments.starts
    results = {}
    for dtype in (torch.float64, BF16):
        keeps, changed = [], []
        for i, adapter in enumerate(used):
            kept = torch.ones(starts[i + 1] - starts[i], k, dtype=dtype)
            p = adapter.dropout_p
            if p:
                mask = reference_keep_mask(seeds[0], len(ids) * tokens, k, p)[rows[starts[i] : starts[i + 1]]]
                kept = mask.to(dtype) * threshold_and_scale(p)[1] * (1 - p)  # the reference divides by 1 - p
            keeps.append(kept)
            factors = [factor.detach().to(dtype if dtype == torch.float64 else FP32) for factor in adapter[:2]]
            changed.append((*(factor.requires_grad_() for factor in factors), adapter.scaling, p))
        x1 = x.detach().to(dtype).requires_grad_()
        want = reference.mixed_batch_lora_linear(
            x1, weight.to(dtype), changed, segments.sequences, bias.to(dtype), keeps
        )
        again = [x1, *(factor for one in changed for factor in one[:2])]
        results[dtype] = [want.detach(), *torch.autograd.grad(want, again, dy.to(dtype))]
    for i, (one, exact, eager) in enumerate(zip(got, results[torch.float64], results[BF16], strict=True)):
        if i < 2:
            assert_close_to_fp64(one, exact, eager, ("y", "dX")[i])
        else:  # of fp32 factors
            assert (one.double() - exact).norm() <= 1e-5 * exact.norm(), f"result {i}"


def test_bare_rows_are_the_frozen_layers_bits():
    torch.manual_seed(0)
    x, weight = draw(3, 4, 24), draw(10, 24)
    y = lora_mixed_batch(x, weight, [Adapter(draw(4, 24), draw(10, 4), 1.0)], [BASE, 0, BASE], backend="cublas")
    assert torch.equal(y[::2], torch.nn.functional.linear(x, weight)[::2])
    assert not torch.equal(y[1], torch.nn.functional.linear(x, weight)[1])


def test_factors_that_are_views():
    torch.manual_seed(0)
    x, weight = draw(3, 4, 24), draw(10, 24)
    adapter = Adapter(draw(24, 4).t(), draw(4, 10).t(), 1.0)
    plain = Adapter(adapter.lora_A.contiguous(), adapter.lora_B.contiguous(), 1.0)
    got, want = (lora_mixed_batch(x, weight, [one], [BASE, 0, 0], backend="cublas") for one in (adapter, plain))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "dtype, adapter_dtype, dropout", [(BF16, BF16, False), (BF16, FP32, True), (FP32, FP32, False)]
)
def test_passes_its_self_check(dtype, adapter_dtype, dropout):
    state = torch.get_rng_state()
    assert mixed_op.self_check(mixed_triton, CPU, dtype, adapter_dtype, dropout) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_the_self_check_finds_what_is_wrong(wrong):
    def forward(*args):
        y, s, states = mixed_triton.forward(*args)
        return (y + 0.1 * y.abs(), s, states) if wrong == "forward" else (y, s, states)

    def backward(*args):
        dx, grad_as, grad_bs = mixed_triton.backward(*args)
        flipped = [-grad for grad in grad_as if grad is not None]
        return dx, flipped if wrong == "backward" else grad_as, grad_bs

    found = mixed_op.self_check(SimpleNamespace(forward=forward, backward=backward), CPU, FP32, FP32, False)
    assert found is not None
    assert ("output" if wrong == "forward" else "gradient of lora_A") in found
