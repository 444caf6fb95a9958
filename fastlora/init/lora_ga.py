"""LoRA-GA: adapters that start along the full gradient (Wang et al. 2024, arXiv 2407.05000).

For any A, B the first SGD step moves the weight by −η s²·(B Bᵀ G + G Aᵀ A), of rank at most 2r. With orthonormal
factors from disjoint halves of G's leading 2r singular triplets that is the best approximation of G of rank 2r (Eckart
and Young). B₀A₀ is not zero then; W0 + s·(B A − B₀A₀) keeps the first output. `base="exact"` runs the second term
next to the first and leaves W0 alone; `base="offset"` folds it into W0, the paper's way.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import linalg
from ..adapters import patch
from ..integrations.peft.starts import PeftConfiguration, PeftStart, has_start
from ..introspect import names, sharding, targets
from ..layers.starts import check_not_shared
from ..layers.state import AdapterState
from ..runtime import messages, progress
from ..runtime.checks import check_choice, check_module, check_positive, is_integer
from .factors import SPLITS, split_factors
from .place import ExpertStart, Place, PlainStart
from .report import DRIFT
from .sign import SignFactors
from .sketch import GradientSketch

SCALES = ("stable", "unit", "gd", "weight_svd")
BASES = ("exact", "offset")
MISSING = ("error", "kaiming")
NOTHING = 1e6  # times its weight's norm: a start next to which the weight is nothing


def init_lora_ga(
    model: nn.Module,
    sketch: GradientSketch | SignFactors,
    split: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16,
    base: str = "exact",
    *,
    lora_alpha: float = 16,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    adapter_name: str = "default",
    norm_clip: float | None = None,
    missing: str = "error",
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
) -> StartSizes:
    """Sets the adapters of a model from a gradient sketch. The output is then that of the model without the adapter.

    Args:
        model: a plain model, whose sketched layers are patched with adapters of the sketch's r; or a patched or PEFT
            model (4-bit and 8-bit bitsandbytes layers too), whose adapters named `adapter_name` are set in the sketched
            layers. In a PEFT model they may have ranks below the sketch's.
        sketch: a `GradientSketch` that has seen backward passes, or what `sign_factors` found (and has split already).
        split: which of the leading 2r triplets go to A and which to B (U (n, 2r), Vh (2r, m)): "ArB2r", A = Vh[:r] and
            B = U[:, r:], the original code's default; "A2rBr", the other way round; "ArBr", alternating; "random".
        scale: of both factors: "stable", n^¼/√γ; "unit", 1; "gd", 1/s, so that one step of SGD moves the weight as full
            fine-tuning's best rank-2r step does; "weight_svd", the mean of √(σᵢ(W0)/s).
        gamma: γ of "stable". 16 suits wide models; narrow ones (n < 1024) want more: see norm_clip.
        base: "exact" leaves W0 untouched and runs −B₀A₀ as frozen second half of the adapter (rank 2r); "offset"
            subtracts s·B₀A₀ from W0, rounded once to its dtype, for parity with the paper.
        lora_alpha, use_rslora, lora_dropout: as in `fastlora.patch`, for a plain model; others keep their own.
        adapter_name: the adapter to set.
        norm_clip: upper bound of ‖s·B₀A₀‖_F as a fraction of ‖W0‖_F; larger factors are scaled down to it. A weight
            of zeros (or a millionth of the start) bounds nothing: factors scaled down to it would never learn.
        missing: "error", or "kaiming" to give layers without a gradient LoRA's ordinary start.
        seed: of the "random" split.
        ranks: layer -> rank where it is not the sketch's r, as from `allocate_ranks`; 2·rank <= the sketch's width. A
            plain model is patched with them, and with such alphas that every layer has the s that it has at r; other
            models' adapters must have them. The adapter of a weight of experts has the largest of their ranks, and
            zeros that stay zero where an expert's is lower.

    Returns:
        Per layer ‖s·B₀A₀‖_F/‖W0‖_F, how large the start is relative to the weight (0 for a layer without a gradient,
        infinite for a weight of zeros), as a dict that prints as a summary. Starts larger than their weights are a
        warning.

    Raises:
        ValueError: a model that DistributedDataParallel or `fully_shard` has wrapped already; an unknown split, scale,
            base or missing; γ <= 0; layers without a gradient; adapters whose r or shape does not match the sketch, or
            that are merged; a layer with fewer than 2r singular triplets; ranks of layers that are not in the sketch,
            or out of range; "weight_svd" for a weight of zeros; "offset" for experts, a quantised weight, or one that
            several modules use; DoRA and PEFT's other variants of LoRA, and its layers other than linear ones and
            experts. The model is then as it was, as after any other error.

    Examples:
        >>> with fastlora.GradientSketch(model, r=8) as sketch:
        ...     model(**batch).loss.backward()
        >>> fastlora.init_lora_ga(model, sketch)

    Source: Wang et al. 2024, arXiv 2407.05000, equations 8 to 12.
    """
    checked = (("split", split, SPLITS), ("scale", scale, SCALES), ("base", base, BASES), ("missing", missing, MISSING))
    for argument, value, choices in checked:
        check_choice("init_lora_ga", argument, value, choices)
    check_positive("init_lora_ga", "gamma", gamma)
    if norm_clip is not None:
        check_positive("init_lora_ga", "norm_clip", norm_clip)
    _check_models(model, sketch)
    ranks = _checked_ranks(ranks, sketch)
    if missing == "error":
        sketch.check_complete()
    plain = not any(True for _ in targets.lora_layers(model))
    if plain:
        linear, whole = list(_linear_sizes(sketch)), _whole_ranks(ranks, sketch)
        patch.patch(
            model,
            r=sketch.r,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            lora_dropout=lora_dropout,
            target_modules="|".join(re.escape(name) for name in linear) if linear else [],
            target_parameters=list(sketch.experts) or None,
            adapter_name=adapter_name,
            strict=True,
            rank_pattern={names.pattern(name): rank for name, rank in whole.items()},
            alpha_pattern={
                names.pattern(name): lora_alpha * (math.sqrt(rank / sketch.r) if use_rslora else rank / sketch.r)
                for name, rank in whole.items()
            },
        )
    undo: list[Callable[[], None]] = []
    try:
        places = _places(model, sketch, adapter_name, base, ranks)
        peft = PeftConfiguration(model, adapter_name) if _is_peft(model) else None
        starts: dict[str, _Start | None] = {}
        starts.update(dict.fromkeys(places))
        factors = _factors(places, sketch, split, seed)
        for name, a, b in progress.bar(factors, "LoRA-GA", len(places)):
            starts[name] = _scaled(places[name], a, b, scale, gamma, norm_clip)
        for name, start in starts.items():
            if not plain:
                undo.append(places[name].remember())
            if start is None:
                places[name].reset()
            else:
                places[name].set(start.a, start.b, exact=base == "exact")
        if peft is not None:
            undo.append(peft.remember())
            peft.update()
    except BaseException:
        while undo:
            undo.pop()()
        if plain:
            patch.unpatch(model)
        raise
    sizes = StartSizes({name: 0.0 if start is None else start.relative_size for name, start in starts.items()})
    if sizes.large:
        warnings.warn(
            f"fastlora.init_lora_ga: the start is larger than the weight in {len(sizes.large)} of {len(sizes)} layers, "
            f"{_largest(sizes)}; raise gamma (got {gamma}), lower r, or bound it with norm_clip=0.5",
            UserWarning,
            stacklevel=2,
        )
    return sizes


class StartSizes(dict[str, float]):
    """Layer -> ‖s·B₀A₀‖_F/‖W0‖_F; `str` of it is a summary, `table()` has every layer."""

    @property
    def large(self) -> list[str]:
        """The layers whose start is larger than their weight, which is not zero."""
        return [name for name, size in self.items() if 1 < size < math.inf]

    def __str__(self) -> str:
        started = [size for size in self.values() if size > 0]
        text = f"{len(self)} layers, {len(started)} of them start along their gradient"
        if started:
            middle = sorted(started)[len(started) // 2]
            text += f": ‖s·B₀A₀‖ is {middle:.2g} ‖W0‖ (median), {_largest(self)}"
        return text

    __repr__ = __str__

    def table(self) -> str:
        """A line per layer."""
        return messages.table([("layer", "‖s·B₀A₀‖/‖W0‖"), *((name, f"{size:.3g}") for name, size in self.items())])

    def __reduce__(self) -> tuple[type[dict], tuple[dict[str, float]]]:
        return dict, (dict(self),)


def _largest(sizes: Mapping[str, float]) -> str:
    name = max(sizes, key=lambda name: sizes[name])
    return f"at most {sizes[name]:.3g} ‖W0‖ in {name}"


def undo_lora_ga(model: nn.Module, adapter_name: str = "default") -> None:
    """Takes `init_lora_ga` back: adapters with a start become ordinary LoRA again (A random, B zero), at their trained
    rank, and weights that base="offset" has shifted get their bits back.

    Raises ValueError while adapters are merged, or parameters sharded. The model is then as it was.
    """
    if sharding.has_shards(model):
        raise ValueError(f"undo_lora_ga: model: its parameters are sharded over processes, want this {sharding.BEFORE}")
    places = []
    for name, layer in targets.lora_layers(model):
        if isinstance(layer, AdapterState):
            if adapter_name in layer.lora_A0:
                places.append(PlainStart(name, layer, adapter_name))
        elif has_start(layer, adapter_name):
            places.append(PeftStart(targets.called(name, layer), layer, adapter_name))
    for place in places:
        place.check(exact=True)
    for place in places:
        place.reset()
    if _is_peft(model) and places:
        PeftConfiguration(model, adapter_name).update()


@dataclass(frozen=True)
class _Start:
    """A₀ and B₀ in float32 on the layer's device, and ‖s·B₀A₀‖_F/‖W0‖_F."""

    a: Tensor
    b: Tensor
    relative_size: float


