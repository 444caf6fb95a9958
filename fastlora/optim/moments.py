"""An optimiser's moments, carried over to new factors.

The gradient of A is s·BᵀG, that of B is s·G Aᵀ. Where B becomes B′, the gradients that A's moments remember would have
been s·B′ᵀG: as far as B′ lies in span(B), B′ = B T, they are Tᵀ times what was seen. In rows (Bᵀ for A's moments, A for
B's) with C = new·old⁺:

    first moments (exp_avg, momentum_buffer)            m ← C m
    second moments (exp_avg_sq, max_exp_avg_sq)         v ← (C∘C) v + missing ⊗ mean(v)

The first is exact for a change of basis: SGD with momentum goes on as if nothing had happened. The second takes the
rows' gradients for uncorrelated (exact where C permutes, scales and flips signs), and gives the part of a new row that
lies outside the old span (`missing`, squared, over the old rows' mean square) the old rows' mean, so that it does not
start with a step of m/√0. Step counters stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("rotate", "reset")
_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
_COUNTERS = ("step", "mu_product")
_KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
# Old directions shorter than this share of the longest say nothing: what they would be multiplied by is mostly noise.
_INFORMED = 1e-3

_warned: set[type] = set()


@dataclass(frozen=True)
class Mixing:
    """C (r, r) and, per new row, the squared length that C·old leaves of it over the old rows' mean square."""

    matrix: Tensor
    missing: Tensor


def mixing(old: Tensor, new: Tensor) -> Mixing | None:
    """How `new` (r, d) is made of the rows of `old` (r, d), by least squares; None where `old` is zero."""
    old, new = old.detach().double(), new.detach().double()
    gram = old @ old.t()
    mean_square = gram.diagonal().mean()
    if not bool(mean_square > 0):
        return None
    matrix = new @ old.t() @ torch.linalg.pinv(gram, rtol=_INFORMED**2, hermitian=True)
    return Mixing(matrix, (new - matrix @ old).square().sum(dim=1) / mean_square)


def unwrapped(optimizer: Any) -> Any:
    """The optimiser inside a wrapper that is one itself (accelerate's)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def check_optimizer(optimizer: Any, parameters: list[nn.Parameter], caller: str) -> None:
    """Raises ValueError for what is no optimiser, or trains none of these parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{caller}: optimizer: got {type(optimizer).__name__}, want a torch.optim.Optimizer or None")
    trained = {id(p) for group in unwrapped(optimizer).param_groups for p in group["params"]}
    if not any(id(parameter) in trained for parameter in parameters):
        raise ValueError(
            f"{caller}: optimizer: this {type(optimizer).__name__} has none of the adapters' parameters (it was made "
            "before them, or holds copies of its own); want the one that trains this model, or None"
        )


def is_known(optimizer: Any, state: dict[str, Any]) -> bool:
    """Whether a parameter's state is made of moments of its shape, and of counters."""
    return isinstance(optimizer, _KNOWN) and set(state) <= {*_FIRST, *_SECOND, *_COUNTERS}


def plan(
    optimizer: Any, parameter: nn.Parameter, change: Mixing | None, dim: int, moments: str
) -> Callable[[], Callable[[], None]]:
    """What carries one parameter's moments over (`dim`: its rank dimension); called, it returns what takes that back.

    An optimiser whose state is not known here forgets it, which a warning says once a class.
    """
    optimizer = unwrapped(optimizer)
    state = optimizer.state.get(parameter)  # not optimizer.state[...]: that would make one
    if not state:
        return lambda: _nothing
    known = is_known(optimizer, state)
    if moments == "rotate" and not known and type(optimizer) not in _warned:
        _warned.add(type(optimizer))
        warnings.warn(
            f"fastlora: how a {type(optimizer).__name__} keeps its state is not known here, so the re-initialised "
            "factors' moments are reset, not rotated",
            UserWarning,
            stacklevel=4,
        )
    if moments == "reset" or not known or change is None:
        return lambda: _forget(state)
    carried = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and key not in _COUNTERS:
            carried[key] = carried_over(value, change, dim, squared=key in _SECOND)
    return lambda: _write(state, carried)


def carried_over(moment: Tensor, change: Mixing, dim: int, squared: bool) -> Tensor:
    """A first or second moment (`squared`), of any float dtype, whose dimension `dim` is that of the old rows, for the
    new ones."""
    rows = moment.double() if dim == 0 else moment.double().t()
    matrix, missing = change.matrix.to(rows.device), change.missing.to(rows.device)  # the optimiser may be offloaded
    if squared:
        rows = matrix.square() @ rows + missing.unsqueeze(1) * rows.mean(dim=0)
    else:
        rows = matrix @ rows
    return (rows if dim == 0 else rows.t()).to(moment.dtype)


def _forget(state: dict[str, Any]) -> Callable[[], None]:
    """Every optimiser of torch's makes a parameter's state where it finds it empty."""
    before = dict(state)

    def restore() -> None:
        state.update(before)

    state.clear()
    return restore


@torch.no_grad()
def _write(state: dict[str, Any], carried: dict[str, Tensor]) -> Callable[[], None]:
    """In place: a captured graph may hold the addresses."""
    before = {key: state[key].clone() for key in carried}

    def restore() -> None:
        for key, value in before.items():
            state[key].copy_(value)

    try:
        for key, value in carried.items():
            state[key].copy_(value)
    except BaseException:
        restore()
        raise
    return restore


def _nothing() -> None:
    """There was no state."""
