"""The embedding with LoRA: against the reference in fp64, its rounding, its bits and what it refuses."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64
from torch import Tensor

from fastlora import functional
from fastlora.ops import reference

lora_embedding: Any = functional.lora_embedding

V, D, R, SCALING = 37, 12, 3, 1.5
HALF = (torch.bfloat16, torch.float16)


def problem(dtype: torch.dtype = torch.float64, adapters: torch.dtype | None = None) -> tuple[Tensor, Any]:
    """(ids, [weight, A, B]), leaves; some ids come several times, most never."""
    torch.manual_seed(0)
    ids = torch.randint(V // 2, (3, 17))
    ids[:, :4] = 5
    a, b = torch.randn(R, V).to(adapters or dtype), torch.randn(D, R).to(adapters or dtype)
    return ids, [leaf.requires_grad_() for leaf in (torch.randn(V, D).to(dtype), a, b)]


def run(function: Any, ids: Tensor, leaves: Any, dy: Tensor, **options: Any) -> list[Tensor]:
    y = function(ids, *leaves, SCALING, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 5}, {"padding_idx": 5 - V}, {"scale_grad_by_freq": True, "padding_idx": 0}], ids=str
)
@pytest.mark.parametrize("shape", [(3, 17), (51,), (), (2, 0, 4)], ids=str)
def test_equals_the_reference_in_fp64(options, shape):
    ids, leaves = problem()
    ids = ids.flatten()[: torch.Size(shape).numel()].view(shape).to(torch.int32 if shape == (51,) else torch.int64)
    dy = torch.randn(*shape, D, dtype=torch.float64)
    for name, got, want in zip(
        ("y", "weight", "A", "B"),
        run(lora_embedding, ids, leaves, dy, **options),
        run(reference.lora_embedding, ids, leaves, dy, **options),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    ids = torch.tensor([[1, 4], [1, 0]])
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (2, 5), (3, 2))]
    assert torch.autograd.gradcheck(lambda w, a, b: lora_embedding(ids, w, a, b, SCALING), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_than_twice_eagers_error(dtype, wide, autocast):
    ids, leaves = problem(dtype, torch.float32 if wide else None)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = torch.randn(*ids.shape, D).to(dtype)

    def eager(ids, weight, a, b, scaling):  # PEFT's
        y = F.embedding(ids, weight)
        return (y + (F.embedding(ids, a.t()) @ b.t()) * scaling).to(y.dtype)

    exact = run(reference.lora_embedding, ids, exact_leaves, dy.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, near = (run(function, ids, leaves, dy) for function in (lora_embedding, eager))
    for name, one, want, other in zip(("y", "weight", "A", "B"), got, exact, near, strict=True):
        assert_close_to_fp64(one, want, other, name)
        if wide and not autocast and name in "AB":
            assert one.dtype == torch.float32 and (one.double() - want).norm() <= 1e-6 * want.norm()


def test_each_gradient_alone_and_none_where_nothing_is_trained():
    ids, leaves = problem()
    dy = torch.randn(*ids.shape, D, dtype=torch.float64)
    whole = run(lora_embedding, ids, leaves, dy)[1:]
    for i, want in enumerate(whole):
        some: Any = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        (got,) = torch.autograd.grad(lora_embedding(ids, *some, SCALING), some[i], dy)
        assert torch.equal(got, want)
    with torch.no_grad():
        assert not lora_embedding(ids, *leaves, SCALING).requires_grad
    assert not lora_embedding(ids, *leaves, SCALING)._is_view(), "autograd lets nobody write into one"
    assert whole[1].is_contiguous() and not whole[1][:, V // 2 :].any(), "columns that the batch has not"


def test_the_same_bits_on_every_run_compiled_too():
    torch.manual_seed(1)
    ids = torch.randint(9, (4000,))  # many terms in every column
    leaves: Any = [leaf.requires_grad_() for leaf in (torch.randn(50, 8), torch.randn(4, 50), torch.randn(8, 4))]
    dy = torch.randn(4000, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        first, *others = (run(lora_embedding, ids, leaves, dy) for _ in range(4))
        others.append(run(torch.compile(lora_embedding, fullgraph=True, backend="aot_eager"), ids, leaves, dy))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_the_op_keeps_torchs_contract():
    ids, (weight, a, b) = problem()
    y = F.embedding(ids.flatten(), weight.detach()).requires_grad_()
    arguments = (y, ids.flatten(), a, b, SCALING, 5, True, torch.float64)
    torch.library.opcheck(torch.ops.fastlora.lora_embedding.default, arguments)
    for needs in ([True, True], [False, True], [True, False]):
        rows = (y.detach(), ids.flatten(), a.detach(), b.detach(), torch.randn(R, ids.numel()).double().t())
        torch.library.opcheck(
            torch.ops.fastlora.lora_embedding_backward.default,
            (*rows, SCALING, 5, True, needs),
            test_utils="test_faketensor",
        )


def test_it_keeps_no_tensor_of_ys_size():
    """Saved: ids, S, and references to A and B."""
    ids, leaves = problem(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_embedding(ids, leaves[0].detach(), *leaves[1:], SCALING)
    own = {leaf.data_ptr() for leaf in leaves}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == ids.numel() * (1 + R)


def test_transforms_take_the_reference():
    ids, leaves = problem()
    found = torch.func.grad(lambda a: lora_embedding(ids, leaves[0], a, leaves[2], SCALING).square().sum())(leaves[1])
    y = lora_embedding(ids, *leaves, SCALING)
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), leaves[1])[0])


WRONG = [
    ({"ids": torch.zeros(2)}, "ids: got torch.float32, want an int64 or int32 tensor"),
    ({"ids": [1]}, "ids: got list"),
    ({"ids": torch.tensor([0, V])}, f"ids: got 0 to {V}, want from 0 to {V - 1}"),
    ({"ids": torch.tensor([-1])}, "ids: got -1 to -1"),
    ({"weight": torch.zeros(V + 3, D)}, "shapes: got weight (40, 12), A (3, 37), B (12, 3), want weight (V, D)"),
    ({"lora_embedding_A": torch.zeros(R + 1, V)}, "shapes: "),
    ({"lora_embedding_B": torch.zeros(D)}, "shapes: "),
    ({"lora_embedding_A": torch.zeros(R, V, device="meta")}, "devices: got ids on cpu, weight on cpu, A on meta"),
    ({"weight": torch.zeros(V, D, dtype=torch.int64)}, "dtypes: got weight torch.int64"),
    ({"padding_idx": V}, f"padding_idx: got {V}, want from {-V} to {V - 1}"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_it_refuses(wrong, message):
    ids, leaves = problem(torch.float32)
    arguments = dict(zip(("weight", "lora_embedding_A", "lora_embedding_B"), leaves, strict=True))
    with pytest.raises(ValueError, match=f"lora_embedding: {re.escape(message)}"):
        lora_embedding(**{"ids": ids, **arguments, "scaling": SCALING, **wrong})