def _check_models(model: nn.Module, sketch: GradientSketch | SignFactors) -> None:
    check_module("init_lora_ga", model)
    if not isinstance(sketch, (GradientSketch, SignFactors)):
        raise ValueError(f"init_lora_ga: sketch: got {type(sketch).__name__}, want a GradientSketch")
    if (wrapped := sharding.wrapper(model)) is not None:
        raise ValueError(
            f"init_lora_ga: model: got {wrapped}, want init_lora_ga {sharding.BEFORE}. A sharded model can be "
            "sketched: sketch.save, then GradientSketch.load and init_lora_ga in a model that is not wrapped yet"
        )
    modules = dict(names.named_modules(model))
    lora_layers = dict(targets.lora_layers(model))
    there = {name: parameter.shape for name, *_, parameter in targets.parameters_outside_adapters(model)}
    for name in sketch.experts:
        count = sum(expert.rpartition("[")[0] == name for expert in sketch.names)
        n, m = sketch.sizes[f"{name}[0]"]
        if there.get(name) not in ((count, n, m), (count, m, n)):
            raise ValueError(f"init_lora_ga: model: no experts' weight {name!r} of the sketch's shape is in this model")
    for name, size in _linear_sizes(sketch).items():
        layer = modules.get(name)
        wanted = f"{size[0]}×{size[1]}"
        linear = isinstance(layer, nn.Linear) or targets.is_conv1d(layer)  # type: ignore[arg-type]
        if not linear and name not in lora_layers:
            found = "no such module" if layer is None else type(layer).__name__
        elif targets.layer_sizes(layer) != size:
            found = "{}×{}".format(*targets.layer_sizes(layer))
        elif not lora_layers and type(layer).__module__.startswith("bitsandbytes."):  # type: ignore[arg-type]
            raise ValueError(
                f"init_lora_ga: model: {name!r} is a {type(layer).__name__}, quantised, which patch leaves alone; put "
                "PEFT's LoRA layers around it (peft.get_peft_model) and pass that model"
            )
        else:
            continue
        raise ValueError(
            f"init_lora_ga: model: {name!r} was sketched as a linear layer {wanted} and is {found} in this "
            f"{type(model).__name__}; want the model that was sketched: plain, patched by fastlora.patch, or PEFT's"
        )


