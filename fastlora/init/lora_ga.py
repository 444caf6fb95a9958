"""LoRA-GA: adapters that start along the full gradient (Wang et al. 2024, arXiv 2407.05000).

For any A, B the first SGD step moves the weight by −η s²·(B Bᵀ G + G Aᵀ A), of rank at most 2r. With orthonormal
factors from disjoint halves of G's leading 2r singular triplets that is the best approximation of G of rank 2r (Eckart
and Young). B₀A₀ is not zero then; W0 + s·(B A − B₀A₀) keeps the first output. `base="exact"` runs the second term
beside the first and leaves W0 alone; `base="offset"` folds it into W0, the paper's way.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg, patching, targets
from ..layers import FusedLoraLinear
from .sketch import GradientSketch

SPLITS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weight_svd")
BASES = ("exact", "offset")
MISSING = ("error", "kaiming")


def init_lora_ga(
    model: nn.Module,
    sketch: GradientSketch,
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
) -> dict[str, float]:
    """Sets the adapters of a model from a gradient sketch. The output is then that of the model without the adapter.

    Args:
        model: a plain model, whose sketched layers are patched with adapters of the sketch's r; or a patched one, whose
            adapters named `adapter_name` are set in the sketched layers.
        sketch: a `GradientSketch` that has seen backward passes.
        split: which of the leading 2r triplets go to A and which to B (U (n, 2r), Vh (2r, m)): "ArB2r", A = Vh[:r] and
            B = U[:, r:], the original code's default; "A2rBr", the other way round; "ArBr", alternating; "random".
        scale: of both factors: "stable", n^¼/√γ; "unit", 1; "gd", 1/s, so that one step of SGD moves the weight as full
            fine-tuning's best rank-2r step does; "weight_svd", the mean of √(σᵢ(W0)/s).
        gamma: γ of "stable". 16 suits wide models; narrow ones (n < 1024) want more: see norm_clip.
        base: "exact" leaves W0 untouched and runs −B₀A₀ as frozen second half of the adapter (rank 2r); "offset"
            subtracts s·B₀A₀ from W0, rounded once to its dtype, for parity with the paper.
        lora_alpha, use_rslora, lora_dropout: as in `fastlora.patch`, for a plain model; a patched one keeps its own.
        adapter_name: the adapter to set.
        norm_clip: upper bound of ‖s·B₀A₀‖_F as a fraction of ‖W0‖_F; larger factors are scaled down to it.
        missing: "error", or "kaiming" to give layers without a gradient LoRA's ordinary start.
        seed: of the "random" split.

    Returns:
        Per layer ‖s·B₀A₀‖_F/‖W0‖_F, how large the start is beside the weight (0 for a layer without a gradient).

    Raises:
        ValueError: an unknown split, scale, base or missing; γ <= 0; layers without a gradient; adapters whose r or
            shape does not match the sketch, or that are merged; a layer with fewer than 2r singular triplets; a model
            with PEFT's layers. The model is then as it was.

    Example:
        >>> with fastlora.GradientSketch(model, r=8) as sketch:
        ...     model(**batch).loss.backward()
        >>> fastlora.init_lora_ga(model, sketch)

    Source: Wang et al. 2024, arXiv 2407.05000, equations 8 to 12.
    """
    _check_choice("split", split, SPLITS)
    _check_choice("scale", scale, SCALES)
    _check_choice("base", base, BASES)
    _check_choice("missing", missing, MISSING)
    _check_positive("gamma", gamma)
    if norm_clip is not None:
        _check_positive("norm_clip", norm_clip)
    _check_models(model, sketch)
    if missing == "error":
        sketch.check_complete()
    plain = not any(True for _ in targets.lora_layers(model))
    if plain:
        patching.patch(
            model,
            r=sketch.r,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            lora_dropout=lora_dropout,
            target_modules="|".join(re.escape(name) for name in sketch.names),
            adapter_name=adapter_name,
            strict=True,
        )
    try:
        layers = _layers_to_set(model, sketch, adapter_name, base)
        starts: dict[str, _Start | None] = {}
        for name, layer in layers.items():
            starts[name] = None
            if sketch.has_gradient(name):
                a, b = _halves(layer, sketch, name, split, seed)
                starts[name] = _scaled(layer, name, a, b, layer.scaling[adapter_name], scale, gamma, norm_clip)
    except BaseException:
        if plain:
            patching.unpatch(model)
        raise
    for name, start in starts.items():
        if start is None:
            layers[name].reset_adapter(adapter_name)
        else:
            layers[name].set_initial_factors(adapter_name, start.a, start.b, exact=base == "exact")
    return {name: 0.0 if start is None else start.relative_size for name, start in starts.items()}


def split_factors(u: Tensor, vh: Tensor, r: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (r, m) and B (n, r) with orthonormal rows and columns, from disjoint halves of U (n, 2r) and Vh (2r, m)."""
    first, second = slice(0, r), slice(r, 2 * r)
    if split == "ArB2r":
        return vh[first], u[:, second]
    if split == "A2rBr":
        return vh[second], u[:, first]
    if split == "ArBr":
        return vh[1 : 2 * r : 2], u[:, 0 : 2 * r : 2]
    order = torch.randperm(2 * r, generator=torch.Generator().manual_seed(seed)).to(u.device)
    return vh[order[first]], u[:, order[second]]


@dataclass(frozen=True)
class _Start:
    """A₀ and B₀ in float32 on the layer's device, and ‖s·B₀A₀‖_F/‖W0‖_F."""

    a: Tensor
    b: Tensor
    relative_size: float


def _check_models(model: nn.Module, sketch: GradientSketch) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"init_lora_ga: model: got {type(model).__name__}, want a torch.nn.Module")
    if not isinstance(sketch, GradientSketch):
        raise ValueError(f"init_lora_ga: sketch: got {type(sketch).__name__}, want a GradientSketch")
    if any(True for _ in targets.peft_lora_layers(model)):
        raise ValueError(
            f"init_lora_ga: model: got a {type(model).__name__} with PEFT's LoRA layers, which have no place for the "
            "frozen −B₀A₀; want the plain model (get_peft_model's argument): sketch and initialise that, and "
            "fastlora.save_adapter writes what PEFT loads"
        )
    modules = dict(model.named_modules())
    for name, size in sketch.sizes.items():
        layer = modules.get(name)
        wanted = f"{size[0]}×{size[1]}"
        if not isinstance(layer, nn.Linear) and not targets.is_conv1d(layer):  # type: ignore[arg-type]
            found = "no such module" if layer is None else type(layer).__name__
        elif targets.layer_sizes(layer) != size:
            found = "{}×{}".format(*targets.layer_sizes(layer))
        elif 2 * sketch.r > min(size):
            raise ValueError(
                f"init_lora_ga: r: {name!r} is {wanted} and has fewer than 2r = {2 * sketch.r} singular triplets; "
                "sketch with a smaller r, or leave it out with exclude_modules"
            )
        else:
            continue
        raise ValueError(
            f"init_lora_ga: model: {name!r} was sketched as a linear layer {wanted} and is {found} in this "
            f"{type(model).__name__}; want the model that was sketched, plain or patched by fastlora.patch"
        )


def _layers_to_set(
    model: nn.Module, sketch: GradientSketch, adapter_name: str, base: str
) -> dict[str, FusedLoraLinear]:
    modules = dict(model.named_modules())
    layers: dict[str, FusedLoraLinear] = {}
    for name in sketch.names:
        layer = modules[name]
        if not isinstance(layer, FusedLoraLinear):
            raise ValueError(
                f"init_lora_ga: model: {name!r} was sketched and is not patched, as others here are; patch it too, or "
                "sketch again with target_modules"
            )
        if adapter_name not in layer.lora_A:
            raise ValueError(f"init_lora_ga: adapter_name: got {adapter_name!r}, but {name!r} has {list(layer.lora_A)}")
        if layer.r[adapter_name] != sketch.r:
            raise ValueError(
                f"init_lora_ga: r: the sketch has r={sketch.r}, but the adapter {adapter_name!r} of {name!r} has "
                f"r={layer.r[adapter_name]}; sketch with that r"
            )
        layer.check_initial_factors(adapter_name, exact=base == "exact")
        layers[name] = layer
    return layers


def _halves(layer: FusedLoraLinear, sketch: GradientSketch, name: str, split: str, seed: int) -> tuple[Tensor, Tensor]:
    u, _, vh = sketch.layers[name].svd(2 * sketch.r)
    return split_factors(u.to(layer.weight.device), vh.to(layer.weight.device), sketch.r, split, seed)


def _scaled(
    layer: FusedLoraLinear,
    name: str,
    a: Tensor,
    b: Tensor,
    s: float,
    scale: str,
    gamma: float,
    norm_clip: float | None,
) -> _Start:
    r = len(a)
    if s == 0:
        raise ValueError(f"init_lora_ga: lora_alpha: the adapter of {name!r} has scale 0, so it could never learn")
    size = {
        "stable": lambda: layer.out_features**0.25 / math.sqrt(gamma),
        "unit": lambda: 1.0,
        "gd": lambda: 1.0 / abs(s),
        "weight_svd": lambda: float(linalg.truncated_svd(layer.weight.detach(), r).S.div(abs(s)).sqrt().mean()),
    }[scale]()
    relative = abs(s) * size**2 * _norm_of_product(a, b) / max(_norm(layer.weight), torch.finfo(torch.float32).tiny)
    if norm_clip is not None and relative > norm_clip:
        size *= math.sqrt(norm_clip / relative)
        relative = norm_clip
    return _Start(a * size, b * size, relative)


def _norm_of_product(a: Tensor, b: Tensor) -> float:
    """‖B A‖_F without forming B A: ‖B A‖² = tr(BᵀB · AAᵀ)."""
    a, b = a.double(), b.double()
    return math.sqrt(max(0.0, float(((b.t() @ b) * (a @ a.t())).sum())))


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))


def _check_choice(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"init_lora_ga: {argument}: got {value!r}, want one of {', '.join(choices)}")


def _check_positive(argument: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"init_lora_ga: {argument}: got {value!r}, want a positive number")
