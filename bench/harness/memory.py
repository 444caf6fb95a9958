"""How many bytes a forward pass keeps for its backward pass, counted by autograd's own hooks: on any device. And what
a CPU's allocator is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .contenders import Contender


def saved_bytes(contender: Contender, x: Tensor) -> int:
    """The storages that autograd has saved when the forward pass is over, each counted once; parameters are not: they
    are there anyway. x is counted where it is saved, since without the adapter nobody would have to keep it.

    What a pass computes into a view of a larger tensor counts as the whole of that. A tensor that a custom function
    keeps without telling autograd would be missed; none here does.
    """
    model = getattr(contender, "parameters", ())
    owned = {parameter.untyped_storage().data_ptr() for parameter in (*contender.leaves, *model)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = contender.forward(x)
    del y
    return sum(found.values())


@dataclass(frozen=True)
class Allocations:
    """Bytes beyond those held at the start: at the peak, and at the end; and all that was allocated (positive) and
    freed (negative), in order."""

    peak: int
    held: int
    changes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of all that was allocated."""
        return tuple(change for change in self.changes if change > 0)

    def most_alive(self, nbytes: int) -> int:
        """How many allocations of just this size there were at once."""
        return max(accumulate((change == nbytes) - (change == -nbytes) for change in self.changes), default=0)


def allocations_of(work: Callable[[], Any]) -> tuple[Any, Allocations]:
    """(what `work` returns, still alive; what was allocated on the CPU meanwhile), by torch's profiler: it sees every
    allocation of torch's, those inside of libraries' operations too."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = work()
    kineto: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event for event in kineto.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in changes:
        now += event.nbytes()
        peak = max(peak, now)
    return result, Allocations(peak, now, tuple(event.nbytes() for event in changes))
