"""What a CPU's allocator is asked for, op by op, inside libraries too: torch's profiler sees every allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Allocations:
    """Bytes beyond those held at the start: at the peak, and at the end; and the sizes of all that was allocated."""

    peak: int
    held: int
    sizes: tuple[int, ...]


def allocations_of(work: Callable[[], Any]) -> tuple[Any, Allocations]:
    """(what `work` returns, still alive, and what was allocated meanwhile)."""
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
    return result, Allocations(peak, now, tuple(event.nbytes() for event in changes if event.nbytes() > 0))
