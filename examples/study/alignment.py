"""How near an adapter's first step comes to full fine-tuning's, layer by layer. Deterministic.

Full fine-tuning's first step moves a weight by a multiple of G, its gradient, with SGD, and of sign(G) with Adam. One
step on an adapter moves the effective weight, to first order in the learning rate, by a multiple of

    s·(∂B A + B ∂A)    with ∂ the adapter's gradients (SGD) or their signs (Adam).

The `residual` of a layer is the share of the squared norm of full fine-tuning's change that is missed at the best
multiple, and `cosine` the angle's: residual = 1 - cosine², and one learning rate serves all layers only so far. `bound`
is the least residual of any change of rank 2r, which a step on an adapter of rank r cannot exceed. G is that of
compare.py's sketch batches at seed 0, taken by autograd from the model itself; the adapters' gradients are those of
their own layers.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from study.contestants import Contestant
from study.learner import lora_layers, prepared_model
from study.progress import Progress
from study.tables import format_table
from study.tasks.task import Task

GAMMA = {"gamma": 16.0}  # which has no influence: factors of another size step in the same direction
STARTS = {
    "lora": Contestant("LoRA: A random, B zero"),
    "pissa": Contestant("PiSSA", {"init_lora_weights": "pissa"}),
    "lora_ga": Contestant("LoRA-GA", start="lora_ga", numbers=GAMMA),
    "sign_svd": Contestant("LoRA-GA of sign(G)", start="sign_svd", numbers=GAMMA),
    "sign": Contestant("for Adam, minimised directly", start="sign", numbers=GAMMA),
}
STEPS = ("sgd", "adam")
BOUND = "bound"
SEED = 0

Tensors = dict[str, torch.Tensor]


def measure(task: Task) -> dict[str, Any]:
    """step -> start -> layer -> [residual, cosine]; and step -> "bound" -> layer -> [residual, cosine].

    Where 2r is more than some layer's shorter side, only LoRA's start is there: the others take 2r singular vectors.
    """
    gradients = full_gradients(task)
    wanted = {"sgd": gradients, "adam": {name: gradient.sign() for name, gradient in gradients.items()}}
    found: dict[str, Any] = {step: {BOUND: _bounds(wanted[step], 2 * task.settings.r)} for step in STEPS}
    shortest = min(min(gradient.shape) for gradient in gradients.values())
    starts = {name: entry for name, entry in STARTS.items() if 2 * task.settings.r <= shortest or name == "lora"}
    with Progress(len(starts), "first steps", lines=1) as progress:
        for start, entry in starts.items():
            changes = first_changes(task, entry)
            for step in STEPS:
                found[step][start] = {
                    name: beside(change, wanted[step][name]) for name, change in changes[step].items()
                }
            progress.advance(entry.title)
    return found


def full_gradients(task: Task) -> Tensors:
    """The gradient of every weight that has an adapter in the other runs, in float64."""
    model = task.fresh_model(SEED)
    adapted = task.adapted(model)
    task.backward_passes(model, task.gradient_batches(SEED))
    modules = dict(adapted.named_modules())
    layers = lora_layers(task.adapted(prepared_model(task, STARTS["lora"], SEED)))
    return {name: modules[name].weight.grad.double() for name in layers}  # type: ignore[union-attr]


def first_changes(task: Task, entry: Contestant) -> dict[str, Tensors]:
    """step -> layer -> what the first step adds to the effective weight, up to the learning rate and the sign."""
    model = prepared_model(task, entry, SEED)
    task.backward_passes(model, task.gradient_batches(SEED))
    changes: dict[str, Tensors] = {step: {} for step in STEPS}
    for name, layer in lora_layers(task.adapted(model)).items():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        factors = a.detach().double(), b.detach().double()
        slopes = a.grad.double(), b.grad.double()
        scaling = layer.scaling["default"]
        changes["sgd"][name] = scaling * (slopes[1] @ factors[0] + factors[1] @ slopes[0])
        changes["adam"][name] = scaling * (slopes[1].sign() @ factors[0] + factors[1] @ slopes[0].sign())
    return changes


def beside(change: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """[residual at the best multiple, cosine] of `change` next to `wanted`."""
    inner, squared, whole = (float((x * y).sum()) for x, y in ((change, wanted), (change, change), (wanted, wanted)))
    if squared == 0 or whole == 0:
        return [1.0, 0.0]
    best = max(0.0, inner / squared)  # a learning rate is not negative
    return [float((best * change - wanted).square().sum()) / whole, inner / (squared * whole) ** 0.5]


def _bounds(wanted: Tensors, rank: int) -> dict[str, list[float]]:
    """Eckart and Young: what the best change of this rank misses."""
    bounds = {}
    for name, matrix in wanted.items():
        squares = torch.linalg.svdvals(matrix).square()
        residual = float(squares[rank:].sum() / squares.sum())
        bounds[name] = [residual, (1 - residual) ** 0.5]
    return bounds


def table(found: dict[str, Any]) -> str:
    """The median over layers (smallest to largest), by start."""
    titles = {start: entry.title for start, entry in STARTS.items()} | {BOUND: "any change of rank 2r"}
    header = ("start", *(f"{name}, {what}" for name in ("SGD", "Adam") for what in ("residual", "cosine")))
    body = []
    for start, title in titles.items():
        if start not in found[STEPS[0]]:
            continue
        cells = []
        for step in STEPS:
            for values in zip(*found[step][start].values()):
                cells.append(f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        body.append((title, *cells))
    return format_table(header, body)


def table_by_layer(found: dict[str, Any]) -> str:
    """Every layer's residual."""
    starts = [start for start in (*STARTS, BOUND) if start in found[STEPS[0]]]
    header = ("residual", *(f"{name}, {start}" for name in ("SGD", "Adam") for start in starts))
    layers = found[STEPS[0]][BOUND]
    body = [(layer, *(f"{found[step][s][layer][0]:.3f}" for step in STEPS for s in starts)) for layer in layers]
    return format_table(header, body)
