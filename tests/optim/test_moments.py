"""Moments carried over to new factors: after a change of basis training goes on as if nothing had happened."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.optim import moments

R, N, M = 3, 7, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapted() -> Any:
    """One layer in float64, in which a basis can be changed exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(M, N)).double()
    fastlora.patch(model, r=R, init_lora_weights=False)
    return model


def factors_of(model: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return model[0].lora_A["default"], model[0].lora_B["default"]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[Tensor]:
    """The products B A after each step."""
    products = []
    for step in range(start, start + steps):
        x = torch.randn(5, M, generator=generator(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        a, b = factors_of(model)
        products.append((b @ a).detach().clone())
    return products


def change_basis(model: Any, optimizer: torch.optim.Optimizer, basis: Tensor, how: str = "rotate") -> None:
    """A ← Q A, B ← B Qᵀ for an orthogonal Q, with the moments."""
    a, b = factors_of(model)
    new_a, new_b = (basis @ a).detach(), (b @ basis.t()).detach()
    by_b, by_a = moments.mixing(b.t(), new_b.t()), moments.mixing(a, new_a)
    changes = [moments.plan(optimizer, a, by_b, 0, how), moments.plan(optimizer, b, by_a, 1, how)]
    with torch.no_grad():
        a.copy_(new_a)
        b.copy_(new_b)
    for change in changes:
        change()


def rotation() -> Tensor:
    return torch.linalg.qr(torch.randn(R, R, generator=generator(3), dtype=torch.float64))[0]


def signed_permutation() -> Tensor:
    return torch.tensor([[0, -1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    # Any rotation for what is linear in the gradients; what squares them is exact for permutations and signs.
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, rotation),
    "sgd-nesterov-dampened-decayed": (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        rotation,
    ),
    "sgd-foreach": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "foreach": True}, rotation),
    "sgd-fused": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "fused": True}, rotation),
    "adam": (torch.optim.Adam, {"lr": 0.05, "foreach": False}, signed_permutation),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}, signed_permutation),
    "adamw-foreach": (torch.optim.AdamW, {"lr": 0.05, "foreach": True}, signed_permutation),
    "adamw-fused": (torch.optim.AdamW, {"lr": 0.05, "fused": True}, signed_permutation),
    "nadam": (torch.optim.NAdam, {"lr": 0.05}, signed_permutation),
    "radam": (torch.optim.RAdam, {"lr": 0.05}, signed_permutation),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_change_of_basis_leaves_the_trajectory_as_it_is(name):
    kind, options, basis = OPTIMIZERS[name]
    model = adapted()
    optimizer = kind(model.parameters(), **options)
    train(model, optimizer, 4)
    other, again = copy.deepcopy((model, optimizer))
    forgetful = copy.deepcopy(model)
    change_basis(other, again, basis())
    expected = train(model, optimizer, 5, start=4)
    for wanted, got in zip(expected, train(other, again, 5, start=4)):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(factors_of(model)[0], factors_of(other)[0], atol=1e-3)
    forgotten = kind(forgetful.parameters(), **options)  # and without moments it is another one
    change_basis(forgetful, forgotten, basis())
    assert not torch.allclose(train(forgetful, forgotten, 5, start=4)[-1], expected[-1], atol=1e-6)


def test_second_moments_of_a_rotation_keep_their_sum():
    """Squares of an orthogonal matrix's rows add up to one: what the rows have together stays, column by column."""
    model = adapted()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 3)
    a, _ = factors_of(model)
    before = optimizer.state[a]["exp_avg_sq"].clone()
    step = optimizer.state[a]["step"].clone()
    change_basis(model, optimizer, rotation())
    after = optimizer.state[a]["exp_avg_sq"]
    assert torch.allclose(after.sum(0), before.sum(0), rtol=1e-9) and bool((after > 0).all())
    assert not torch.allclose(after, before, rtol=1e-3)
    assert torch.equal(optimizer.state[a]["step"], step)


def test_directions_that_are_new_get_the_rows_mean():
    """Else their first step would be m/√0."""
    old = torch.eye(2, 5, dtype=torch.float64)
    new = torch.zeros(2, 5, dtype=torch.float64)
    new[0, 0], new[1, 4] = 2.0, 3.0  # twice the first, and one at right angles to both
    change = moments.mixing(old, new)
    assert change is not None
    assert torch.allclose(change.matrix, torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(change.missing, torch.tensor([0.0, 9.0], dtype=torch.float64))
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    first, second = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 1, 1], [3, 3, 3]])
    optimizer.state[parameter]["exp_avg"].copy_(first)
    optimizer.state[parameter]["exp_avg_sq"].copy_(second)
    restore = moments.plan(optimizer, parameter, change, 0, "rotate")()
    state = optimizer.state[parameter]
    assert torch.allclose(state["exp_avg"], torch.tensor([[2.0, 4, 6], [0, 0, 0]]))
    assert torch.allclose(state["exp_avg_sq"], torch.tensor([[4.0, 4, 4], [18, 18, 18]]))
    restore()
    assert torch.equal(state["exp_avg"], first) and torch.equal(state["exp_avg_sq"], second)


def test_reset_makes_the_optimiser_start_anew():
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    change_basis(model, optimizer, torch.eye(R, dtype=torch.float64), how="reset")
    fresh = torch.optim.AdamW(other.parameters(), lr=0.05)
    for wanted, got in zip(train(other, fresh, 3, start=3), train(model, optimizer, 3, start=3)):
        assert torch.allclose(got, wanted, atol=1e-12)


def test_what_was_zero_starts_anew():
    """Moments of A are of s·BᵀG: where B was zero they say nothing."""
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, 2)
    a, b = factors_of(model)
    assert moments.mixing(torch.zeros(R, N), b.detach().t()) is None
    restore = moments.plan(optimizer, a, None, 0, "rotate")()
    assert optimizer.state[a] == {}
    restore()
    assert set(optimizer.state[a]) == {"step", "exp_avg", "exp_avg_sq"}


class Unknown(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sketch"] = torch.ones(3)


def test_unknown_optimisers_are_reset_with_one_warning():
    model = adapted()
    optimizer = Unknown([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    with pytest.warns(UserWarning, match="how a Unknown keeps its state is not known here") as caught:
        change_basis(model, optimizer, rotation())
    assert len(caught) == 1
    assert all(optimizer.state[parameter] == {} for parameter in factors_of(model))


def test_an_optimiser_inside_a_wrapper_is_found():
    class Wrapper(torch.optim.Optimizer):  # as accelerate's
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    moments.check_optimizer(Wrapper(optimizer), list(factors_of(model)), "test")
    before = optimizer.state[factors_of(model)[0]]["momentum_buffer"].clone()
    change_basis(model, Wrapper(optimizer), rotation())
    after = optimizer.state[factors_of(model)[0]]["momentum_buffer"]
    assert torch.allclose(after, rotation() @ before, atol=1e-12)
