"""The linear layer of a mixture's experts: what is true of ATen only, of routings, and what is refused."""

import contracts
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.functional import Routing, lora_grouped_linear
from fastlora.ops import reference
from fastlora.ops.experts import experts as op

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
E, N, K, R = 4, 10, 8, 3


class TestExperts(contracts.Experts):
    places = contracts.ATEN[:1]


def make(tokens=9, top_k=2, dtype=FP32, e=E, n=N, k=K, r=R):
    index = torch.randint(e, (tokens, top_k))
    x, weight = torch.randn(tokens, k, dtype=dtype), torch.randn(e, n, k, dtype=dtype) * k**-0.5
    a, b = torch.randn(e, r, k, dtype=dtype) * k**-0.5, torch.randn(e, n, r, dtype=dtype)
    return x, weight, Routing(index, e), a.requires_grad_(), b.requires_grad_()


def run(x, weight, routing, a, b, **options):
    return lora_grouped_linear(x, weight, routing, [a], [b], [2.0], gathered=True, **options)


def results(x, weight, routing, a, b, **options):
    x = x.detach().requires_grad_()
    y = run(x, weight, routing, a, b, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))]


def test_a_routing_is_sorted_stably_and_leaves_out_other_ranks_experts():
    routing = Routing(torch.tensor([[2, 0], [3, 2], [0, -1]], dtype=torch.int32), 3)
    assert routing.order.tolist() == [1, 4, 0, 3, 2, 5] and routing.rows.tolist() == [0, 2, 0, 1, 1, 2]
    assert routing.offsets.tolist() == [2, 2, 4] and routing.offsets.dtype == torch.int32
    assert routing.counts.tolist() == [2, 0, 2] and routing.experts.tolist() == [0, 0, 2, 2, 3, 3]
    x, weight, _, a, b = make(3, e=3)
    y, _, grad_a, _ = results(x, weight, routing, a, b)
    assert not y[4:].any() and y[:4].all() and not grad_a[1].any() and grad_a[0].any()


