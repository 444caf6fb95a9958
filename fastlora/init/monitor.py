"""`AlignmentMonitor`: while a model trains, how much of the full gradient its adapters can follow.

A step of an adapter moves the weight along dB·A + B·dA, whatever the optimiser: along matrices whose columns lie in
span(B) or whose rows lie in span(A). With P_B and P_A the orthogonal projectors onto these,

    alignment = ‖P_B G + G P_A − P_B G P_A‖ / ‖G‖        in [0, 1]

is the share of the full gradient G = dYᵀX that any such step can reach, and

    step cosine = ⟨D, G⟩ / (‖D‖·‖G‖),  D = s²(B Bᵀ G + G Aᵀ A)

how well the step that SGD takes points along G. Both come from G Q_A, GᵀQ_B and G times a few random vectors, which
are linear in G: they add up over micro-batches and processes, and G is never formed:
docs/details/lora_ga_maths.md, "Alignment".
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect import sharding, taps, targets
from ..layers import experts
from ..layers.state import AdapterState
from ..linalg import native
from ..runtime import messages, processes
from ..runtime.checks import check_choice, check_integer, check_module
from .sketch import experts_of

NORMS = ("probes", "exact")
# Squares of singular values of B or A below this share of the largest are rounding (in the float64 Gram matrix): the
# direction is none of the adapter's.
NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class LayerAlignment:
    """One layer at one step. `alignment` and `cosine` as in the module's docstring, NaN where the gradient was zero or
    not finite; `norm`: ‖G‖, in the loss's scale."""

    alignment: float
    cosine: float
    norm: float
    tokens: int


@dataclass(frozen=True)
class AlignmentRecord:
    """One step. `overall`: the alignment of all layers' gradients as one, √(Σ(alignment·norm)² / Σ norm²); NaN where
    no layer had a gradient."""

    step: int
    overall: float
    layers: dict[str, LayerAlignment] = field(repr=False)

    def __str__(self) -> str:
        rows = [("layer", "tokens", "‖G‖", "alignment", "step cosine")]
        rows += [
            (name, str(line.tokens), f"{line.norm:.3g}", f"{line.alignment:.3f}", f"{line.cosine:.3f}")
            for name, line in self.layers.items()
        ]
        return f"step {self.step}: alignment {self.overall:.3f}\n{messages.table(rows)}"


