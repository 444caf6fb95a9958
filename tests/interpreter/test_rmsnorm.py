# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout
from torch import Tensor

from fastlora import norm_autograd
from fastlora.backends import norm_kernels
from fastlora.functional import Adapter, GroupLayer, lora_group, rms_norm_lora
from fastlora.kernels import rmsnorm

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EPS = 1e-5


def check(m, k, r, dtype=BF16, weight_dtype=None, layout="contiguous", in_place=False):
    torch.manual_seed(m + k + r)
    x, dy = (with_layout((torch.randn(m, k) * scale).to(dtype), layout) for scale in (3.0, 1.0))
    weight = (1 + 0.3 * torch.randn(k)).to(weight_dtype or dtype)
    a = with_layout((torch.randn(r, k) * k**-0.5).to(dtype), layout)
    y, s = poisoned_empty(m, k, dtype=dtype, layout=layout), poisoned_empty(m, r, dtype=dtype, layout=layout)
    rstd = poisoned_empty(1, m, dtype=FP32)[0]
    rmsnorm.norm_shrink(x, weight, EPS, y, rstd, a, s)
    given = dy.clone() if in_place else dy
    dx = given if in_place else poisoned_empty(m, k, dtype=dtype, layout=layout)
    rmsnorm.norm_backward(given, x, weight, rstd, dx)

    def eager(of: torch.dtype) -> list[Tensor]:
        leaf = x.to(of).requires_grad_()
        normed = F.rms_norm(leaf, (k,), weight.to(of), EPS)
        (grad,) = torch.autograd.grad(normed, leaf, dy.to(of))
        return [normed.detach(), normed.detach() @ a.to(of).t(), grad]

    for name, got, exact, near in zip(("y", "S", "dx"), (y, s, dx), eager(FP64), eager(dtype), strict=True):
        assert_close_to_fp64(got, exact, near, name)
        if layout != "contiguous":
            assert_surroundings_untouched(got)
    exact_rstd = 1 / (x.double().square().mean(1) + EPS).sqrt()
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-6, atol=0.0)
    return y, s, dx


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)])
def test_dtypes(dtypes):
    check(21, 53, 7, *dtypes)


@pytest.mark.parametrize("m, k, r", [(1, 1, 1), (1, 70, 3), (16, 32, 64), (33, 17, 20)])
def test_shapes(m, k, r):
    check(m, k, r, FP32, in_place=True)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_strides(layout):
    check(21, 35, 6, layout=layout)


def test_same_bits_on_every_run():
    assert all(torch.equal(one, other) for one, other in zip(check(40, 35, 6), check(40, 35, 6), strict=True))


def test_no_rows():
    empty = torch.empty(0, 8)
    rmsnorm.norm_shrink(empty, torch.ones(8), EPS, empty, torch.empty(0), torch.randn(2, 8), torch.empty(0, 2))
    rmsnorm.norm_backward(empty, empty, torch.ones(8), torch.empty(0), empty)


def test_the_self_check_passes_and_sees_a_wrong_kernel(monkeypatch):
    arguments = (norm_kernels, torch.device("cpu"), FP32, FP32)
    assert norm_autograd.self_check(*arguments) is None
    monkeypatch.setattr(norm_kernels, "backward", lambda dy, x, weight, rstd: dy * weight * rstd[:, None])
    assert "dX differs" in str(norm_autograd.self_check(*arguments))


# `rms_norm_lora` on the kernels.


def layers(dtype, k=24, ns=(10, 18), ranks=(3, 5)):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    made = [
        GroupLayer(randn(n, k, scale=0.2), [Adapter(randn(r, k, scale=0.2), randn(n, r), 1.5)], randn(n))
        for n, r in zip(ns, ranks, strict=True)
    ]
    return randn(2, 9, k, scale=2.0), 1 + randn(k, scale=0.3), made


def outcome(function, x, weight, made, dtype, used=(0, 1)):
    """Outputs and gradients; the random numbers are cast to `dtype`."""
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    made = [
        GroupLayer(
            one.weight.to(dtype),
            [Adapter(*(t.to(dtype).requires_grad_() for t in one.adapters[0][:2]), 1.5)],
            one.bias.to(dtype),
        )
        for one in made
    ]
    outputs = function(x, weight, EPS, made)
    leaves = [x, weight, *(t for one in made for t in one.adapters[0][:2])]
    loss = sum(outputs[i].square().sum() for i in used)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*(y.detach() for y in outputs), *grads]


def one_after_the_other(x, weight, eps, made):
    return lora_group(F.rms_norm(x, x.shape[-1:], weight, eps), made, backend="torch")


@pytest.fixture
def runs(monkeypatch):
    calls = []
    original = norm_kernels.forward

    def counting(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(norm_kernels, "forward", counting)
    return calls


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_norm_and_its_group(dtype, runs):
    problem = layers(dtype)
    got = outcome(lambda *args: rms_norm_lora(*args, backend="cublas"), *problem, dtype)
    assert runs == [1]
    exact, near = (outcome(one_after_the_other, *problem, of) for of in (FP64, dtype))
    names = ("y0", "y1", "dx", "dw", "dA0", "dB0", "dA1", "dB1")
    for name, one, right, eager in zip(names, got, exact, near, strict=True):
        assert_close_to_fp64(one, right, eager, name)


def test_a_member_whose_output_is_not_used(runs):
    problem = layers(FP32)
    got = outcome(lambda *args: rms_norm_lora(*args, backend="cublas"), *problem, FP32, used=(1,))
    want = outcome(one_after_the_other, *problem, FP32, used=(1,))
    assert runs == [1] and got[4] is None and want[4] is None
    kept = [[t for t in one if t is not None] for one in (got, want)]
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-4)


def test_without_gradients_and_where_it_runs_one_after_the_other(runs):
    x, weight, made = layers(FP32)
    with torch.no_grad():
        got = rms_norm_lora(x, weight, EPS, made, backend="cublas")
    torch.testing.assert_close(got, one_after_the_other(x, weight, EPS, made))
    assert runs == [1]
    rms_norm_lora(x, weight, EPS, made, backend="torch")
    dropping = [made[0]._replace(adapters=[made[0].adapters[0]._replace(dropout_p=0.5)]), made[1]]
    rms_norm_lora(x, weight, EPS, dropping, backend="cublas")
    torch.testing.assert_close(
        rms_norm_lora(x, weight, EPS, dropping, training=False, backend="cublas"), got, rtol=1e-4, atol=1e-4
    )
    assert runs == [1, 1]
    with pytest.raises(ValueError, match="rms_norm_lora: norm_weight: got shape"):
        rms_norm_lora(x, weight[1:], EPS, made)
