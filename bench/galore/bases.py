"""How much of real gradients a basis holds, for GaLore: those of MiniLM's linear layers in the docstring task
(examples/), a few steps into its fine-tuning, batch by batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.linalg import orthonormal
from fastlora.linalg.operators import Rows
from fastlora.linalg.svd import subspace_iteration
from fastlora.optim.galore.projector import EXTRA_COLUMNS

from ..starts.lora_ga import docstring_task, full_gradients

WARM_UP, BATCHES, HELD_OUT = 10, 16, 8  # steps of training before; batches that bases are made of; and that test them
RANKS = (8, 32, 128)
EVERY = 3  # of the 36 layers


def batch_gradients(batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Each batch's gradients, by layer."""
    task = docstring_task(WARM_UP + BATCHES + HELD_OUT, batch_size)
    task.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-4)
    for batch in task.batches[:WARM_UP]:
        task.loss(task.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    task.model.requires_grad_(False)
    found = []
    for batch in task.batches[WARM_UP:]:
        gradients = full_gradients(replace(task, batches=[batch]))
        found.append({name: gradients[name] for name in list(gradients)[::EVERY]})
    return found


def exact_basis(g: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(g, full_matrices=False)[0][:, :rank]


def energy(basis: Tensor, g: Tensor) -> float:
    return float((basis.t() @ g).square().sum())


def iterations(batches: list[dict[str, Tensor]], rank: int, extra: int, count: int) -> list[float]:
    """What `count` iterations from another batch's basis hold, over the best, of each layer."""
    generator, found = torch.Generator().manual_seed(0), []
    for name, g in batches[1].items():
        old = exact_basis(batches[0][name], rank)
        start = torch.cat((old, torch.randn(g.shape[0], extra, generator=generator)), dim=1)
        s = subspace_iteration(Rows(g), orthonormal(start), count)[1][:rank]
        found.append(float(s.square().sum() / torch.linalg.svdvals(g)[:rank].square().sum()))
    return found


def of_others(batches: list[dict[str, Tensor]], rank: int, summed: int) -> float:
    """Median over layers of what the basis of a sum over batches holds of other batches' gradients."""
    shares = []
    for name in batches[0]:
        basis = exact_basis(sum(batch[name] for batch in batches[:summed]), rank)  # type: ignore[arg-type]
        others = [batch[name] for batch in batches[BATCHES:]]
        shares.append(statistics.mean(energy(basis, g) / float(g.square().sum()) for g in others))
    return statistics.median(shares)


def measure() -> dict[str, Any]:
    """Raises FileNotFoundError where MiniLM's weights are not installed."""
    batches, result = batch_gradients(), {"iterations": {}, "of_others": {}}
    for rank in RANKS:
        for extra in (0, EXTRA_COLUMNS):
            for count in (1, 2):
                shares = iterations(batches, rank, extra, count)
                key = f"r={rank}, {extra} random columns, {count} iterations"
                result["iterations"][key] = {"median": statistics.median(shares), "worst": min(shares)}
        for summed in (1, 4, 16):
            result["of_others"][f"r={rank}, sum of {summed}"] = of_others(batches, rank, summed)
    return result


def table(result: dict[str, Any]) -> str:
    show: Callable[[Any], str] = lambda value: (  # noqa: E731
        f"{value:.3f}" if isinstance(value, float) else f"{value['median']:.4f} (worst {value['worst']:.4f})"
    )
    return "\n".join(f"{kind}: {key}: {show(value)}" for kind in result for key, value in result[kind].items())
