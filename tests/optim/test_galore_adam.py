"""AdamW's moments of R in 8 bits, beside the ones in 32."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.optim import GaLoreAdamW, galore_param_groups
from fastlora.optim.galore import adam
from fastlora.optim.moments import mixing

GROUP: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "correct_bias": True,
    "arithmetic": "torch",
    "rank": 16,
}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes here")


def gradients(count: int, small: float = 1.0) -> list[Tensor]:
    """R (300, 16) of steps, whose columns decay as singular values do; each seventh row is `small` times as large."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(300, 16, generator=generator) * 0.5 ** torch.arange(16)
    shared[::7] *= small
    return [shared * (1 + 0.5 * torch.randn(300, 16, generator=generator)) for _ in range(count)]


def directions(bits: int, small: float = 1.0) -> tuple[list[Tensor], dict[str, Any]]:
    state: dict[str, Any] = {"step": 0, "basis": torch.zeros(1)}
    found = []
    for gradient in gradients(12, small):
        m, denominator, _ = adam.moments_of(state, GROUP | {"optim_bits": bits}, gradient)
        found.append(m / denominator)
    return found, state


@needs_bitsandbytes
def test_eight_bits_give_nearly_the_same_steps():
    exact, wide = directions(32)
    rough, narrow = directions(8)
    for one, other in zip(exact, rough):
        assert (other - one).norm() < 0.1 * one.norm()
    assert not torch.equal(exact[-1], rough[-1])
    assert wide["exp_avg"].dtype == torch.float32 and narrow["exp_avg"].dtype == torch.uint8
    blocks = -(-300 * 16 // adam.BLOCK)
    for key in ("exp_avg", "exp_avg_sq"):
        assert narrow[key].shape == (16, 300) and narrow[f"{key}_maxima"].shape == (blocks,)
        error = adam.read(narrow, key) - wide[key]
        assert error.norm() < 0.03 * wide[key].norm()
    nbytes = sum(value.nbytes for key, value in narrow.items() if key.startswith("exp_avg"))
    assert nbytes == 2 * (300 * 16 + 4 * blocks)


@needs_bitsandbytes
def test_blocks_hold_one_direction_each():
    """Directions differ in size: with all of them in a block the small ones have the few codes near zero."""
    errors = {}
    exact, _ = directions(32)
    for kind in ("by direction", "by row"):
        state: dict[str, Any] = {"step": 0} | ({"basis": torch.zeros(1)} if kind == "by direction" else {})
        for gradient in gradients(11):
            adam.moments_of(state, GROUP | {"optim_bits": 8}, gradient)
        m, denominator, _ = adam.moments_of(state, GROUP | {"optim_bits": 8}, gradients(12)[-1])
        errors[kind] = (m / denominator - exact[-1]).norm() / exact[-1].norm()
    assert errors["by direction"] < 0.5 * errors["by row"]


@needs_bitsandbytes
@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-7])
def test_no_entry_is_divided_by_a_v_that_was_rounded_to_zero(small):
    """v of the small rows is under the smallest code that is not zero, 3e-7 of the maximum."""
    (exact, _), (rough, _) = directions(32, small), directions(8, small)
    assert max(other.abs().max() for other in rough) < 2 * max(one.abs().max() for one in exact)
    assert all(bool(torch.isfinite(other).all()) for other in rough)


@needs_bitsandbytes
def test_eight_bit_moments_rotate():
    _, wide = directions(32)
    _, narrow = directions(8)
    old, new = (torch.linalg.qr(torch.randn(40, 16, generator=torch.Generator().manual_seed(i)))[0] for i in (1, 2))
    change = mixing(old.T, new.T)
    assert change is not None
    before = copy.deepcopy((wide, narrow))
    for state in (wide, narrow):
        adam.carry_over(state, change, 1, both=False)
        assert torch.equal(adam.read(state, "exp_avg_sq"), adam.read(before[state is narrow], "exp_avg_sq"))
        adam.carry_over(state, change, 1, both=True)
    for key in ("exp_avg", "exp_avg_sq"):
        assert not torch.allclose(wide[key], before[0][key])
        assert (adam.read(narrow, key) - wide[key]).norm() < 0.05 * wide[key].norm()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(64, 400), nn.Linear(400, 64), nn.Embedding(90, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x + self.table(torch.arange(len(x))))))


def run(
    bits: int, dtype: torch.dtype, model: Any = None, optimizer: Any = None, steps: int = 15, start: int = 0
) -> Any:
    torch.manual_seed(0)
    model = Wide().to(dtype) if model is None else model
    if optimizer is None:
        groups = galore_param_groups(model, 16, update_proj_gap=5, scale=1.0)
        optimizer = GaLoreAdamW(groups, lr=3e-3, optim_bits=bits, gradients="hook")
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, optimizer, losses


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_training_in_eight_bits(dtype):
    (model, optimizer, losses), (_, exact, wanted) = run(8, dtype), run(32, dtype)
    assert losses[-1] < 0.9 * losses[0] and losses[-1] == pytest.approx(wanted[-1], rel=0.02)
    kept = {name: optimizer.state[parameter]["exp_avg"].dtype for name, parameter in model.named_parameters()}
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert kept == {
        "first.weight": torch.uint8,
        "first.bias": working,  # fewer than 4096 entries
        "second.weight": torch.uint8,
        "second.bias": working,
        "table.weight": torch.uint8,  # the other groups' too
    }
    for optimiser in (optimizer, exact):
        assert all(torch.isfinite(parameter).all() for group in optimiser.param_groups for parameter in group["params"])


@needs_bitsandbytes
def test_eight_bit_states_are_saved_and_loaded():
    model, optimizer, _ = run(8, torch.bfloat16, steps=7)
    other = copy.deepcopy(model)
    fresh = GaLoreAdamW(galore_param_groups(other, 16, update_proj_gap=5, scale=1.0), optim_bits=8, gradients="hook")
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(8, torch.bfloat16, model, optimizer, steps=6, start=7)
    run(8, torch.bfloat16, other, fresh, steps=6, start=7)
    for mine, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(mine, theirs)


def test_eight_bits_without_bitsandbytes(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="GaLoreAdamW: optim_bits: got 8, which needs bitsandbytes"):
        GaLoreAdamW(nn.Linear(3, 3).parameters(), optim_bits=8)
    GaLoreAdamW(nn.Linear(3, 3).parameters())