def test_peft_factors_are_views():
    """lora_A (E·r, K) with the expert slowest, lora_B (N, r·E) with the expert fastest; ΔW_e is PEFT's einsum."""
    x, weight, routing, _, _ = make(dtype=FP64)
    lora_A = torch.randn(E * R, K, dtype=FP64, requires_grad=True)
    lora_B = torch.randn(N, R * E, dtype=FP64, requires_grad=True)
    y = run(x, weight, routing, lora_A.view(E, R, K), lora_B.view(N, R, E).permute(2, 0, 1))
    delta = torch.einsum("o r e, e r i -> e o i", lora_B.reshape(N, R, E), lora_A.reshape(E, R, K)) * 2.0
    want = torch.einsum("pk,pnk->pn", x[routing.rows], (weight + delta)[routing.experts])
    torch.testing.assert_close(y, want)
    grads = [torch.autograd.grad(out.square().sum(), (lora_A, lora_B)) for out in (y, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradients_of_everything_by_finite_differences(is_transposed):
    x, weight, routing, a, b = make(5, dtype=FP64)
    weight = weight.transpose(1, 2).contiguous() if is_transposed else weight
    bias, combine = torch.randn(E, N, dtype=FP64), torch.randn(5, 2, dtype=FP64)
    leaves = [t.detach().requires_grad_() for t in (x, weight, a, b, bias, combine)]
    for materialise in (False, True):
        for count in (5, 6):
            assert torch.autograd.gradcheck(
                lambda x, w, a, b, bias, combine=None, m=materialise: run(
                    x, w, routing, a, b, bias=bias, combine=combine, is_transposed=is_transposed, materialise=m
                ),
                leaves[:count],
            )


def test_materialised_is_the_same_and_the_default_where_it_is_cheaper(monkeypatch):
    few, many = make(9, dtype=FP64), make(90, dtype=FP64)
    for problem in (few, many):
        split, whole = (results(*problem, materialise=m) for m in (False, True))
        torch.testing.assert_close(split, whole)
    chosen = []
    original = op.aten.forward
    monkeypatch.setattr(op.aten, "forward", lambda *of: chosen.append(of[-1].materialise) or original(*of))
    for problem in (few, many):
        run(*problem)
    run(*many, dropout_p=0.1)
    x, weight, routing, a, b = many
    run(x.to(BF16), weight.to(BF16), routing, a.to(BF16), b.to(BF16))
    assert chosen == [False, True, False, False]


@pytest.mark.parametrize(
    "options, most",
    [
        ({"dropout_p": 0.1}, 16 * 2 * 48),
        ({"materialise": True}, 48 * 48),
        ({"combine": torch.ones(8, 2, requires_grad=True)}, 16 * 2 * 48),
    ],
    ids=["split", "materialised", "combined"],
)
def test_nothing_of_the_weights_size_is_made_or_saved(options, most):
    """Not an expert's gradient either, and no sorted copy of x is saved, nor the rows that are weighted."""
    x, weight, routing, a, b = make(8, e=16, n=48, k=48, r=2)
    made, saved = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                    made.append(t.untyped_storage().nbytes() // t.element_size())
            return out

    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run(x.requires_grad_(), weight, routing, a, b, **options)
        leaves = [x, a, b, *(t for t in options.values() if isinstance(t, torch.Tensor))]
        torch.autograd.grad(y, leaves, torch.ones(1, 1).expand_as(y))
    assert 0 < max(made) <= most < weight.numel()
    floats = {t.untyped_storage().nbytes() // t.element_size() for t in saved if t.is_floating_point()}
    assert floats <= {8 * 48, weight.numel(), a.numel(), b.numel(), 16 * 2, 16}


def test_every_token_to_one_expert():
    x, weight, _, a, b = make()
    routing = Routing(torch.full((9, 1), 2), E)
    y, dx, grad_a, grad_b = results(x, weight, routing, a, b)
    alone = weight[2] + 2.0 * b[2] @ a[2]
    torch.testing.assert_close(y, x @ alone.t())
    torch.testing.assert_close(dx, 2.0 * y @ alone)
    assert not grad_a[[0, 1, 3]].any() and not grad_b[[0, 1, 3]].any() and grad_b[2].all()


def test_dropout_follows_the_seed():
    problem = make(40)
    first, second = (results(*problem, dropout_p=0.5, seed=seed) for seed in (3, torch.tensor([3])))
    assert all(map(torch.equal, first, second))
    x, weight, routing, a, b = problem
    other = run(*problem, dropout_p=0.5, seed=4)
    assert not torch.equal(first[0], other)
    torch.testing.assert_close(run(*problem, dropout_p=1.0), run(x, weight, routing, a, torch.zeros_like(b)))
    # The same adapter twice, each with half the scale and a mask of its own.
    twice = lora_grouped_linear(
        x, weight, routing, [a, a], [b, b], [1.0, 1.0], gathered=True, dropout_p=[0.5, 0.5], seed=3
    )
    assert not torch.allclose(twice, first[0])


def test_without_adapters_it_is_the_frozen_layer():
    x, weight, routing, a, b = make()
    frozen = lora_grouped_linear(x, weight, routing, [], [], [], gathered=True)
    assert torch.equal(frozen, run(x, weight, routing, a, torch.zeros_like(b)))
    torch.testing.assert_close(frozen, reference.grouped_lora_linear(x[routing.rows], weight, routing.ends, [], [], []))


def test_autocast():
    """float32 everything: computed in autocast's dtype, gradients in their own."""
    x, weight, routing, a, b = make(40)
    with torch.autocast("cpu", dtype=BF16):
        got = results(x, weight, routing, a, b)
    assert [t.dtype for t in got] == [BF16, FP32, FP32, FP32]
    a, b = (t.detach().to(BF16).requires_grad_() for t in (a, b))
    want = results(x.to(BF16), weight.to(BF16), routing, a, b)
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.3, "seed": 5, "combine": True}, {"materialise": True}], ids=str
)
def test_compiled_in_one_graph(options):
    x, weight, _, a, b = make()
    a_flat, b_flat = a.detach().view(E * R, K).requires_grad_(), b.detach().requires_grad_()

    def loss(x, index):
        weights = x[:, :2].double() if "combine" in options else None
        factors = a_flat.view(E, R, K), b_flat
        return run(x, weight, Routing(index, E), *factors, **{**options, "combine": weights}).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        of, index = x[:tokens].detach().requires_grad_(), torch.randint(E + 1, (tokens, 2))
        got, want = (torch.autograd.grad(f(of, index), (of, a_flat, b_flat)) for f in (compiled, loss))
        assert all(map(torch.equal, got, want))


def test_under_torch_func():
    x, weight, routing, a, b = make()
    for combine in (None, torch.rand(9, 2)):
        got = torch.func.grad(lambda x, c=combine: run(x, weight, routing, a, b, combine=c).square().sum())(x)
        torch.testing.assert_close(got, results(x, weight, routing, a, b, combine=combine)[1])


def test_wider_routing_weights_make_wider_sums():
    """As in eager PyTorch: the sum of bf16 rows by float32 weights is float32, and so is the weights' gradient."""
    x, weight, routing, a, b = make(40, dtype=BF16)
    combine = torch.rand(40, 2).requires_grad_()
    z = run(x, weight, routing, a, b, combine=combine)
    rows = run(x, weight, routing, a, b)
    want = rows.float()[routing.order.argsort()].view(40, 2, N)
    dz = torch.randn(40, N)
    (grad,) = torch.autograd.grad(z, combine, dz)
    assert z.dtype == grad.dtype == FP32
    torch.testing.assert_close(z, (want * combine.detach().unsqueeze(-1)).sum(1))
    assert (grad - (want * dz.unsqueeze(1)).sum(2)).norm() <= 0.01 * grad.norm()


def test_wrong_arguments():
    x, weight, routing, a, b = make()
    index = torch.zeros(9, 2, dtype=torch.int64)
    cases = [
        (lambda: Routing(index.float(), E), r"Routing: top_k_index: got \(9, 2\) of torch.float32, want \(T, k\)"),
        (lambda: Routing(index[0], E), r"Routing: top_k_index: got \(2,\)"),
        (lambda: Routing(index, 0), "Routing: num_experts: got 0, want at least 1"),
        (lambda: run(x, weight, index, a, b), "routing: got Tensor, want a Routing"),
        (lambda: run(x[1:], weight, routing, a, b), r"routing: got 9 tokens to 2 of 4 experts for x \(8, 8\)"),
        (lambda: run(x, weight, Routing(index, 5), a, b), r"routing: got 9 tokens to 2 of 5 .* want a routing of 4"),
        (lambda: run(x[:, 1:], weight, routing, a, b), r"shapes: got x \(9, 7\), weight \(4, 10, 8\), lora_A"),
        (lambda: run(x, weight[0], routing, a, b), r"want x \(rows, K\), weight \(E, N, K\)"),
        (lambda: run(x, weight[0], routing, a, b, is_transposed=True), r"weight \(E, K, N\)"),
        (lambda: run(x, weight, routing, a.flatten(0, 1), b), r"lora_A \(12, 8\)"),
        (lambda: run(x, weight, routing, a, b[..., 1:]), r"lora_B \(4, 10, 2\)"),
        (lambda: run(x, weight, routing, a, b, bias=torch.ones(N)), r"bias: got shape \(10,\), want \(4, 10\)"),
        (lambda: run(x, weight, routing, a, b, combine=x), r"combine: got \(9, 8\) of .*, want floats \(9, 2\)"),
        (lambda: run(x.double(), weight, routing, a, b), "want one dtype"),
        (lambda: run(x, weight, routing, a.long(), b), "dtypes: got torch.float32, torch.int64, want floating-point"),
        (lambda: run(x, weight.to("meta"), routing, a, b), "devices: got cpu, meta, want x, routing, weight"),
        (lambda: run(x, weight, routing, a, b, dropout_p=1.5), r"dropout_p: got 1.5, want a probability in \[0, 1\]"),
        (lambda: run(x, weight, routing, a, b, dropout_p=[0.1, 0.2]), "adapters: got 1 lora_As, .* 2 dropout"),
        (lambda: run(x, weight, routing, a, b, dropout_p=0.1, materialise=True), "materialise: got True with dropout"),
        (lambda: run(x, weight, routing, a, b, dropout_p=0.1, seed=torch.ones(2)), r"seed: got \(2,\) of torch.float"),
        (lambda: run(x, weight, routing, a, b, backend="cuda"), "backend: got 'cuda', want one of auto, torch"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert str(raised.value).startswith(("Routing: ", "lora_grouped_linear: "))
