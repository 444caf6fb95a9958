"""`reinit_lora_ga`: adapters in the middle of training, turned towards the present gradient, the function kept.

The adapter runs as s·(B A + F), F frozen. With new factors A′, B′ the frozen part becomes F + B A − B′A′:

    B A + F = B′A′ + (F + B A − B′A′)

kept as factors side by side, [A₀; A; A′] and [B₀, B, −B′], so that the sum of products is the same numbers in another
order: nothing is rounded, whatever dtype the base or the arithmetic has, and W0 stays as it is. The price is 2r more
columns a time; `max_rank` bounds that, by an SVD of what was learned so far, and says what it lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect import names, sharding, targets
from ..layers.linear import FusedLoraLinear
from ..linalg.lowrank import balanced
from ..optim import moments as optim_moments
from ..runtime import messages, processes, progress
from ..runtime.checks import check, check_choice, check_integer, check_module, check_positive, is_number
from .factors import SPLITS, smoothed, split_factors
from .lora_ga import ratio
from .monitor import measure, space_of
from .place import PlainStart
from .sketch import GradientSketch
from .streaming import StreamingSketch

SCALES = ("keep", "stable", "unit", "gd")


MISSING = ("error", "skip")


@dataclass(frozen=True)
class LayerReinit:
    """One layer: the sketched gradient's alignment (see `AlignmentMonitor`) with the factors before and after; the rank
    of the frozen part now; `dropped`: ‖what max_rank cut off‖_F over ‖W0‖_F, 0 where nothing was."""

    before: float
    after: float
    frozen_rank: int
    dropped: float


@dataclass(frozen=True)
class ReinitReport:
    """A line per layer; `skipped`: layers that were left as they were, and why."""

    layers: dict[str, LayerReinit]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "alignment before", "after", "frozen rank", "dropped")]
        rows += [
            (name, f"{line.before:.3f}", f"{line.after:.3f}", str(line.frozen_rank), f"{line.dropped:.1e}")
            for name, line in self.layers.items()
        ]
        return "\n".join([messages.table(rows), *(f"{name}: skipped: {why}" for name, why in self.skipped.items())])


def reinit_lora_ga(
    model: nn.Module,
    sketch: GradientSketch,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    smoothing: float = 0.5,
    moments: str = "rotate",
    split: str = "ArB2r",
    scale: str = "keep",
    gamma: float = 16,
    max_rank: int | None = None,
    missing: str = "error",
    adapter_name: str = "default",
    seed: int = 0,
) -> ReinitReport:
    """Turns a patched model's adapters towards the sketched gradient. The model computes what it did before.

    Call it between `optimizer.step()` and the next backward pass: gradients of the factors that are there are dropped.

    Args:
        model: a model patched by `fastlora.patch`, whatever its adapters started from.
        sketch: a `GradientSketch` of this model as it is now.
        optimizer: what trains it, so that its moments are carried over; None for none.
        smoothing: α in [0, 1]: the new A is α A + (1 − α) R Â, where Â are the gradient's triplets and R the rotation
            that brings them nearest to A (orthogonal Procrustes), of the length between the two; B likewise.
        moments: "rotate" or "reset" (docs/details/lora_ga_maths.md, "Re-initialisation"). Optimisers that
            are not known are reset.
        split, gamma, seed: as in `init_lora_ga`.
        scale: how long Â's rows and B̂'s columns are: "keep", as the present A's and B's are (root mean square; "stable"
            where one of them is zero); "stable", "unit", "gd" as in `init_lora_ga`.
        max_rank: bound on the rank of what the frozen part has learned; the present start is added to it. None: no
            bound, nothing is lost.
        missing: "error", or "skip" to leave layers as they are that have no gradient.
        adapter_name: which adapter.

    Returns:
        A `ReinitReport`.

    Raises:
        ValueError: an argument out of range; layers without a gradient; adapters that are merged, or whose r does not
            go with the sketch; PEFT's layers; an optimiser that trains none of the factors. On this and on any other
            exception model and optimiser are as they were.

    Examples:
        >>> with fastlora.GradientSketch(model, r=8) as sketch:
        ...     model(**batch).loss.backward()
        >>> fastlora.reinit_lora_ga(model, sketch, optimizer)

    Source: the seed of the idea is an unpublished remark (periodic re-initialisation with smoothing); Schönemann 1966
    for the rotation.
    """
    caller = "reinit_lora_ga"
    options = Options(smoothing, moments, split, scale, gamma, max_rank, seed).checked(caller)
    check_choice(caller, "missing", missing, MISSING)
    layers = layers_to_restart(caller, model, sketch, adapter_name)
    skipped = {name: "no gradient" for name in layers if not sketch.has_gradient(name)}
    if missing == "error":
        sketch.check_complete()
    plans = [
        _plan(name, layer, sketch.layers[name], adapter_name, options)
        for name, layer in progress.bar(layers.items(), "re-initialisation", len(layers))
        if name not in skipped
    ]
    changes = [change for plan in plans for change in (plan.commit, *_moment_changes(plan, optimizer, moments, caller))]
    _all_or_nothing(changes)
    return ReinitReport({plan.name: plan.report for plan in plans}, skipped)


@dataclass(frozen=True)
class Options:
    """How factors are made: `reinit_lora_ga`'s arguments."""

    smoothing: float = 0.5
    moments: str = "rotate"
    split: str = "ArB2r"
    scale: str = "keep"
    gamma: float = 16
    max_rank: int | None = None
    seed: int = 0

    def checked(self, caller: str) -> Options:
        """Raises ValueError for one out of range."""
        for argument, allowed in (("moments", optim_moments.MOMENTS), ("split", SPLITS), ("scale", SCALES)):
            check_choice(caller, argument, getattr(self, argument), allowed)
        part = is_number(self.smoothing) and 0 <= self.smoothing <= 1
        check(part, caller, "smoothing", self.smoothing, "a number in [0, 1]")
        check_positive(caller, "gamma", self.gamma)
        if self.max_rank is not None:
            check_integer(caller, "max_rank", self.max_rank, also=" or None")
        return self