def _linear_sizes(sketch: GradientSketch | SignFactors) -> dict[str, tuple[int, int]]:
    """(n, m) of what was sketched but for experts."""
    return {name: size for name, size in sketch.sizes.items() if _whole(name, sketch) == name}


def _whole(name: str, sketch: GradientSketch | SignFactors) -> str:
    """The layer that has the adapter: for an expert, the weight."""
    weight = name.rpartition("[")[0]
    return weight if weight in sketch.experts else name


def _whole_ranks(ranks: Mapping[str, int], sketch: GradientSketch | SignFactors) -> dict[str, int]:
    """The ranks of layers, of weights of experts the largest of theirs, where some are given."""
    given = {_whole(name, sketch) for name in ranks}
    found: dict[str, int] = {}
    for name in sketch.names:
        if (whole := _whole(name, sketch)) in given:
            found[whole] = max(found.get(whole, 0), ranks.get(name, sketch.r))
    return found


def _checked_ranks(ranks: Mapping[str, int] | None, sketch: GradientSketch | SignFactors) -> dict[str, int]:
    ranks = dict(ranks or {})
    if ranks and isinstance(sketch, SignFactors):
        raise ValueError("init_lora_ga: ranks: got some with SignFactors, whose ranks are what they are; want None")
    unknown = [name for name in ranks if name not in sketch.names]
    if unknown:
        raise ValueError(f"init_lora_ga: ranks: got {messages.some(unknown)}, which the sketch has not seen")
    for name, rank in ranks.items():
        most = sketch.width // 2 if isinstance(sketch, GradientSketch) else sketch.r
        if not is_integer(rank) or rank > most:
            raise ValueError(
                f"init_lora_ga: ranks: got {rank!r} for {name!r}, want an integer in [1, {most}] (half of the sketch's "
                "width)"
            )
    return ranks


