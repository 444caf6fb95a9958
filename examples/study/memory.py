"""Peak memory of one training step, as torch's own allocator sees it.

Several methods live in one process here, so the process's resident set would charge each of them for the others. What
is counted instead, on the CPU and the GPU alike: the tensors that a method owns (weights, adapters, optimizer state)
plus the highest point that torch's allocator reaches above where it stood when the step began. Scratch space that a
math library takes behind torch's back is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_growth(step: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the allocator's live tensors exceed, at the highest point of `step()`, what was live before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    recorded: list[Any] = recording.profiler.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once however many views share it."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