def layers_to_restart(
    caller: str, model: nn.Module, sketch: GradientSketch, adapter_name: str
) -> dict[str, FusedLoraLinear]:
    """The sketched layers. Raises ValueError where one cannot be re-initialised."""
    check_module(caller, model)
    if not isinstance(sketch, GradientSketch):
        raise ValueError(f"{caller}: sketch: got {type(sketch).__name__}, want a GradientSketch")
    if any(True for _ in targets.peft_lora_layers(model)):
        raise ValueError(
            f"{caller}: model: got PEFT's LoRA layers, which have no place for what was learned so far; want a model "
            "patched by fastlora.patch (fastlora.save_adapter writes what PEFT loads)"
        )
    if sharding.has_shards(model):
        raise ValueError(
            f"{caller}: model: its parameters are sharded over processes (fully_shard, DTensor), and factors of other "
            "sizes would not be; want a model that is whole in every process (DistributedDataParallel)"
        )
    if sketch.experts:
        raise ValueError(
            f"{caller}: sketch: got experts' weights ({messages.some(sketch.experts)}), which start and are not "
            "re-initialised; want a sketch without target_parameters"
        )
    modules = dict(names.named_modules(model))
    layers: dict[str, FusedLoraLinear] = {}
    for name, size in sketch.sizes.items():
        layer = modules.get(name)
        if not isinstance(layer, FusedLoraLinear) or adapter_name not in layer.lora_A:
            raise ValueError(f"{caller}: adapter_name: {name!r} was sketched and has no adapter {adapter_name!r}")
        r = layer.r[adapter_name]
        if targets.layer_sizes(layer) != size or 2 * r > min(*size, sketch.width):
            raise ValueError(
                f"{caller}: sketch: the adapter of {name!r} ({layer.out_features}×{layer.in_features}) has r={r} and "
                f"wants 2r triplets; the sketch is {size[0]}×{size[1]} of width {sketch.width}"
            )
        if layer.scaling[adapter_name] == 0:
            raise ValueError(f"{caller}: lora_alpha: the adapter of {name!r} has scale 0, so it could never learn")
        layer.check_initial_factors(adapter_name, exact=True)
        layers[name] = layer
    return layers


@dataclass(frozen=True)
class _Plan:
    """All that is to be written to one layer, in its parameters' dtypes."""

    name: str
    layer: FusedLoraLinear
    adapter_name: str
    a: Tensor
    b: Tensor
    frozen_a: Tensor
    frozen_b: Tensor
    report: LayerReinit

    def commit(self) -> Callable[[], None]:
        layer, name = self.layer, self.adapter_name
        parameters = (layer.lora_A[name], layer.lora_B[name])
        grads = [parameter.grad for parameter in parameters]
        put_back = PlainStart(self.name, layer, name).remember()

        def restore() -> None:
            put_back()
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad

        try:
            with torch.no_grad():
                for parameter, value in zip(parameters, (self.a, self.b), strict=True):
                    parameter.copy_(value)
                    parameter.grad = None
            layer.set_frozen_factors(name, self.frozen_a, self.frozen_b)
        except BaseException:
            restore()
            raise
        return restore


