"""The specification itself: against numbers worked out by hand, and its gradients against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from problems import make_problem

from fastlora.ops import reference

X = torch.tensor([[1.0, 2.0]])
WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
BIAS = torch.tensor([1.0, 2.0, 3.0])
LORA_A = torch.tensor([[1.0, -1.0]])
LORA_B = torch.tensor([[2.0], [0.0], [1.0]])


def test_worked_out_by_hand():
    """x W0ᵀ = (1, 2, 3); S = 1 - 2 = -1; s·S Bᵀ = 0.5·(-2, 0, -1)."""
    assert reference.lora_linear(X, WEIGHT, LORA_A, LORA_B, 0.5).tolist() == [[0.0, 2.0, 2.5]]
    assert reference.lora_linear(X, WEIGHT, LORA_A, LORA_B, 0.5, BIAS).tolist() == [[1.0, 4.0, 5.5]]


def test_dropout_worked_out_by_hand():
    """With p = 0.5 and the second element dropped, drop(x) = (2, 0) and S = 2; the frozen term sees all of x."""
    keep = torch.tensor([[True, False]])
    y = reference.lora_linear(X, WEIGHT, LORA_A, LORA_B, 0.5, BIAS, dropout_p=0.5, keep_mask=keep)
    assert y.tolist() == [[4.0, 4.0, 7.0]]
    y = reference.lora_linear(X, WEIGHT, LORA_A, LORA_B, 0.5, BIAS, dropout_p=1.0, keep_mask=torch.zeros_like(keep))
    assert y.tolist() == [[2.0, 4.0, 6.0]]


def test_dropout_without_a_mask_is_torch_s():
    x = torch.randn(40, 30)
    torch.manual_seed(3)
    want = F.dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(reference.apply_dropout(x, 0.3), want)
    torch.testing.assert_close(reference.apply_dropout(x, 0.3, keep_mask=want != 0), want)
    assert reference.apply_dropout(x, 0.0) is x


def test_adapters_wider_than_x_are_computed_with_in_their_dtype_but_for_autocast():
    problem = make_problem(4, 7, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x, weight, lora_A, lora_B = problem.x, problem.weight, problem.lora_A, problem.lora_B
    wide = F.linear(F.linear(x.float(), lora_A), lora_B)
    y = reference.lora_linear(x, weight, lora_A, lora_B, 1.5)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (F.linear(x, weight) + 1.5 * wide).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = reference.lora_linear(x, weight, lora_A, lora_B, 1.5)
    narrow = reference.lora_linear(x, weight, lora_A.bfloat16(), lora_B.bfloat16(), 1.5)
    assert torch.equal(y, narrow)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
def test_gradients_against_finite_differences(dropout_p):
    problem = make_problem(3, 2, 5, n=4, r=2, dtype=torch.float64)
    keep = torch.rand(3, 2, 5) < 1 - dropout_p if dropout_p else None
    leaves = [getattr(problem, name).requires_grad_() for name in ("x", "weight", "lora_A", "lora_B", "bias")]
    assert torch.autograd.gradcheck(
        lambda x, w, a, b, bias: reference.lora_linear(x, w, a, b, 1.5, bias, dropout_p, keep), leaves
    )
