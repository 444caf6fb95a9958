"""Bases against LAPACK's singular vectors, on spectra that are easy and on some that are not; R, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spectra import SPECTRA, matrix_with
from torch import Tensor

from fastlora.linalg.operators import Factored, Rows, Transposed
from fastlora.optim.galore.projector import PROJ_TYPES, Projector, side_of

RANK = 8
SHAPES = [(90, 70), (64, 200), (60, 60)]
GROUP: dict[str, Any] = {
    "rank": RANK,
    "refresh": "subspace",
    "refresh_iterations": 2,
    "refresh_steps": 1,
    "moments": "rotate",
    "arithmetic": "torch",
}
# Of the energy that the best basis holds, after two iterations: less where the spectrum decays slowly.
CAPTURED = {"fast": 1 - 1e-9, "slow": 0.985, "flat": 1 - 1e-9, "clustered": 0.985, "deficient": 1 - 1e-9}


def started(g: Tensor, proj_type: str = "left", **group: Any) -> tuple[Projector, dict[str, Any], dict[str, Any]]:
    group = GROUP | {"proj_type": proj_type} | group
    projector, state = Projector.of(g, group), {}
    projector.start(state, seed=3, streamed=group["refresh"] == "streamed")
    return projector, state, group


def captured(g: Tensor, projector: Projector, state: dict[str, Any]) -> float:
    """The energy of G in the basis over that in the best one of its rank."""
    turned = g.double().mT if projector.side == "right" else g.double()
    held = (state["basis"].double().mT @ turned).square().sum()
    return float(held / torch.linalg.svdvals(g.double())[:RANK].square().sum())


def check_orthonormal(basis: Tensor) -> None:
    identity = torch.eye(basis.shape[1], dtype=basis.dtype)
    assert torch.allclose(basis.mT @ basis, identity, atol=1e-5 if basis.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sides(proj_type, shape):
    """std projects the shorter side, as the official code does: its own square case is the right one."""
    n, m = shape
    wanted = {"left": "left", "right": "right", "full": "full"}
    wanted |= {"std": "right", "reverse_std": "left"} if n >= m else {"std": "left", "reverse_std": "right"}
    assert side_of(proj_type, n, m) == wanted[proj_type]
    g = torch.randn(shape, dtype=torch.float64)
    projector, state, group = started(g, proj_type)
    low, _ = projector.refresh(state, Rows(g), group, seed=1)
    low_shapes = {"left": (m, RANK), "right": (n, RANK), "full": (RANK, RANK)}
    assert low is not None and low.shape == low_shapes[wanted[proj_type]]
    assert state["basis"].shape == ((m if wanted[proj_type] == "right" else n), RANK)
    weight = torch.zeros(shape, dtype=torch.float64)
    projector.add_(weight, state, low, alpha=1.0)
    # What a step moves the weight along is the projected gradient itself: P PᵀG, GQQᵀ, P PᵀGQ Qᵀ.
    p, q = state["basis"], state.get("basis_right", state["basis"])
    check_orthonormal(q)
    back = g if projector.side == "right" else p @ p.mT @ g
    back = back if projector.side == "left" else back @ q @ q.mT
    assert torch.allclose(weight, back, atol=1e-10)


@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("spectrum", CAPTURED)
def test_subspace_iteration_against_the_exact_basis(spectrum, start, dtype, proj_type):
    for shape in SHAPES:
        g = matrix_with(SPECTRA[spectrum], dtype, *shape)
        projector, state, group = started(g, proj_type)
        if start == "warm":  # from the basis of a gradient that shares half of this one
            other = g + matrix_with(SPECTRA[spectrum], dtype, *shape[::-1]).mT
            projector.refresh(state, Rows(other), group | {"refresh": "svd"}, seed=1)
        low, _ = projector.refresh(state, Rows(g), group, seed=1)
        check_orthonormal(state["basis"])
        assert captured(g, projector, state) > CAPTURED[spectrum] - (1e-5 if dtype == torch.float32 else 0)
        assert low is not None and torch.allclose(low, projector.project(state, Rows(g)), atol=1e-5)
        gram = low.double().mT @ low.double()  # the columns of R are the singular vectors' own: uncorrelated
        assert (gram - torch.diag(gram.diagonal())).norm() < 1e-4 * gram.norm()


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_svd_is_exact(proj_type):
    for shape in SHAPES:
        g = matrix_with(SPECTRA["slow"], torch.float64, *shape)
        projector, state, group = started(g, proj_type, refresh="svd")
        low, _ = projector.refresh(state, Rows(g), group, seed=1)
        assert captured(g, projector, state) > 1 - 1e-12
        assert low is not None
        wanted = torch.linalg.svdvals(g)[:RANK]
        assert torch.allclose(torch.linalg.svdvals(low), wanted, rtol=1e-10)
        projector.refresh(state, Rows(g), group | {"refresh": "subspace", "refresh_iterations": 6}, seed=1)
        u, _, vh = torch.linalg.svd(g)
        leading = vh[:3].mT if projector.side == "right" else u[:, :3]  # up to signs
        assert torch.allclose((leading * state["basis"][:, :3]).sum(dim=0).abs(), torch.ones(3).double(), atol=1e-3)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("spectrum", CAPTURED)
def test_streamed_refreshes_near_the_exact_basis(spectrum, proj_type):
    """On one gradient again and again. Two steps make the first basis; each refresh after it iterates on."""
    for shape in SHAPES:
        g = matrix_with(SPECTRA[spectrum], torch.float32, *shape)
        projector, state, group = started(g, proj_type, refresh="streamed")
        found = []
        for step in range(26):
            if step > 1 and not state["halves"]:
                projector.begin(state, group)
            op = Rows(g)
            projector.finish_step(state, group, projector.project(state, op), projector.sums(state, op))
            found.append(captured(g, projector, state))
            check_orthonormal(state["basis"])
        assert found[1] > 0.8 and state["bases"] >= 12
        assert found[-1] > CAPTURED[spectrum] - 1e-5
        left = {key for key in state if key in ("probe", "product", "product_right")}
        assert not left or state["halves"]


def test_a_streamed_refresh_sums_over_its_steps():
    """refresh_steps = 3: the basis that two halves find is that of the sums of three gradients each."""
    gradients = [matrix_with(SPECTRA["slow"], torch.float64, 40, 30).roll(i, 1) for i in range(6)]
    projector, state, group = started(gradients[0], refresh="streamed", refresh_iterations=1, refresh_steps=3)
    projector.finish_step(state, group, projector.project(state, Rows(gradients[0])), [])
    projector.finish_step(state, group, state["probe"], projector.sums(state, Rows(gradients[0])))
    assert state["bases"] == 1 and not state["halves"]
    old = state["basis"].clone()
    projector.begin(state, group)
    for g in gradients:
        projector.finish_step(state, group, projector.project(state, Rows(g)), projector.sums(state, Rows(g)))
        assert torch.equal(old, state["basis"]) == (g is not gradients[-1])
    v = torch.linalg.qr(sum(gradients[:3]).mT @ old)[0]  # type: ignore[union-attr]
    u = torch.linalg.svd(sum(gradients[3:]) @ v)[0][:, :RANK]  # type: ignore[operator]
    assert torch.allclose((u * state["basis"]).sum(dim=0).abs(), torch.ones(RANK).double(), atol=1e-9)


def test_gradients_without_directions_are_waited_out():
    g = matrix_with(SPECTRA["slow"], torch.float64, 40, 30)
    nothing = Rows(torch.zeros_like(g))
    projector, state, group = started(g)
    assert projector.refresh(state, nothing, group, seed=1) == (None, [])
    assert state["bases"] == 0
    projector, state, group = started(g, refresh="streamed")
    for op in (nothing, Rows(g), nothing, nothing, Rows(g)):
        projector.finish_step(state, group, projector.project(state, op), projector.sums(state, op))
    assert state["bases"] == 1 and captured(g, projector, state) > 0.6


@pytest.mark.parametrize("refresh", ["subspace", "svd", "streamed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(refresh, value):
    g = torch.randn(40, 30)
    g[3, 5] = value
    projector, state, group = started(g, refresh=refresh)
    refused = pytest.raises(ValueError, match="GaLoreAdamW: gradient: that of a projected weight is NaN or infinite")
    if refresh == "streamed":
        low = projector.project(state, Rows(g))
        with refused:
            projector.finish_step(state, group, low, [])
        return
    with refused:
        projector.refresh(state, Rows(g), group, seed=1)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_moments_follow_a_rotated_basis(proj_type):
    """Where the new basis spans what the old one did, R in the new one is what the old R becomes."""
    g, h = torch.randn(40, 30, dtype=torch.float64), torch.randn(40, 30, dtype=torch.float64)
    projector, state, group = started(g, proj_type, refresh="svd")
    projector.refresh(state, Rows(g), group, seed=1)
    old = projector.project(state, Rows(h))
    turn = [torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64))[0] for _ in range(2)]
    keys = ["basis", "basis_right"][: 2 if projector.side == "full" else 1]
    new = [state[key] @ q for key, q in zip(keys, turn)]
    changes = projector._set(state, group, new[0], new[-1])
    assert len(changes) == len(keys)
    for change, dim in changes:
        old = change.matrix @ old if dim == 0 else old @ change.matrix.mT
        assert torch.allclose(change.missing, torch.zeros(RANK, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(old, projector.project(state, Rows(h)), atol=1e-10)
    assert projector._set(state, group | {"moments": "keep"}, new[0], new[-1]) == []


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_of_it_from_factors_and_in_low_precision(dtype, proj_type):
    """A gradient as dYᵀX gives what the matrix gives; a bfloat16 weight moves by the exact product, rounded once."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(50, 30, generator=generator), torch.randn(50, 2100, generator=generator)
    x, dy = x.to(dtype), dy.to(dtype)
    g = dy.double().mT @ x.double()
    results = []
    for op in (Rows(g), Factored(x, dy)):
        projector, state, group = started(g.to(dtype), proj_type)
        low, _ = projector.refresh(state, op, group, seed=1) if op.dtype == torch.float32 else (None, [])
        if low is None:
            projector, state, group = started(g, proj_type)
            low, _ = projector.refresh(state, op, group, seed=1)
        assert low is not None
        weight = torch.ones(2100, 30, dtype=dtype)
        projector.add_(weight, state, low, alpha=0.01)
        exact = torch.zeros(2100, 30, dtype=torch.float64)
        double = {key: value.double() if isinstance(value, Tensor) else value for key, value in state.items()}
        projector.add_(exact, double, low.double(), alpha=0.01)
        ulp = torch.finfo(dtype).eps
        assert (weight - (1 + exact)).abs().max() <= ulp * (1 + exact.abs()).max()
        assert weight.dtype == dtype
        results.append(exact)
    assert (results[1] - results[0]).norm() < 1e-3 * results[0].norm()


def test_operators():
    """`Rows` and `Transposed` multiply as matrices do, whatever the dtype and strides."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(70, 2 * 1100, generator=generator)
    for matrix in (wide[:, ::2].mT, wide.bfloat16()[:, :1100].mT, wide.double().mT):
        op = Rows(matrix)
        u, v = (torch.randn(size, 5, generator=generator).to(op.dtype) for size in matrix.shape)
        exact = matrix.double()
        for got, wanted in (
            (op.matmul(v), exact @ v.double()),
            (op.rmatmul(u), exact.mT @ u.double()),
            (Transposed(op).matmul(u), exact.mT @ u.double()),
            (Transposed(op).rmatmul(v), exact @ v.double()),
        ):
            assert got.dtype == op.dtype and (got - wanted).norm() < 1e-6 * wanted.norm()
        assert Transposed(op).shape == op.shape[::-1]
