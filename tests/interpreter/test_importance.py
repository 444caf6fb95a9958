# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

"""AdaLoRA's importance kernels against fp64, from averages that are not zero."""

import contracts
import pytest
import torch
from numerics import assert_close_to_fp64, poisoned_empty

from fastlora.kernels import importance
from fastlora.kernels.importance_plan import Averages, Factors, Layout, addresses
from fastlora.ops.importance import aten as importance_aten
from fastlora.ops.importance import importance as importance_op
from fastlora.ops.importance import triton as importance_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BETAS = (0.85, 0.7)


def problem(sizes, dtype, without=()):
    """Factors, gradients and averages; `without`: (factor, layer) of gradients that are None."""
    torch.manual_seed(sum(map(sum, sizes)))
    layout = Layout(sizes)
    layers = range(len(sizes))
    weights, gradients = (
        Factors(*([torch.randn(layout.shape(f, i)).to(dtype) for i in layers] for f in Factors._fields))
        for _ in range(2)
    )
    for factor, layer in without:
        getattr(gradients, factor)[layer] = None
    return layout, weights, gradients, torch.rand(layout.numel), torch.rand(layout.numel)


def check(sizes, dtype=FP32, without=(), rate=1.0):
    """The launchers themselves, into poisoned outputs and workspaces."""
    layout, weights, gradients, smooth, unsure = problem(sizes, dtype, without)
    exact, near = ([smooth.to(of, copy=True), unsure.to(of, copy=True)] for of in (torch.float64, FP32))
    wanted = importance_op.reference(Averages(layout, *exact, *BETAS), weights, gradients, rate)
    eager = importance_aten.update(Averages(layout, *near, *BETAS), weights, gradients, torch.full((1,), rate))
    table, aligned = addresses(weights, gradients)
    assert aligned  # torch's CPU allocator aligns to 64 bytes
    cpu = torch.device("cpu")
    scores, *partials = (
        poisoned_empty(1, size, dtype=FP32)[0] for size in (layout.total_rank, *importance.partials_size(layout, cpu))
    )
    importance.update(
        layout, table, weights.e[0], smooth, unsure, scores, *partials, torch.full((1,), rate), *BETAS, aligned
    )
    assert_close_to_fp64(smooth, exact[0], near[0], "sensitivity")
    assert_close_to_fp64(unsure, exact[1], near[1], "uncertainty")
    assert_close_to_fp64(scores, wanted, eager, "scores")
    return smooth, unsure, scores


MIXED = [(5, 33, 7), (12, 20, 45), (1, 1, 1), (5, 33, 7)]


@pytest.mark.parametrize("sizes", [[(4, 16, 16)], [(20, 50, 18), (4, 64, 12)], [(8, 300, 4)]])
def test_sizes_of_whole_vectors_and_ranks_beyond_a_block(sizes):
    check(sizes, rate=0.25)


def test_gradients_that_are_not_there_count_as_zero():
    without = [("q", 0), ("p", 1), ("e", 2), ("q", 3), ("p", 3), ("e", 3)]
    got = check(MIXED, without=without)
    layout, weights, gradients, smooth, unsure = problem(MIXED, FP32, without)
    zeros = Factors(
        *(
            [torch.zeros_like(w) if g is None else g for w, g in zip(ws, gs, strict=True)]
            for ws, gs in zip(weights, gradients, strict=True)
        )
    )
    scores = importance_triton.update(Averages(layout, smooth, unsure, *BETAS), weights, zeros)
    assert all(torch.equal(a, b) for a, b in zip(got, (smooth, unsure, scores), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_counts_as_zero(bad):
    layout, weights, gradients, smooth, unsure = problem(MIXED, FP32)
    for tensors in gradients:
        tensors[1].flatten()[-1] = bad
    zeroed = Factors(*([g.nan_to_num(0.0, 0.0, 0.0) for g in tensors] for tensors in gradients))
    want = [smooth.clone(), unsure.clone()]
    want.append(importance_triton.update(Averages(layout, *want, *BETAS), weights, zeroed))
    got = importance_triton.update(Averages(layout, smooth, unsure, *BETAS), weights, gradients)
    assert all(torch.equal(a, b) for a, b in zip((smooth, unsure, got), want, strict=True))


def test_the_module_takes_what_the_launchers_do_not():
    """Gradients of any strides and addresses; other factors are named."""
    layout, weights, gradients, smooth, unsure = problem(MIXED, FP32)
    odd = gradients._replace(
        q=[torch.empty(2 * g.numel() + 1)[1::2].view(g.shape).copy_(g) for g in gradients.q],
        e=[torch.empty(g.numel() + 1)[1:].view(g.shape).copy_(g) for g in gradients.e],
    )
    want = [smooth.clone(), unsure.clone()]
    want.append(importance_triton.update(Averages(layout, *want, *BETAS), weights, gradients))
    got = importance_triton.update(Averages(layout, smooth, unsure, *BETAS), weights, odd)
    for a, b in zip((smooth, unsure, got), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert importance_triton.unsupported(weights) is None
    double = weights._replace(e=[e.double() for e in weights.e])
    assert "one for all factors, got ['torch.float32', 'torch.float64']" in str(importance_triton.unsupported(double))
    turned = weights._replace(q=[q.t().contiguous().t() for q in weights.q])
    assert "contiguous" in str(importance_triton.unsupported(turned))


class TestImportance(contracts.Importance):
    implementation = importance_triton
