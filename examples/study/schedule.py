"""The learning rate over a run: 10 % warm-up, then linearly down to zero."""

from __future__ import annotations

WARMUP_SHARE = 0.1


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`, as a fraction of the given one."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
