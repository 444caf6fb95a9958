"""`GaLoreAdamW.official` beside the authors' algorithm: a transcription of it in float64, and their package where it is
installed."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from galore_problem import RANK, backward, difference, net, optimizer_of, parameters_of, train
from torch import Tensor

from fastlora.optim import GaLoreAdamW, galore_param_groups
from fastlora.optim.galore.projector import PROJ_TYPES

GROUP: dict[str, Any] = {"update_proj_gap": 7, "scale": 0.25, "weight_decay": 0.01}


class Transcription:
    """galore_torch 1.0: adamw.py's step and galore_projector.py's projector for one parameter, with an SVD in the
    parameter's own precision."""

    def __init__(self, weight: Tensor, group: dict[str, Any]) -> None:
        self.weight, self.group, self.count = weight, group, 0
        self.basis: Any = None
        self.side: Any = None
        self.exp_avg: Any = None

    def project(self, g: Tensor) -> Tensor:
        proj_type, r = self.group["proj_type"], self.group["rank"]
        tall = g.shape[0] >= g.shape[1]
        self.side = {"std": ("left", "right")[tall], "reverse_std": ("right", "left")[tall]}.get(proj_type, proj_type)
        if self.basis is None or self.count % self.group["update_proj_gap"] == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            self.basis = (u[:, :r], vh[:r])
        u, vh = self.basis
        return {"left": lambda: u.t() @ g, "right": lambda: g @ vh.t(), "full": lambda: u.t() @ g @ vh.t()}[self.side]()

    def back(self, low: Tensor) -> Tensor:
        u, vh = self.basis
        full = {"left": lambda: u @ low, "right": lambda: low @ vh, "full": lambda: u @ low @ vh}[self.side]()
        return full * self.group["scale"]

    def step(self, g: Tensor) -> None:
        group = self.group
        low = self.project(g) if "rank" in group else g
        if self.exp_avg is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(low), torch.zeros_like(low)
        self.count += 1
        beta1, beta2 = group["betas"]
        self.exp_avg.mul_(beta1).add_(low, alpha=1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2**self.count) / (1 - beta1**self.count)
        normalised = self.exp_avg / self.exp_avg_sq.sqrt().add_(group["eps"])
        self.weight.add_(self.back(normalised) if "rank" in group else normalised, alpha=-size)
        if group["weight_decay"] > 0:
            self.weight.add_(self.weight, alpha=-group["lr"] * group["weight_decay"])


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_trajectory_is_the_transcription_s(proj_type, correct_bias):
    model, other = net(), net()
    groups = galore_param_groups(model, RANK, proj_type=proj_type, **GROUP)
    optimizer = GaLoreAdamW.official(groups, lr=0.01, correct_bias=correct_bias)
    theirs = galore_param_groups(other, RANK, proj_type=proj_type, **GROUP)
    defaults = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "correct_bias": correct_bias}
    transcribed = [Transcription(p, defaults | group) for group in theirs for p in group["params"]]
    for step in range(25):  # four bases
        train(model, optimizer, 1, start=step)
        other.zero_grad()
        backward(other, step)
        with torch.no_grad():
            for one in transcribed:
                assert one.weight.grad is not None
                one.step(one.weight.grad)
        assert difference(model, other) < 1e-11, step
    assert all(one.basis is not None for one in transcribed if "rank" in one.group)
    assert difference(model, net()) > 0.01


@pytest.mark.parametrize("gradients", ["plain", "hook"])
@pytest.mark.skipif(find_spec("galore_torch") is None, reason="no galore-torch here (the test extra has it)")
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_trajectory_is_the_package_s(proj_type, gradients):
    from galore_torch import GaLoreAdamW as Theirs

    model, other = net(torch.float32), net(torch.float32)
    optimizer = GaLoreAdamW.official(
        galore_param_groups(model, RANK, proj_type=proj_type, **GROUP), lr=0.01, gradients=gradients
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        groups: Any = galore_param_groups(other, RANK, proj_type=proj_type, **GROUP)
        theirs = Theirs(groups, lr=0.01)
    for step in range(25):
        train(model, optimizer, 1, start=step)
        other.zero_grad()
        backward(other, step)
        theirs.step()
        # Rounding turns singular vectors of close singular values: the trajectories part slowly.
        assert difference(model, other) < 1e-4, step


def test_our_defaults_are_not_the_official_ones():
    model, other = net(), net()
    train(model, GaLoreAdamW.official(galore_param_groups(model, RANK, **GROUP), lr=0.01), 20)
    train(other, optimizer_of(other, GROUP), 20)
    assert difference(model, other) > 1e-3
    assert torch.isfinite(parameters_of(other)).all()