def _plan(name: str, layer: FusedLoraLinear, sketch: StreamingSketch, adapter_name: str, options: Options) -> _Plan:
    lora_a, lora_b = layer.lora_A[adapter_name].detach(), layer.lora_B[adapter_name].detach()
    s = layer.scaling[adapter_name]
    new_a, new_b = _new_factors(layer, sketch, lora_a, lora_b, s, options)
    if processes.running():
        processes.copy_first(new_a, new_b)  # another machine's LAPACK may choose other signs
    learned_a, learned_b = _learned(layer, adapter_name)
    dropped = 0.0
    if options.max_rank is not None and len(learned_a) > options.max_rank:
        a, b, sigma = balanced(learned_a, learned_b, options.max_rank)
        learned_a, learned_b, lost = a.to(lora_a), b.to(lora_b), float(sigma[options.max_rank :].norm())
        norm = float(torch.linalg.vector_norm(layer.unshifted_weight(adapter_name), dtype=torch.float64))
        dropped = ratio(abs(s) * lost, norm)
    frozen_a, frozen_b = torch.cat((learned_a, new_a)), torch.cat((learned_b, -new_b), dim=1)
    before, after = (_alignment(sketch, *pair) for pair in ((lora_a, lora_b), (new_a, new_b)))
    report = LayerReinit(before, after, len(frozen_a), dropped)
    return _Plan(name, layer, adapter_name, new_a, new_b, frozen_a, frozen_b, report)


def _new_factors(
    layer: FusedLoraLinear, sketch: StreamingSketch, lora_a: Tensor, lora_b: Tensor, s: float, options: Options
) -> tuple[Tensor, Tensor]:
    r = len(lora_a)
    u, _, vh = sketch.svd(2 * r)
    a, b = split_factors(u.to(lora_a.device), vh.to(lora_a.device), r, options.split, options.seed)
    old_a, old_b = lora_a.double(), lora_b.double().t()
    size_a, size_b = _sizes(options, old_a, old_b, layer.out_features, s)
    new_a, new_b = a.double() * size_a, b.double().t() * size_b
    if bool(old_a.any()) and bool(old_b.any()):  # else the adapter has learned nothing, and B or A is a random start
        new_a, new_b = smoothed(new_a, old_a, options.smoothing), smoothed(new_b, old_b, options.smoothing)
    return new_a.to(lora_a.dtype), new_b.t().to(lora_b.dtype).contiguous()


def _sizes(options: Options, a: Tensor, b: Tensor, n: int, s: float) -> tuple[float, float]:
    """Of the new A's and B's rows, for old ones (r, d)."""
    if options.scale == "keep":
        sizes = [float(rows.norm()) / math.sqrt(len(rows)) for rows in (a, b)]
        if min(sizes) > 0:
            return sizes[0], sizes[1]
    sizes = {"unit": 1.0, "gd": 1.0 / abs(s)}
    size = sizes[options.scale] if options.scale in sizes else float(n**0.25 / math.sqrt(options.gamma))
    return size, size


def _learned(layer: FusedLoraLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Factors whose product is what the adapter adds to W0 now, start included (over s)."""
    a, b = layer.lora_A[adapter_name].detach(), layer.lora_B[adapter_name].detach()
    if not (bool(a.any()) and bool(b.any())):
        a, b = a[:0], b[:, :0]
    if adapter_name in layer.lora_A0:
        a = torch.cat((layer.lora_A0[adapter_name].detach(), a))
        b = torch.cat((layer.lora_B0[adapter_name].detach(), b), dim=1)
    return a, b


def _alignment(sketch: StreamingSketch, a: Tensor, b: Tensor) -> float:
    space = space_of(a.to(sketch.device), b.to(sketch.device))
    q, z = (factor.double() for factor in sketch.factors())
    g_right, gt_left = q @ (z.t() @ space.right.double()), z @ (q.t() @ space.left.double())
    return measure(space, g_right, gt_left, sketch.tokens, squared_norm=sketch.squared_norm()).alignment


# Writing.
def _moment_changes(plan: _Plan, optimizer: Any, moments: str, caller: str) -> list[Callable[[], Callable[[], None]]]:
    if optimizer is None:
        return []
    lora_a, lora_b = plan.layer.lora_A[plan.adapter_name], plan.layer.lora_B[plan.adapter_name]
    optim_moments.check_optimizer(optimizer, [lora_a, lora_b], caller)
    by_b = optim_moments.mixing(lora_b.t(), plan.b.t())  # A's gradient is s·BᵀG
    by_a = optim_moments.mixing(lora_a, plan.a)
    return [
        optim_moments.plan(optimizer, lora_a, by_b, 0, moments),
        optim_moments.plan(optimizer, lora_b, by_a, 1, moments),
    ]


def _all_or_nothing(changes: list[Callable[[], Callable[[], None]]]) -> None:
    undo: list[Callable[[], None]] = []
    try:
        for change in changes:
            undo.append(change())
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise
