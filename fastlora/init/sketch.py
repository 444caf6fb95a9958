"""`GradientSketch`: what LoRA-GA needs of a model's full gradient, gathered while backward passes run, without the
gradient ever existing."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..introspect import sharding, taps, targets
from ..layers import experts
from ..runtime import processes, progress
from ..runtime.checks import check, check_choice, check_integer, check_module, check_positive, is_integer
from ..runtime.messages import some
from .report import LayerReport, SketchReport
from .streaming import SKETCHES, StreamingSketch, svd_of_each

WEIGHTINGS = ("equal", "tokens")
FORMAT = "fastlora-gradient-sketch-1"


@dataclass
class Round:
    """A round of passes: how many steps it has ended, and the discounted sum of the weights of the backward passes that
    gave it something; `last` is autograd's number of the latest."""

    steps: int = 0
    weight: float = 0.0
    last: int = taps.NO_BACKWARD


class GradientSketch:
    """A context manager around a few backward passes of the frozen model; afterwards each target layer has the leading
    singular triplets of its weight's gradient, summed over the passes.

    Within the context every parameter of `model` is frozen (so that no weight gradient is computed), dropout is off,
    and each target layer shows its input X (T, m) and its output's gradient dY (T, n). On leaving it, training flags,
    `requires_grad`s and hooks are as before, also after an exception. Where torch.distributed is initialised, every
    process must leave it: the processes' sketches become one there. Entering again adds further passes. Gradients of
    several optimiser steps are averaged with a discount by `step`; sketches of several tasks are joined by `combine`.

    Args:
        model: a plain model, a patched one, or a PEFT model (the gradient is that of the base layer's full weight).
        target_modules, exclude_modules: as in `fastlora.patch`; on a patched or PEFT model, of its LoRA layers.
        r: the rank of the adapters to come; LoRA-GA uses 2r triplets.
        width: columns c kept per layer, by default max(6r, 32): 4·c·(n + m) + 32·n bytes a layer, and
            4·c·(n + 2m) more while refining.
        seed: of the random start; the same seed and passes give the same sketch.
        dropout: leave dropout on.
        weighting: "equal", what autograd would accumulate in `weight.grad` over the same backward passes. "tokens":
            each backward counts by the labels (those that are not -100), or else the tokens, of the forwards since the
            one before, all of them: right for losses that are means over numbers of tokens that differ.
        accumulate: "sum", G = Σ Gᵢ over the backward passes. "signed", the same where they cancel (advantages of zero
            mean, chosen minus rejected): a linear sketch is kept next to it, 2.5 times the memory. "components": the
            principal components of the Gᵢ, the eigenvectors of Σ GᵢGᵢᵀ and Σ GᵢᵀGᵢ, which cannot cancel; twice the
            memory, no refining and no `combine`.
        discount: β, by which each call of `step` multiplies what was sketched before it.
        freeze: False leaves `requires_grad` alone, so that the backward passes of a training run can be sketched as
            they are (with dropout=True, which leaves its dropout alone too).
        target_parameters: weights of a mixture's experts, as in `fastlora.patch`; each expert is a layer of its own,
            called "<weight>[<expert>]", that sees the tokens that are routed to it.

    Raises:
        ValueError: nothing to sketch, r < 1, width < 2r, an unknown weighting, a discount that is not positive, a
            DistributedDataParallel wrapper; on entering, a model under tensor parallelism.

    Examples:
        >>> with fastlora.GradientSketch(model, r=8) as sketch:
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        >>> fastlora.init_lora_ga(model, sketch)

    Source: Wang et al. 2024, LoRA-GA, arXiv 2407.05000; the streaming form: docs/details/lora_ga_maths.md.
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | list[str] = "all-linear",
        r: int = 8,
        width: int | None = None,
        seed: int = 0,
        *,
        exclude_modules: str | list[str] | None = None,
        dropout: bool = False,
        weighting: str = "equal",
        accumulate: str = "sum",
        discount: float = 1.0,
        freeze: bool = True,
        target_parameters: Sequence[str] | None = None,
    ) -> None:
        caller = "GradientSketch"
        check_module(caller, model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "GradientSketch: model: got DistributedDataParallel, want the module inside it (model.module), called "
                "directly: there are no weight gradients to reduce, and the sketches merge by themselves"
            )
        check_integer(caller, "r", r)
        enough = width is None or is_integer(width, 2 * r)
        check(enough, caller, "width", width, f"an integer of at least 2r = {2 * r}")
        check_choice(caller, "weighting", weighting, WEIGHTINGS)
        check_choice(caller, "accumulate", accumulate, SKETCHES)
        check_positive(caller, "discount", discount)
        self.r, self.width, self.seed = r, max(6 * r, 32) if width is None else width, seed
        self.dropout, self.weighting, self.discount, self.freeze = dropout, weighting, float(discount), freeze
        self.accumulate = accumulate
        self._modules = dict(targets.sketchable(model, target_modules, exclude_modules))
        self.experts = experts_of(model, target_parameters, "GradientSketch")
        if not self.names:
            raise ValueError(
                f"GradientSketch: target_modules: {target_modules!r} selects no linear layer of this "
                f"{type(model).__name__}"
            )
        self._model = model
        self.layers: dict[str, StreamingSketch] = {}
        self._restore: list[Callable[[], object]] = []
        self._merged = False
        self.joint = False  # made by `combine`
        self._round = Round()
        self._refining_round: Round | None = None
        self._shown: Any = None  # the progress bar, and what it has counted
        self._last_shown, self._passes_shown = taps.NO_BACKWARD, 0

    # The context.

    def __enter__(self) -> GradientSketch:
        if self._restore:
            raise RuntimeError("GradientSketch: this sketch is active already")
        sharding.check_whole_activations(self._model, "GradientSketch")
        if self.joint:
            raise RuntimeError(
                "GradientSketch: this is a joint sketch, whose tasks no longer tell apart: sketch the tasks themselves "
                "and combine them again"
            )
        if self._merged and processes.running() and torch.distributed.get_rank() != 0:
            self._start_afresh()  # the first process keeps what all had, so that it is counted once
        self._merged = False
        try:
            if self.freeze:
                self._restore.append(taps.freeze(self._model))
            if not self.dropout:
                self._restore.append(taps.turn_dropout_off(self._model))
            others = functools.partial(experts.tap, self.experts, observe=self._observe)
            self._restore.append(taps.attach(self._model, self._modules, self._observe, others))
            self._shown = progress.counter("sketch, pass 1")
            if self._shown is not None:
                self._restore.append(self._shown.close)
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()
        if kind is None and processes.running():
            from .merge import merge_across_ranks

            merge_across_ranks(self)
            self._merged = True

    def __repr__(self) -> str:
        seen = [layer.tokens for layer in self.layers.values()]
        return (
            f"GradientSketch({len(self.names)} layers, r={self.r}, width={self.width}: {len(seen)} layers have seen "
            f"backward passes, of up to {max(seen, default=0)} tokens; report() has the rest)"
        )

    def _undo(self) -> None:
        while self._restore:
            self._restore.pop()()

    def _start_afresh(self) -> None:
        self._present_round.weight = 0.0
        for name, layer in list(self.layers.items()):
            if layer.refining:
                layer.forget_refined()
            else:
                del self.layers[name]

    def weight_of(self, now: taps.Pass) -> float:
        """What a backward pass counts in this round."""
        # β > 1 is applied to what comes after instead, so that nothing overflows; the factors are the same.
        weight = min(1.0, 1.0 / self.discount) ** self._present_round.steps
        return weight * (now.tokens if self.weighting == "tokens" else 1.0)

    def _show(self, number: int) -> None:
        """Counts layers, and says in which pass they are: how many passes there will be is the caller's secret."""
        if number != self._last_shown:
            self._last_shown, self._passes_shown = number, self._passes_shown + 1
            self._shown.set_description_str(f"fastlora: sketch, pass {self._passes_shown}", refresh=False)
        self._shown.update()

    def _observe(self, name: str, x: Tensor, dy: Tensor, now: taps.Pass) -> None:
        if self._shown is not None:
            self._show(now.number)
        weight, present = self.weight_of(now), self._present_round
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            added = self.layer(name, dy.shape[1], x.shape[1], x.device).update(x, dy, weight, now.number)
        if added and now.number != present.last:
            present.last = now.number
            present.weight += weight

    def step(self) -> None:
        """Ends an optimiser step: what was sketched so far counts `discount` times as much as what comes.

        With a step after each optimiser step t, of T, the sketch is that of Σ βᵀ⁻ᵗ Gₜ, where Gₜ is the step's weighted
        sum over its passes. β > 1 makes the first steps count most: β = 1/0.9 is Σ 0.9ᵗ Gₜ but for a factor. Every
        process must make the same steps. A refining round repeats the passes and the steps.
        """
        self._present_round.steps += 1
        self._present_round.weight *= min(1.0, self.discount)
        if self.discount < 1:
            for layer in self.layers.values():
                layer.scale_by(self.discount)

    @property
    def _present_round(self) -> Round:
        """The one that passes add to."""
        return self._round if self._refining_round is None else self._refining_round

    @property
    def _counted_round(self) -> Round:
        """The one that the results are from."""
        refined = any(layer.refined_updates for layer in self.layers.values())
        return self._present_round if refined else self._round

    def refine(self, bases: GradientSketch | None = None) -> GradientSketch:
        """Prepares a second round of the same backward passes: `with sketch.refine(): ...`. It brings the error to
        within 0.1 % of the optimum.

        `bases`: the joint sketch that this one is a task of, to refine all of them in the joint sketch's directions;
        combined again they are the refined joint sketch. Raises ValueError where layers (of `bases`) have no gradient
        yet, or for a sketch of other layers.
        """
        if bases is not None:
            check_alike("GradientSketch.refine: bases", [bases, self])
        (self if bases is None else bases).check_complete()
        for name, (n, m) in self.sizes.items():
            self.layer(name, n, m).start_refining(None if bases is None else bases.layers[name])
        self._refining_round = Round()
        return self

    @staticmethod
    def combine(
        sketches: Sequence[GradientSketch], weights: Sequence[float] | None = None, normalize: str = "mean"
    ) -> GradientSketch:
        """The sketch of the weighted sum of several tasks' gradients, each sketched on its own.

        Args:
            sketches: of the same layers with the same r and seed.
            weights: one a task, positive; by default all 1.
            normalize: what a task counts before its weight. "mean": its gradient by pass (the mean over the
                backward passes that gave it something, with their weights), so that more data does not make it count
                more. "norm": its gradient over its norm,
                all layers together, so that neither data nor the size of its loss do. "sum": as it was summed.

        Returns:
            A new sketch, for `init_lora_ga`, `report`, `save`; not for further passes.

        Raises:
            ValueError: no sketches, others' layers, weights that are not positive, an unknown normalize.

        Examples:
            >>> joint = fastlora.GradientSketch.combine([code, prose], weights=[2, 1])
            >>> fastlora.init_lora_ga(model, joint)
        """
        from .merge import combine

        return combine(sketches, weights, normalize)

    # Results.

    @property
    def names(self) -> list[str]:
        """The layers looked at."""
        return list(self.sizes)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(n, m) = (out_features, in_features) of every layer looked at."""
        sizes = {name: targets.layer_sizes(module) for name, module in self._modules.items()}
        return sizes | experts.sizes_of(self.experts)

    def layer(self, name: str, n: int, m: int, device: torch.device | None = None) -> StreamingSketch:
        """One layer's sketch, an empty one (on the layer's device) where it has seen nothing yet."""
        if name not in self.layers:
            device = self.device_of(name) if device is None else device
            kind = SKETCHES[self.accumulate]
            self.layers[name] = kind(n, m, self.width, zlib.crc32(name.encode()) ^ self.seed, device)
        return self.layers[name]

    def device_of(self, name: str) -> torch.device:
        """Where a layer is."""
        module = self._modules.get(name) or self.experts[name.rpartition("[")[0]][0]
        return next(module.parameters()).device

    def has_gradient(self, name: str) -> bool:
        """Whether a layer saw a finite gradient that was not zero."""
        return name in self.layers and self.layers[name].has_gradient

    def check_complete(self) -> None:
        """Raises ValueError, naming them, where target layers have no gradient: they never saw a token, or only
        gradients that were zero or not finite."""
        missing = [name for name in self.names if not self.has_gradient(name)]
        if not missing:
            return
        skipped = [name for name in missing if name in self.layers and self.layers[name].skipped]
        raise ValueError(
            f"GradientSketch: {len(missing)} of {len(self.names)} layers have no gradient: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. "
            + (f"Those of {len(skipped)} were not finite: lower the loss scale. " if skipped else "")
            + "Run backward passes that reach them inside `with sketch:`, leave them out with exclude_modules, or pass "
            'missing="kaiming" to init_lora_ga'
        )

    @property
    def total_weight(self) -> float:
        """Σ of the passes' weights, discounted: what the sketched sum is divided by for a mean."""
        return self._counted_round.weight

    def triplets(self, names: Iterable[str], rank: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """U (n, rank), S (rank,), Vh (rank, m) of these layers in turn; their small SVDs in one launch."""
        return svd_of_each([self.layers[name] for name in names], rank)

    def report(self) -> SketchReport:
        """What the sketch holds; `str` of it is a summary, `table()` has every layer. Warns where micro-batches have
        cancelled and the sketch has lost what is left of them."""
        lines = []
        triplets = self.triplets([name for name in self.names if self.has_gradient(name)], 2 * self.r)
        for name, (n, m) in progress.bar(self.sizes.items(), "sketch report", len(self.names)):
            layer = self.layers.get(name)
            if layer is None or not layer.has_gradient:
                skipped = layer.skipped if layer else 0
                lines.append(LayerReport(name, n, m, 0, 0, skipped, 0.0, math.nan, math.nan, ()))
                continue
            u, sigma, vh = next(triplets)
            squared, captured, drift = layer.measure(u, sigma, vh)
            lines.append(
                LayerReport(
                    name, n, m, layer.tokens, layer.updates, layer.skipped, math.sqrt(squared), captured,
                    math.sqrt(1.0 - captured), tuple(sigma.double().tolist()), drift,
                )
            )  # fmt: skip
        report = SketchReport(self.r, lines)
        self.warn_of_cancelled("GradientSketch.report", report.cancelled)
        return report

    def warn_of_cancelled(self, caller: str, names: list[str]) -> None:
        """One warning of the layers whose micro-batches cancelled."""
        if names:
            remedy = "another round" if self._counted_round is not self._round else "a round"
            other = ', or sketch with accumulate="signed"' if self.accumulate == "sum" else ""
            warnings.warn(
                f"fastlora.{caller}: in {len(names)} of {len(self.names)} layers ({some(names)}) micro-batches "
                f"cancelled, and the sketch lost most of what is left of them; run {remedy} of the same passes inside "
                f"`with sketch.refine():`{other}",
                UserWarning,
                stacklevel=3,
            )

    @classmethod
    def like(cls, other: GradientSketch, width: int | None = None) -> GradientSketch:
        """An empty sketch of the same layers with the same settings."""
        sketch = copy.copy(other)
        sketch.width = other.width if width is None else width
        sketch.layers, sketch._restore, sketch._merged, sketch.joint = {}, [], False, False
        sketch._round, sketch._refining_round = Round(), None
        return sketch

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sketch as one safetensors file. A refining round that was prepared and not run is not saved."""
        tensors, counts = {}, {}
        for name, layer in self.layers.items():
            kept = layer.state()
            tensors |= {f"{name}:{key}": tensor.detach().cpu().contiguous() for key, tensor in kept.items()}
            counts[name] = (layer.tokens, layer.updates, layer.skipped)
        about = {
            "names": self.names,
            "target_parameters": list(self.experts),
            "r": self.r,
            "width": self.width,
            "seed": self.seed,
            "weighting": self.weighting,
            "accumulate": self.accumulate,
            "discount": self.discount,
            "steps": self._counted_round.steps,
            "weight": self.total_weight,
            "joint": self.joint,
        }
        save_file(tensors, path, metadata={"format": FORMAT, "about": json.dumps(about), "counts": json.dumps(counts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> GradientSketch:
        """Reads what `save` wrote; `model` is a model with the layers that were sketched.

        Raises FileNotFoundError where there is no such file, ValueError where it is no sketch, or another model's.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"GradientSketch.load: path: {str(path)!r} is not a safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"GradientSketch.load: path: {str(path)!r} was not written by GradientSketch.save")
        about, counts = json.loads(metadata["about"]), json.loads(metadata["counts"])
        parameters = about.get("target_parameters", [])
        linear = [name for name in about["names"] if name.rpartition("[")[0] not in parameters]
        names = "|".join(re.escape(name) for name in linear) if linear else []
        sketch = cls(
            model, names, about["r"], about["width"], about["seed"],
            weighting=about["weighting"], accumulate=about.get("accumulate", "sum"), discount=about["discount"],
            target_parameters=parameters or None,
        )  # fmt: skip
        sketch._round = Round(about["steps"], about["weight"])
        sketch.joint = about["joint"]
        sizes = sketch.sizes
        if list(sizes) != about["names"]:
            raise ValueError(
                f"GradientSketch.load: model: the sketch has layers {some(about['names'])}, this "
                f"{type(model).__name__} has {some(sizes)} of them"
            )
        for name, (tokens, updates, skipped) in counts.items():
            q, z = tensors[f"{name}:q"], tensors[f"{name}:z"]
            if sizes[name] != (q.shape[0], z.shape[0]):
                raise ValueError(
                    f"GradientSketch.load: model: the sketch has {name!r} as {q.shape[0]}×{z.shape[0]}, this "
                    f"{type(model).__name__} as {sizes[name][0]}×{sizes[name][1]}"
                )
            layer = sketch.layer(name, q.shape[0], z.shape[0])
            for key in layer.STATE:
                setattr(layer, key, tensors[f"{name}:{key}"].to(layer.device))
            layer.tokens, layer.updates, layer.skipped = tokens, updates, skipped
        return sketch


def experts_of(model: nn.Module, target_parameters: Sequence[str] | None, caller: str) -> dict[str, tuple[Any, str]]:
    """(module, key) of the experts' weights to look at, by name. Raises ValueError for what is no such weight."""
    found = {}
    for name, module, key in targets.target_parameters(model, target_parameters, caller):
        if (why_not := targets.why_not_experts(module, key)) is not None:
            raise ValueError(f"{caller}: target_parameters: {name!r}: {why_not}")
        found[name] = module, key
    return found


def check_alike(where: str, sketches: Sequence[GradientSketch]) -> None:
    """Raises ValueError where sketches are of other layers, or have another r or seed (their random probes differ)."""
    first = sketches[0]
    for other in sketches[1:]:
        for what in ("sizes", "r", "seed", "accumulate", *(["width"] if first.accumulate == "signed" else [])):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(f"{where}: got sketches of {what} {_few(mine)} and {_few(theirs)}, want the same")


def _few(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return some(f"{name} {n}×{m}" for name, (n, m) in value.items())
