"""What autograd keeps, computes and refuses around `LoraLinearFunction`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import NAMES, PATHS, fused, make_problem, path, run
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.functional import lora_linear
from fastlora.ops import call
from fastlora.ops.lora import aten as lora_aten
from fastlora.ops.lora import choice

M, K, N, R = 24, 40, 32, 4


@pytest.fixture
def function_path():
    with path("function"):
        yield


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _saved(problem, trained) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The tensors kept for the backward pass, and the leaves."""
    kept: list[Tensor] = []
    leaves: dict[str, Any] = {}

    def remember(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        leaves.update(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B)
        return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(problem, remember, trained)
    return kept, leaves


ALL = ("x", "lora_A", "lora_B")


@pytest.mark.parametrize("x_shape", [(M, K), (2, M // 2, K)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    "dtype, adapter_dtype", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.usefixtures("function_path")
def test_saves_x_s_and_the_mask_and_copies_nothing(x_shape, dropout_p, dtype, adapter_dtype):
    """x itself (no cast copy, no drop(x)), S, and references to W0, A and B; beside them only dropout's mask."""
    problem = make_problem(
        *x_shape,
        n=N,
        r=R,
        dtype=getattr(torch, dtype),
        adapter_dtype=getattr(torch, adapter_dtype),
        dropout_p=dropout_p,
    )
    kept, leaves = _saved(problem, ALL)
    shared = {_storage(leaf): name for name, leaf in leaves.items()}
    names = sorted(shared.get(_storage(tensor), "new") for tensor in kept)
    assert names == sorted(["x", "weight", "lora_A", "lora_B"] + ["new"] * (2 if dropout_p else 1))
    new = [tensor for tensor in kept if _storage(tensor) not in shared]
    assert sorted(tuple(tensor.shape) for tensor in new) == sorted([(M, R)] + ([(M, K)] if dropout_p else []))
    for mask in (tensor for tensor in new if tensor.shape == (M, K)):
        assert set(mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    "trained, expected",
    [
        (("lora_B",), "S lora_B"),
        (("lora_A",), "lora_A lora_B x"),
        (("x",), "lora_A lora_B weight"),
        (("weight",), "x"),
        (("bias",), ""),
        ((), ""),
    ],
    ids=str,
)
@pytest.mark.usefixtures("function_path")
def test_saves_only_what_the_wanted_gradients_need(trained, expected):
    kept, leaves = _saved(make_problem(M, K, n=N, r=R), trained)
    names = {_storage(leaf): name for name, leaf in leaves.items()}
    assert sorted({names.get(_storage(tensor), "S") for tensor in kept}) == expected.split()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("which", PATHS)
def test_nothing_of_the_weight_s_size_is_made(which, dropout_p):
    """Nowhere in a forward and backward pass with a frozen weight is there an N×K tensor: no dW0, no delta weight."""
    made: list[tuple] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and _storage(out) not in given:
                made.append(tuple(out.shape))
            return out

    problem = make_problem(M, K, n=N, r=R, dropout_p=dropout_p, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    given = {_storage(getattr(problem, name)) for name in NAMES}
    with path(which), Watch():
        fused(problem)
    assert (M, N) in made
    assert not {(N, K), (K, N)} & set(made)


@pytest.mark.usefixtures("function_path")
def test_a_strided_input_is_copied_once():
    """Three-dimensional x that no view flattens is copied for the GEMMs: once, and the copy is what is saved."""
    problem = make_problem(6, 4, K, n=N, r=R)
    x = problem.x.transpose(0, 1)
    problem = make_problem(4, 6, K, n=N, r=R)
    problem.__dict__["x"] = x
    kept, _ = _saved(problem, ALL)
    assert sum(tensor.numel() == x.numel() for tensor in kept) == 1
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._reshape_copy, torch.ops.aten.copy_):
                copies.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        fused(problem)
    assert len(copies) == 1


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("changed", ["x", "weight", "lora_A", "lora_B"])
def test_a_change_between_forward_and_backward_is_noticed(which, changed):
    """In a saved tensor, as everywhere in autograd."""
    problem = make_problem(2, M, K, n=N, r=R)
    leaves = {name: getattr(problem, name).requires_grad_() for name in ALL} | {"weight": problem.weight}
    with path(which):
        y = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], 1.5)
    with torch.no_grad():
        leaves[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("which", PATHS)
def test_nothing_is_saved_without_gradients(which, context):
    problem = make_problem(M, K, n=N, r=R, dropout_p=0.25)
    leaves = [getattr(problem, name).requires_grad_() for name in ALL]

    def pack(tensor):
        raise AssertionError("saved")

    with path(which), context(), saved_tensors_hooks(pack, lambda t: t):
        y = lora_linear(leaves[0], problem.weight, leaves[1], leaves[2], 1.5, dropout_p=0.25)
    assert not y.requires_grad


class _Spy(SimpleNamespace):
    """torch's backend, with notes of what the backward pass was asked for."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def forward(self, *arguments):
        return lora_aten.forward(*arguments)

    def backward(self, dy, x, weight, lora_A, lora_B, s, state, scaling, dropout_p, needs, narrow):
        given = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "s": s, "state": state}
        self.calls.append((needs, sorted(name for name, tensor in given.items() if tensor is not None)))
        return lora_aten.backward(dy, x, weight, lora_A, lora_B, s, state, scaling, dropout_p, needs, narrow)


@pytest.mark.parametrize(
    "trained, needs, given",
    [
        (("x", "lora_A", "lora_B"), (True, True, True), "lora_A lora_B s state weight x"),
        (("lora_A", "lora_B"), (False, True, True), "lora_A lora_B s state x"),
        (("lora_A",), (False, True, False), "lora_A lora_B state x"),
        (("lora_B",), (False, False, True), "lora_B s"),
        (("x",), (True, False, False), "lora_A lora_B state weight"),
    ],
    ids=str,
)
def test_no_gradient_is_computed_that_nobody_wants(monkeypatch, trained, needs, given):
    """A backend sees which ones are needed, and gets no more than docs/architecture.md promises it."""
    spy = _Spy()
    monkeypatch.setattr(choice, "select", lambda *_: choice.Choice("spy", spy, ""))  # type: ignore[arg-type]
    fused(make_problem(M, K, n=N, r=R, dropout_p=0.25), trained)
    assert spy.calls == [(needs, given.split())]


@pytest.mark.parametrize("which", PATHS)
def test_save_on_cpu_and_back(which):
    """Saved tensors may be packed away and unpacked as other objects."""
    problem = make_problem(2, M, K, n=N, r=R, dropout_p=0.25)
    with path(which):
        want = fused(problem, NAMES)
        with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
            got = fused(problem, NAMES)
    assert all(torch.equal(got[name], want[name]) for name in want)


# Transforms that look into operations: they get the reference.
@pytest.fixture(params=PATHS)
def either_path(request):
    with path(request.param):
        yield


@pytest.mark.usefixtures("either_path")
class TestTransforms:
    def setup_method(self):
        self.problem = make_problem(3, M, K, n=N, r=R, dtype=torch.float64)

    def call(self, x=None, lora_A=None, lora_B=None, **options):
        p = self.problem
        x = p.x if x is None else x
        a, b = p.lora_A if lora_A is None else lora_A, p.lora_B if lora_B is None else lora_B
        return lora_linear(x, p.weight, a, b, p.scaling, p.bias, **options)

    def test_vmap_over_inputs_and_over_adapters(self):
        torch.testing.assert_close(torch.vmap(self.call)(self.problem.x), self.call())
        many = torch.randn(5, R, K, dtype=torch.float64)
        got = torch.vmap(lambda a: self.call(lora_A=a))(many)
        torch.testing.assert_close(got, torch.stack([self.call(lora_A=a) for a in many]))

    def test_vmap_with_dropout_draws_a_mask_for_each(self):
        x = torch.ones(1, M, K, dtype=torch.float64).expand(4, M, K)
        got = torch.vmap(lambda x: self.call(x, dropout_p=0.5), randomness="different")(x)
        assert not torch.equal(got[0], got[1])

    def test_grad_and_per_sample_grad(self):
        def loss(a, x):
            return self.call(x, lora_A=a).pow(2).sum()

        want = torch.stack([torch.func.grad(loss)(self.problem.lora_A, x) for x in self.problem.x])
        got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(self.problem.lora_A, self.problem.x)
        torch.testing.assert_close(got, want)
        leaf = self.problem.lora_A.clone().requires_grad_()
        (total,) = torch.autograd.grad(loss(leaf, self.problem.x), leaf)
        torch.testing.assert_close(want.sum(0), total)

    def test_jvp_and_jacrev_agree(self):
        tangent = torch.randn_like(self.problem.lora_B)
        got = torch.func.jvp(lambda b: self.call(lora_B=b), (self.problem.lora_B,), (tangent,))[1]
        jacobian = torch.func.jacrev(lambda b: self.call(self.problem.x[0, :2], lora_B=b))(self.problem.lora_B)
        torch.testing.assert_close(got[0, :2], torch.einsum("mnij,ij->mn", jacobian, tangent))

    def test_second_derivatives_through_torch_func(self):
        x = self.problem.x[0, :1]
        hessian = torch.func.hessian(lambda b: self.call(x, lora_B=b).pow(2).sum())(self.problem.lora_B)
        s = torch.nn.functional.linear(x, self.problem.lora_A)[0] * self.problem.scaling
        want = 2 * torch.einsum("nm,i,j->nimj", torch.eye(N, dtype=torch.float64), s, s)
        torch.testing.assert_close(hessian, want)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_jit_trace(self):
        module = _Module(self.problem)
        with torch.no_grad():
            traced: Any = torch.jit.trace(module, self.problem.x)
            x = torch.randn(7, M, K, dtype=torch.float64)
            torch.testing.assert_close(traced(x), module(x))
        assert "fastlora::" not in str(traced.graph)

    def test_export(self):
        module = _Module(self.problem)
        program = torch.export.export(module, (self.problem.x,))
        x = torch.randn_like(self.problem.x)
        torch.testing.assert_close(program.module()(x), module(x))


class _Module(torch.nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.lora_A, self.lora_B = torch.nn.Parameter(problem.lora_A), torch.nn.Parameter(problem.lora_B)
        self.weight = torch.nn.Parameter(problem.weight, requires_grad=False)

    def forward(self, x):
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, 0.5)


@pytest.mark.usefixtures("function_path")
def test_forward_mode_is_refused_where_it_cannot_be_right():
    """Dual numbers outside of torch.func meet the Function, which says that it has no jvp (small: ATen, which has)."""
    problem = make_problem(M, K, n=N, r=R)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(problem.x, torch.ones_like(problem.x))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            lora_linear(x, problem.weight, problem.lora_A, problem.lora_B, 1.0)


def test_large_inputs_take_the_function_and_small_ones_aten():
    problem = make_problem(M, K, n=N, r=R)
    leaf = problem.lora_A.requires_grad_()
    small = lora_linear(problem.x, problem.weight, leaf, problem.lora_B, 1.0)
    x = torch.randn(call.SMALL // K + 1, K)
    large = lora_linear(x, problem.weight, leaf, problem.lora_B, 1.0)
    assert "LoraLinearFunction" not in type(small.grad_fn).__name__
    assert "LoraLinearFunction" in type(large.grad_fn).__name__