class AlignmentMonitor:
    """Watches the backward passes of a training run, every so many steps, and keeps a history of alignments.

    Training is not disturbed: the losses are the same bits with and without it. At steps that are not measured there
    are no hooks at all. At one that is, each layer costs two products of width r and r + `probes` with X and dY, and
    holds (2r + probes)·4·(n + m) bytes at most. Where torch.distributed is initialised, every process must have the
    monitor: the gradients count as one sum over them (as DistributedDataParallel averages them).

    Args:
        model: a patched model, or one with PEFT's LoRA layers, patched or not.
        every: measure the first step and each `every`-th after it.
        target_modules, exclude_modules: which of the LoRA layers, as in `fastlora.patch`.
        target_parameters: which weights of experts that have adapters, as in `GradientSketch`: a layer for each expert.
        norm: how ‖G‖ is found. "probes": what the adapter captures exactly, the rest estimated from random vectors
            (unbiased; the alignment, which is mostly the captured part where it is high, varies by a few hundredths
            where it is low). "exact": from Σ (dY dYᵀ)∘(X Xᵀ); keeps the step's X and dY and costs as much as forming G
            where a step has as many tokens as layers are wide: for checks.
        probes: how many random vectors.
        seed: of these. Torch's own generators are not touched.
        on_record: called with each new `AlignmentRecord`: for a logger.

    Raises:
        ValueError: no LoRA layers, AdaLoRA's adapters, experts without one, every or probes < 1, an unknown norm.

    Examples:
        >>> with fastlora.AlignmentMonitor(model, every=50) as monitor:
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         optimizer.step(), optimizer.zero_grad()
        ...         monitor.step()
        >>> print(monitor)

    Source: Wang et al. 2024, LoRA-GA, arXiv 2407.05000, for the step D; the projection is the tangent space's.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        norm: str = "probes",
        probes: int = 16,
        seed: int = 0,
        on_record: Callable[[AlignmentRecord], object] | None = None,
        target_parameters: Sequence[str] | None = None,
    ) -> None:
        check_module("AlignmentMonitor", model)
        check_integer("AlignmentMonitor", "every", every)
        check_integer("AlignmentMonitor", "probes", probes)
        check_choice("AlignmentMonitor", "norm", norm, NORMS)
        if not any(True for _ in targets.lora_layers(model)):
            raise ValueError(
                f"AlignmentMonitor: model: this {type(model).__name__} has no LoRA layers; call fastlora.patch(model) "
                "first"
            )
        self._model = model
        self._modules = dict(targets.sketchable(model, target_modules, exclude_modules))
        self._experts = experts_of(model, target_parameters, "AlignmentMonitor")
        adapted = {targets.called(name, layer): layer for name, layer in targets.lora_layers(model)}
        if without := [name for name in self._experts if name not in adapted]:
            raise ValueError(
                f"AlignmentMonitor: target_parameters: got {messages.some(without)}, which have no adapter"
            )
        self._layers = self._modules | {name: adapted[name] for name in self._experts}
        self._sizes = experts.sizes_of(self._experts)
        for name, module in self._modules.items():
            self._sizes[name] = targets.layer_sizes(getattr(module, "base_layer", module))
        if not self._layers:
            raise ValueError(
                f"AlignmentMonitor: target_modules: {target_modules!r} selects none of this {type(model).__name__}'s "
                "LoRA layers"
            )
        for name, module in self._modules.items():
            if len(getattr(module, "lora_E", ())):
                raise ValueError(
                    f"AlignmentMonitor: model: {name!r} has an AdaLoRA adapter P Λ Q, whose steps are not those of "
                    "B A; want it among exclude_modules"
                )
        self.every, self.norm, self.probes, self.seed = every, norm, probes, seed
        self.on_record = on_record
        self.history: list[AlignmentRecord] = []
        self.steps = 0  # taken so far
        self._watched: dict[str, _Watched] = {}
        self._remove_hooks: Callable[[], None] | None = None
        self._active = False

    # Running.

    def start(self) -> AlignmentMonitor:
        """Begins to watch; what `with` does. For a training loop that only offers callbacks."""
        if self._active:
            raise RuntimeError("AlignmentMonitor: this monitor is active already")
        sharding.check_whole_activations(self._model, "AlignmentMonitor")
        self._active = True
        self._arm()
        return self

    def close(self) -> None:
        """Takes every hook away again. The history stays, and `start` goes on."""
        self._active = False
        self._disarm()

    def __enter__(self) -> AlignmentMonitor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def active(self) -> bool:
        return self._active

    def step(self) -> AlignmentRecord | None:
        """Ends an optimiser step, after `optimizer.step()`; the record, where this step was measured.

        Raises RuntimeError where the monitor is not active.
        """
        if not self._active:
            raise RuntimeError("AlignmentMonitor: step: not active; call start(), or use `with monitor:`")
        record = None
        if self._remove_hooks is not None:
            record = self._record()
            self._disarm()
        self.steps += 1
        self._arm()
        if record is not None:
            self.history.append(record)
            if self.on_record is not None:
                self.on_record(record)
        return record

    def _arm(self) -> None:
        if self.steps % self.every == 0:
            others = functools.partial(experts.tap, self._experts, observe=self._observe)
            self._remove_hooks = taps.watch(self._modules, self._observe, others)

    def _disarm(self) -> None:
        if self._remove_hooks is not None:
            self._remove_hooks()
            self._remove_hooks = None
        self._watched.clear()

    def _observe(self, name: str, x: Tensor, dy: Tensor, now: taps.Pass) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            if x.shape[0]:
                self._layer(name, x.device).add(x, dy)

    def _layer(self, name: str, device: torch.device) -> _Watched:
        if name not in self._watched:
            (layer, expert), (n, m) = self._at(name), self._sizes[name]
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (self.seed + 7919 * self.steps))
            probes = torch.randn(m, self.probes, generator=generator).to(device)
            self._watched[name] = _Watched(tangent_space(layer, n, m, expert), probes, exact=self.norm == "exact")
        return self._watched[name]

    def _at(self, name: str) -> tuple[Any, int | None]:
        """The layer that has the adapters, and which of its experts."""
        if name in self._modules:
            return self._modules[name], None
        weight, _, expert = name.removesuffix("]").rpartition("[")
        return self._layers[weight], int(expert)

    def _record(self) -> AlignmentRecord:
        if processes.running():
            self._sum_over_ranks()
        layers = {name: self._watched[name].alignment() for name in self._sizes if name in self._watched}
        return AlignmentRecord(self.steps, overall_alignment(layers), layers)

    def _sum_over_ranks(self) -> None:
        if self.norm == "exact":
            raise ValueError('AlignmentMonitor: norm: got "exact" under torch.distributed, want "probes"')
        for name in self._sizes:  # a rank may have routed no token to an expert
            weight = next(self._at(name)[0].parameters())
            self._layer(name, weight.device).sum_over_ranks()

    # Showing.

    def __str__(self) -> str:
        return str(self.history[-1]) if self.history else repr(self)

    def __repr__(self) -> str:
        last = f", alignment {self.history[-1].overall:.3f} at step {self.history[-1].step}" if self.history else ""
        return (
            f"AlignmentMonitor({len(self._sizes)} layers, every={self.every}, {self.steps} steps, "
            f"{len(self.history)} records{last})"
        )

    def as_table(self) -> str:
        """The history, a line per record: overall, and the layers' least, median and greatest alignment."""
        lines = ["step   overall  least  median  greatest"]
        for record in self.history:
            known = sorted(line.alignment for line in record.layers.values() if not math.isnan(line.alignment))
            spread = (known[0], known[len(known) // 2], known[-1]) if known else (math.nan,) * 3
            lines.append(
                f"{record.step:<5}  {record.overall:.3f}    {spread[0]:.3f}  {spread[1]:.3f}   {spread[2]:.3f}"
            )
        return "\n".join(lines)


def overall_alignment(layers: dict[str, LayerAlignment]) -> float:
    """Of all layers' gradients as one vector."""
    known = [line for line in layers.values() if not math.isnan(line.alignment)]
    total = sum(line.norm**2 for line in known)
    return math.sqrt(sum((line.alignment * line.norm) ** 2 for line in known) / total) if total else math.nan


# The tangent space of a layer's adapters.
@dataclass(frozen=True)
class TangentSpace:
    """Orthonormal `left` (n, rB) of span(B), `right` (m, rA) of span(Aᵀ), float32, with zero columns where B or A has
    fewer directions than columns; `left_squares` and `right_squares`: squared singular values of s·B and A."""

    left: Tensor
    right: Tensor
    left_squares: Tensor
    right_squares: Tensor


def tangent_space(layer: Any, n: int, m: int, expert: int | None = None) -> TangentSpace:
    """Of the adapters that run and train now: a frozen A leaves nothing for B's columns to be carried by."""
    lefts, rights = [], []
    for a, b, scaling in _running_factors(layer):
        own_a, own_b = a.detach(), b.detach()
        if expert is not None:
            own_a, own_b = (part[expert] for part in experts.by_expert(own_a, own_b, layer.num_experts))
        if a.requires_grad:
            lefts.append(own_b.double() * abs(scaling))
        if b.requires_grad:
            rights.append(own_a.t().double() * abs(scaling))
    device = next(layer.parameters()).device
    left, left_squares = _basis(torch.cat(lefts, dim=1) if lefts else torch.zeros(n, 0, device=device).double())
    right, right_squares = _basis(torch.cat(rights, dim=1) if rights else torch.zeros(m, 0, device=device).double())
    return TangentSpace(left, right, left_squares, right_squares)


def space_of(a: Tensor, b: Tensor) -> TangentSpace:
    """Of one adapter A (r, m), B (n, r)."""
    (left, left_squares), (right, right_squares) = _basis(b.detach().double()), _basis(a.detach().t().double())
    return TangentSpace(left, right, left_squares, right_squares)


def _running_factors(layer: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    if layer.merged_adapters or layer.disable_adapters:
        return
    for name in layer.active_adapters:
        if isinstance(layer, AdapterState):
            yield layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        elif name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            # Where the adapter has a frozen start, `weight` is both halves (integrations/peft/starts.py).
            a, b = (getattr(linear, "trained", linear.weight) for linear in (down, up))
            yield a, b, float(layer.scaling[name])


def _basis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (float32) that span the columns of `factor` (float64), and the squared singular values."""
    gram = (factor.t() @ factor).cpu()  # r×r: an eigendecomposition on a GPU would take longer than the way there
    squares, rotation = torch.linalg.eigh(gram)
    kept = squares > NEGLIGIBLE * squares.amax() if squares.numel() else squares > 0
    inverse = torch.where(kept, squares, 1.0).rsqrt() * kept
    basis = factor @ (rotation * inverse).to(factor.device)
    return basis.float(), torch.where(kept, squares, 0.0).to(factor.device)


# One layer during one step.
class _Watched:
    def __init__(self, space: TangentSpace, probes: Tensor, exact: bool) -> None:
        self.space, self.probes, self.exact = space, probes, exact
        n, m = space.left.shape[0], space.right.shape[0]
        # G [Q_A, P] and GᵀQ_B.
        self.g_right = torch.zeros(n, space.right.shape[1] + probes.shape[1], device=probes.device)
        self.gt_left = torch.zeros(m, space.left.shape[1], device=probes.device)
        self.tokens = 0
        self._seen: list[tuple[Tensor, Tensor]] = []  # for the exact norm
        self._squared_norm = torch.zeros((), dtype=torch.float64, device=probes.device)

    def add(self, x: Tensor, dy: Tensor) -> None:
        self.g_right += native.factored_product(x, dy, torch.cat((self.space.right, self.probes), dim=1), 1.0)
        if self.space.left.shape[1]:
            self.gt_left += native.factored_product(dy, x, self.space.left, 1.0)
        self.tokens += x.shape[0]
        if self.exact:
            self._seen.append((x.detach().double(), dy.detach().double().clone()))
            newest_x, newest_dy = self._seen[-1]
            for other_x, other_dy in self._seen:
                twice = 1.0 if other_x is newest_x else 2.0
                self._squared_norm += twice * ((newest_dy @ other_dy.t()) * (newest_x @ other_x.t())).sum()

    def sum_over_ranks(self) -> None:
        processes.add(self.g_right, self.gt_left)
        (self.tokens,) = processes.added(self.tokens)

    def alignment(self) -> LayerAlignment:
        columns = self.space.right.shape[1]
        squared_norm = self._squared_norm if self.exact else None
        return measure(
            self.space, self.g_right[:, :columns], self.gt_left, self.tokens,
            squared_norm=squared_norm, probed=self.g_right[:, columns:], probes=self.probes,
        )  # fmt: skip


def measure(
    space: TangentSpace,
    g_right: Tensor,
    gt_left: Tensor,
    tokens: int,
    *,
    squared_norm: Tensor | float | None = None,
    probed: Tensor | None = None,
    probes: Tensor | None = None,
) -> LayerAlignment:
    """From G Q_A (n, rA) and GᵀQ_B (m, rB), and ‖G‖² or G P for random normal P (m, p)."""
    g_right, gt_left, left = g_right.double(), gt_left.double(), space.left.double()
    corner = left.t() @ g_right  # Q_BᵀG Q_A
    left_parts, right_parts = gt_left.square().sum(dim=0), g_right.square().sum(dim=0)
    captured = left_parts.sum() + right_parts.sum() - corner.square().sum()
    if squared_norm is None:
        assert probed is not None and probes is not None
        rest = probed.double() - g_right @ (space.right.double().t() @ probes.double())
        rest = rest - left @ (left.t() @ rest)
        squared_norm = captured + rest.square().sum() / probes.shape[1]
    along = (space.left_squares * left_parts).sum() + (space.right_squares * right_parts).sum()
    squared_step = (
        (space.left_squares.square() * left_parts).sum()
        + (space.right_squares.square() * right_parts).sum()
        + 2 * (space.left_squares.unsqueeze(1) * space.right_squares * corner.square()).sum()
    )
    numbers = torch.stack([captured, torch.as_tensor(squared_norm).to(captured), along, squared_step]).tolist()
    captured, squared, along, squared_step = (float(number) for number in numbers)
    if not all(math.isfinite(number) for number in (captured, squared, along, squared_step)):
        return LayerAlignment(math.nan, math.nan, math.nan, tokens)
    if squared <= 0:
        return LayerAlignment(math.nan, math.nan, 0.0, tokens)
    alignment = math.sqrt(min(1.0, max(0.0, captured / squared)))
    cosine = along / math.sqrt(squared_step * squared) if squared_step > 0 else 0.0
    return LayerAlignment(alignment, min(1.0, cosine), math.sqrt(squared), tokens)
