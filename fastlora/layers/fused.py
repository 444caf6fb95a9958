"""What every adapted layer answers, fastlora's own (linear.py) or PEFT's (integrations/peft), so that what is done to
a model is written once.

`FusedLayer` is a layer that runs on our kernels: the terms of a call, what they depend on, and what became of earlier
calls are all that groups, MLPs and `explain` need. `Adapted` is what merging, disabling and switching need; PEFT's
layers that do not run fused have it too (`integrations.peft.family.adapted`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops import call
from ..ops.dora.norms import KeptNorms
from ..runtime.messages import by_reason
from .batch import MixedBatch


class Adapted(Protocol):
    """A layer with adapters, by name."""

    r: Mapping[str, int]
    active_adapters: Sequence[str]
    merged_adapters: Sequence[str]

    def base_weight(self) -> Tensor | None:
        """The weight that adapters are merged into."""
        ...

    def activate(self, names: list[str], trainable: bool) -> None:
        """Makes those of the names that the layer has the active ones, and with `trainable` the only trainable ones."""
        ...

    def disable(self) -> Callable[[], None]:
        """Disables the adapters, and returns what sets the flag back."""
        ...

    def merge_adapters(self, names: list[str] | None, untie: bool) -> None:
        """Merges the active adapters (or these), or raises and leaves the layer as it was. `untie`: into a weight of
        the layer's own, because other modules use this one."""
        ...

    def unmerge(self) -> None:
        """Puts the bits from before back."""
        ...

    def holds(self, name: str) -> bool:
        """Whether an adapter cannot be deleted now: it is merged, or another one is into a weight that it shifted."""
        ...

    def delete_adapter(self, name: str) -> None: ...


class FallbackWatch:
    """Warns, once, where each of a model's patched layers has left a call with gradients to PEFT: nothing is gained."""

    def __init__(self, layers: Mapping[str, FusedLayer]) -> None:
        self.layers = len(layers)
        self.reasons: dict[str, str] = {}
        for name, layer in layers.items():
            layer.calls.watch = self, name

    def note(self, name: str, reason: str) -> None:
        self.reasons[name] = reason
        if len(self.reasons) == self.layers:
            reasons = "\n  ".join(by_reason(self.reasons.items()))
            warnings.warn(
                f"fastlora: each of the {len(self.reasons)} patched layers has left a call to PEFT, so that nothing is "
                f"gained:\n  {reasons}\nfastlora.fallbacks(model) says which do now; "
                "docs/details/peft.md and docs/details/qlora.md explain the reasons",
                UserWarning,
                stacklevel=2,
            )


@dataclass
class CallCounts:
    """What became of a layer's calls: fused, the base layer alone, or left to PEFT's forward (by reason).

    The base layer alone runs where adapters are merged or disabled, or where none of the active ones is here.
    """

    fused: int = 0
    base: int = 0
    fallback: dict[str, int] = field(default_factory=dict)
    last_reason: str | None = None  # of the latest fallback
    watch: tuple[FallbackWatch, str] | None = field(default=None, repr=False, compare=False)  # and the layer's name
    _before: int = field(default=-1, repr=False)  # the other calls before it

    def fell_back(self, reason: str) -> None:
        if self.watch is not None and torch.is_grad_enabled():
            (watch, name), self.watch = self.watch, None
            watch.note(name, reason)
        self.fallback[reason] = self.fallback.get(reason, 0) + 1
        self.last_reason, self._before = reason, self.fused + self.base

    @property
    def latest(self) -> str | None:
        """Why the latest call fell back; None where it did not."""
        return self.last_reason if self._before == self.fused + self.base else None


@dataclass
class Terms:
    """What a call runs: y = x Wᵀ + b and the adapters' terms; the base layer alone where there are none."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    adapters: list[call.Adapter]


class FusedLayer:
    """A layer that runs on our kernels."""

    shares_input = True  # whether it can be in a group, and run a batch that mixes adapters
    backend: str
    calls: CallCounts
    group: tuple[Any, str] | None = None  # the LayerGroup that it belongs to, and its name there
    # Set on the instance within `adapter_names` and `variants.kept_norms`.
    mixed_batch: MixedBatch | None = None
    kept_norms: KeptNorms | None = None
    loss_trust: dict[Any, str | None] | None = None  # of an output head whose loss needs no logits (head.py)
    tensor_parallel: Any = None  # what runs its calls on local shards (parallel.py)

    def terms(self, x: Tensor) -> Terms | str:
        """What a call with x runs now, or why it is left to PEFT's forward."""
        raise NotImplementedError

    @contextlib.contextmanager
    def terms_written_out(self, x: Tensor) -> Iterator[tuple[Tensor, Terms | str, str]]:
        """x as it is multiplied, the terms with the weight as a matrix, for as long as the context lasts, and the
        backend that is asked for."""
        yield x, self.terms(x), self.backend

    def group_sources(self) -> tuple[list[Tensor], tuple]:
        """What the running adapters' A are made of, the same tensors at every call, and what else they depend on."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle made within a `with` block is outside it."""
        return {key: value for key, value in self.__dict__.items() if key not in ("mixed_batch", "kept_norms")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.group is not None:
            self.group[0].add(self.group[1], self)