def _places(
    model: nn.Module, sketch: GradientSketch | SignFactors, adapter_name: str, base: str, ranks: dict[str, int]
) -> dict[str, Place]:
    """Where the starts go. Raises ValueError where one cannot."""
    lora_layers = {targets.called(name, layer): layer for name, layer in targets.lora_layers(model)}
    whole_ranks = _whole_ranks(ranks, sketch)
    wholes: dict[str, PlainStart | PeftStart] = {}
    places: dict[str, Place] = {}
    for name, size in sketch.sizes.items():
        whole = _whole(name, sketch)
        layer = lora_layers.get(whole)
        if layer is None:
            raise ValueError(
                f"init_lora_ga: model: {name!r} was sketched and is not patched, as others here are; patch it too, or "
                "sketch again with target_modules"
            )
        kind = PlainStart if isinstance(layer, AdapterState) else PeftStart
        place: Place = wholes.get(whole) or kind(whole, layer, adapter_name)
        r = whole_ranks.get(whole, sketch.r)
        may_be_lower = kind is PeftStart and whole not in whole_ranks and isinstance(sketch, GradientSketch)
        if place.r > r or (place.r != r and not may_be_lower):
            what = "ranks say" if whole in whole_ranks else "the sketch has"
            raise ValueError(
                f"init_lora_ga: r: {what} r={r}, but the adapter {adapter_name!r} of {whole!r} has "
                f"r={place.r}; sketch with that r"
            )
        if whole != name:
            wholes[whole] = place
            place = ExpertStart(name, place, min(place.r, ranks.get(name, sketch.r)))
        if 2 * place.r > min(size):
            raise ValueError(
                f"init_lora_ga: r: {name!r} is {size[0]}×{size[1]} and has fewer than 2r = {2 * place.r} singular "
                "triplets; sketch with a smaller r, or leave it out with exclude_modules"
            )
        place.check(exact=base == "exact")
        places[name] = place
    if base == "offset":
        weights = {name: place.base_parameter for name, place in places.items()}
        check_not_shared(model, weights, 'init_lora_ga: base="offset"', 'want base="exact"')
    return places


def _is_peft(model: nn.Module) -> bool:
    return any(True for _ in targets.peft_lora_layers(model))


def _factors(
    places: dict[str, Place], sketch: GradientSketch | SignFactors, split: str, seed: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, A, B) before scaling, of the layers that have a gradient."""
    seen = [name for name in places if sketch.has_gradient(name)]
    if isinstance(sketch, SignFactors):
        for name in seen:
            device = places[name].device
            yield name, sketch.layers[name].a.to(device), sketch.layers[name].b.to(device)
        return
    most = max((places[name].r for name in seen), default=1)
    cancelled = []
    for name, (u, s, vh) in zip(seen, sketch.triplets(seen, 2 * most)):
        if sketch.layers[name].measure(u, s, vh).drift > DRIFT:
            cancelled.append(name)
        r, device = places[name].r, places[name].device
        yield name, *split_factors(u[:, : 2 * r].to(device), vh[: 2 * r].to(device), r, split, seed)
    sketch.warn_of_cancelled("init_lora_ga", cancelled)


def _scaled(
    place: Place,
    a: Tensor,
    b: Tensor,
    scale: str,
    gamma: float,
    norm_clip: float | None,
) -> _Start:
    r, s, weight = len(a), place.scaling, place.weight()
    if s == 0:
        raise ValueError(
            f"init_lora_ga: lora_alpha: the adapter of {place.name!r} has scale 0, so it could never learn"
        )
    size = {
        "stable": lambda: place.out_features**0.25 / math.sqrt(gamma),
        "unit": lambda: 1.0,
        "gd": lambda: 1.0 / abs(s),
        "weight_svd": lambda: float(linalg.truncated_svd(weight, r).S.div(abs(s)).sqrt().mean()),
    }[scale]()
    if size == 0:
        raise ValueError(
            f'init_lora_ga: scale: got "weight_svd", but the weight of {place.name!r} is zero, so its adapter '
            "could never learn; want another scale, or leave the layer out with exclude_modules"
        )
    relative = ratio(abs(s) * size**2 * _norm_of_product(a, b), _norm(weight))
    if norm_clip is not None and norm_clip < relative < NOTHING:
        size *= math.sqrt(norm_clip / relative)
        relative = norm_clip
    return _Start(a * size, b * size, relative)


def ratio(part: float, whole: float) -> float:
    """part/whole, infinite where only the whole is 0."""
    return part / whole if whole else math.inf if part else 0.0


def _norm_of_product(a: Tensor, b: Tensor) -> float:
    """‖B A‖_F without forming B A: ‖B A‖² = tr(BᵀB · AAᵀ)."""
    a, b = a.double(), b.double()
    return math.sqrt(max(0.0, float(((b.t() @ b) * (a @ a.t())).sum())))


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))
