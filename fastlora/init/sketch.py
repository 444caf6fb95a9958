"""`GradientSketch`: what LoRA-GA needs of a model's full gradient, gathered while backward passes run, without the
gradient ever existing."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import targets
from ..peft_format import some
from . import taps
from .report import LayerReport, SketchReport
from .streaming import StreamingSketch

WEIGHTINGS = ("tokens", "equal")
FORMAT = "fastlora-gradient-sketch-1"


class GradientSketch:
    """A context manager around a few backward passes of the frozen model; afterwards each target layer has the leading
    singular triplets of its weight's gradient, summed over the passes.

    Within the context every parameter of `model` is frozen (so that no weight gradient is computed), dropout is off,
    and each target layer shows its input X (T, m) and its output's gradient dY (T, n). On leaving it, training flags,
    `requires_grad`s and hooks are as before, also after an exception. Where torch.distributed is initialised, every
    process must leave it: the processes' sketches become one there. Entering again adds further passes.

    Args:
        model: a plain model, a patched one, or a PEFT model (the gradient is that of the base layer's full weight).
        target_modules, exclude_modules: as in `fastlora.patch`; on a patched or PEFT model, of its LoRA layers.
        r: the rank of the adapters to come; LoRA-GA uses 2r triplets.
        width: columns c kept per layer, by default max(6r, 32): 4·(c + 8)·(n + m) bytes a layer, and
            4·c·(n + 2m) more while refining.
        seed: of the random start; the same seed and passes give the same sketch.
        dropout: leave dropout on.
        weighting: "tokens", each pass counts by its labels (those that are not -100), or by its tokens where the model
            is called without labels: right for losses that are means. "equal": right for sums.

    Raises:
        ValueError: nothing to sketch, r < 1, width < 2r, an unknown weighting, a DistributedDataParallel wrapper.

    Example:
        >>> with fastlora.GradientSketch(model, r=8) as sketch:
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        >>> fastlora.init_lora_ga(model, sketch)

    Source: Wang et al. 2024, LoRA-GA, arXiv 2407.05000; the streaming form: docs/lora_ga.md.
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
        weighting: str = "tokens",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"GradientSketch: model: got {type(model).__name__}, want a torch.nn.Module")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "GradientSketch: model: got DistributedDataParallel, want the module inside it (model.module), called "
                "directly: there are no weight gradients to reduce, and the sketches merge by themselves"
            )
        if not _is_integer(r) or r < 1:
            raise ValueError(f"GradientSketch: r: got {r!r}, want an integer of at least 1")
        if width is not None and (not _is_integer(width) or width < 2 * r):
            raise ValueError(f"GradientSketch: width: got {width!r}, want an integer of at least 2r = {2 * r}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"GradientSketch: weighting: got {weighting!r}, want one of {', '.join(WEIGHTINGS)}")
        self.r, self.width, self.seed = r, max(6 * r, 32) if width is None else width, seed
        self.dropout, self.weighting = dropout, weighting
        self._modules = dict(targets.sketchable(model, target_modules, exclude_modules))
        if not self._modules:
            raise ValueError(
                f"GradientSketch: target_modules: {target_modules!r} selects no linear layer of this "
                f"{type(model).__name__}"
            )
        self._model = model
        self.layers: dict[str, StreamingSketch] = {}
        self._restore: list[Callable[[], object]] = []
        self._merged = False

    # The context.

    def __enter__(self) -> GradientSketch:
        if self._restore:
            raise RuntimeError("GradientSketch: this sketch is active already")
        if self._merged and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            self._start_afresh()  # the first process keeps what all had, so that it is counted once
        self._merged = False
        try:
            self._restore.append(taps.freeze(self._model))
            if not self.dropout:
                self._restore.append(taps.turn_dropout_off(self._model))
            self._restore.append(taps.attach(self._model, self._modules, self._start_pass, self._observe))
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()
        if kind is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            from .distributed import merge_across_ranks

            merge_across_ranks(self)
            self._merged = True

    def _undo(self) -> None:
        while self._restore:
            self._restore.pop()()

    def _start_afresh(self) -> None:
        for name, layer in list(self.layers.items()):
            if layer.refining:
                layer.forget_refined()
            else:
                del self.layers[name]

    def _start_pass(self, args: tuple, kwargs: dict) -> float:
        return taps.pass_weight(args, kwargs) if self.weighting == "tokens" else 1.0

    def _observe(self, name: str, x: Tensor, dy: Tensor, weight: float) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            self.layer(name, dy.shape[1], x.shape[1], x.device).update(x, dy, weight)

    def refine(self) -> GradientSketch:
        """Prepares a second round of the same backward passes: `with sketch.refine(): ...`. It brings the error to
        within 0.1 % of the optimum. Raises ValueError where layers have no gradient yet."""
        self.check_complete()
        for layer in self.layers.values():
            layer.start_refining()
        return self

    # Results.

    @property
    def names(self) -> list[str]:
        """The layers looked at."""
        return list(self._modules)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(n, m) = (out_features, in_features) of every layer looked at."""
        return {name: targets.layer_sizes(module) for name, module in self._modules.items()}

    def layer(self, name: str, n: int, m: int, device: torch.device | None = None) -> StreamingSketch:
        """One layer's sketch, an empty one (on the layer's device) where it has seen nothing yet."""
        if name not in self.layers:
            device = next(self._modules[name].parameters()).device if device is None else device
            self.layers[name] = StreamingSketch(n, m, self.width, zlib.crc32(name.encode()) ^ self.seed, device)
        return self.layers[name]

    def has_gradient(self, name: str) -> bool:
        """Whether a layer saw a finite gradient that was not zero."""
        return name in self.layers and self.layers[name].has_gradient

    def check_complete(self) -> None:
        """Raises ValueError, naming them, where target layers have no gradient: they never saw a token, or only
        gradients that were zero or not finite."""
        missing = [name for name in self._modules if not self.has_gradient(name)]
        if not missing:
            return
        skipped = [name for name in missing if name in self.layers and self.layers[name].skipped]
        raise ValueError(
            f"GradientSketch: {len(missing)} of {len(self._modules)} layers have no gradient: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. "
            + (f"Those of {len(skipped)} were not finite: lower the loss scale. " if skipped else "")
            + "Run backward passes that reach them inside `with sketch:`, leave them out with exclude_modules, or pass "
            'missing="kaiming" to init_lora_ga'
        )

    def report(self) -> SketchReport:
        """What the sketch holds, a line per layer; `str` of it is a table."""
        lines = []
        for name, (n, m) in self.sizes.items():
            layer = self.layers.get(name)
            if layer is None or not layer.has_gradient:
                skipped = layer.skipped if layer else 0
                lines.append(LayerReport(name, n, m, 0, 0, skipped, 0.0, math.nan, math.nan, ()))
                continue
            sigma = layer.svd(2 * self.r)[1].double()
            squared = layer.squared_norm()
            captured = min(1.0, float(sigma.square().sum()) / squared)
            lines.append(
                LayerReport(
                    name, n, m, layer.tokens, layer.updates, layer.skipped, math.sqrt(squared), captured,
                    math.sqrt(1.0 - captured), tuple(sigma.tolist()),
                )
            )  # fmt: skip
        return SketchReport(self.r, lines)

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sketch as one safetensors file. A refining round that was prepared and not run is not saved."""
        tensors, counts = {}, {}
        for name, layer in self.layers.items():
            q, z = layer.factors()
            kept = {"q": q, "z": z, "probed": layer.probed}
            tensors |= {f"{name}:{key}": tensor.detach().cpu().contiguous() for key, tensor in kept.items()}
            counts[name] = (layer.tokens, layer.updates, layer.skipped)
        about = {
            "names": self.names,
            "r": self.r,
            "width": self.width,
            "seed": self.seed,
            "weighting": self.weighting,
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
        names = "|".join(re.escape(name) for name in about["names"])
        sketch = cls(model, names, about["r"], about["width"], about["seed"], weighting=about["weighting"])
        sizes = sketch.sizes
        if list(sizes) != about["names"]:
            raise ValueError(
                f"GradientSketch.load: model: the sketch has layers {some(about['names'])}, this "
                f"{type(model).__name__} has {some(sizes)} of them"
            )
        for name, (tokens, updates, skipped) in counts.items():
            q, z, probed = (tensors[f"{name}:{key}"] for key in ("q", "z", "probed"))
            if sizes[name] != (q.shape[0], z.shape[0]):
                raise ValueError(
                    f"GradientSketch.load: model: the sketch has {name!r} as {q.shape[0]}×{z.shape[0]}, this "
                    f"{type(model).__name__} as {sizes[name][0]}×{sizes[name][1]}"
                )
            layer = sketch.layer(name, q.shape[0], z.shape[0])
            layer.q, layer.z, layer.probed = (tensor.to(layer.device) for tensor in (q, z, probed))
            layer.tokens, layer.updates, layer.skipped = tokens, updates, skipped
        return sketch


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
