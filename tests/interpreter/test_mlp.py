# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import contracts
import pytest
import torch
from mlp_kernels import Problem, check
from numerics import assert_close_to_fp64, poisoned_empty

from fastlora.kernels import configs, mlp
from fastlora.ops.mlp import aten as mlp_aten
from fastlora.ops.mlp import mlp as mlp_op
from fastlora.ops.mlp import triton as mlp_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ACTIVATIONS = pytest.mark.parametrize("activation", mlp_op.ACTIVATIONS)
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


@ACTIVATIONS
@GATED
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_activations(activation, gated, p):
    check(Problem(37, 53, 5, gated=gated, p=p), activation)


@pytest.mark.parametrize("dtypes", [(FP16, FP16), (FP32, FP32), (BF16, FP32)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_dtypes(activation, dtypes):
    check(Problem(37, 53, 5, *dtypes, p=0.2), activation, in_place=True)


@pytest.mark.parametrize("m, k, r", [(1, 100, 3), (1, 1, 1), (64, 32, 64), (16, 7, 33)])
def test_shapes(m, k, r):
    check(Problem(m, k, r), "silu")


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_strides(layout):
    check(Problem(21, 35, 6, p=0.2, layout=layout), "gelu_tanh")


def test_parts_of_k_and_of_the_rows():
    few, many = Problem(3, 200, 4, FP32, p=0.1), Problem(150, 20, 4, FP32, p=0.1)
    assert mlp.activate_workspace(few.gate, few.lora_A) == configs.INTERPRETER_SMS * 3 * 4
    assert mlp.activate_backward_workspace(many.gate, 4) > 0
    check(few, "silu")
    check(many, "silu")


@ACTIVATIONS
def test_far_from_zero(activation):
    """Where the exponentials under- and overflow, and NaN."""
    values = torch.tensor([[-1e30, -200.0, -90.0, -20.0, -5.0, 0.0, 5.0, 20.0, 90.0, 200.0, 1e30, float("nan")]])
    gate = values.double().requires_grad_()
    wanted = mlp_aten.ACTIVATIONS[activation].value(gate)
    (slope,) = torch.autograd.grad(wanted, gate, torch.ones_like(gate))
    h, dgate = poisoned_empty(1, 12, dtype=FP32), poisoned_empty(1, 12, dtype=FP32)
    with pytest.warns(RuntimeWarning) if activation != "relu" else torch.no_grad():
        mlp.activate(values, None, activation, h)
        mlp.activate_backward(torch.ones_like(values), None, values, None, activation, None, dgate, None)
    # The cube in gelu_tanh overflows at 1e30, in torch's own float32 too.
    finite = [i for i in range(12) if activation != "gelu_tanh" or abs(values[0, i]) != 1e30]
    torch.testing.assert_close(h[:, finite], wanted.float()[:, finite], equal_nan=True, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(dgate[:, finite], slope.float()[:, finite], equal_nan=True, atol=1e-6, rtol=1e-5)


def test_no_rows():
    p = Problem(0, 8, 4)
    grad = torch.full((4, 8), float("nan"))
    mlp.activate(p.gate, p.up, "silu", torch.empty(0, 8), p.lora_A, torch.empty(0, 4))
    mlp.activate_backward(p.dh, p.ds, p.gate, p.up, "silu", p.lora_A, p.dh, torch.empty(0, 8), grad)
    assert not grad.any()


def test_same_bits_on_every_run():
    first, second = (check(Problem(40, 35, 4, p=0.1), "silu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("r", [4, 70])
def test_only_what_is_needed(needs, r):
    p = Problem(18, 40, r)
    dh = p.dh.clone() if needs[0] else None
    got = mlp_triton.activate_backward(dh, p.ds, p.gate, p.up, "silu", p.lora_A, None, 0.0, needs)
    assert [one is not None for one in got] == [needs[0], needs[0], needs[1]]
    exact, eager = p.wanted("silu", torch.float64), p.wanted("silu", BF16)
    for name, value in zip(("dgate", "dup", "dA"), got, strict=True):
        if value is not None:
            assert_close_to_fp64(value, exact[name], eager[name], name)


def test_a_training_step_on_the_kernels_saves_no_mask():
    from fastlora.functional import Adapter, GroupLayer, lora_mlp

    torch.manual_seed(0)
    layers = [
        GroupLayer(
            torch.randn(n, k),
            [Adapter(torch.randn(4, k).requires_grad_(), torch.randn(n, 4).requires_grad_(), 1.0, 0.2)],
        )
        for n, k in ((24, 16), (24, 16), (8, 24))
    ]
    x = torch.randn(12, 16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        patch.setattr("fastlora.ops.call.SMALL", 0)
        y = lora_mlp(x, *layers, "silu", backend="cublas")
    assert sum(t.dtype == torch.int64 and t.shape == (1,) for t in kept.values()) == 3  # the seeds
    assert not any(t.dtype == torch.bool for t in kept.values())
    y.square().sum().backward()
    assert x.grad.isfinite().all()


class TestMlp(contracts.Interpreted, contracts.Mlp):
    dtypes = ((FP32, FP32),)  # half precision by kernel, above: a whole MLP rounds in many places
    sizes = {name: contracts.Mlp.sizes[name] for name in ("silu", "gelu, plain")}  # noqa: RUF012
