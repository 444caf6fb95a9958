"""AdaLoRA's budget over a training run, and what a layer remembers of how its ranks were dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..runtime.checks import check, check_integer, is_number


@dataclass(frozen=True)
class RankSchedule:
    """How many triplets are kept after each step: all in the first `t_init` steps, then fewer, cubically, down to
    `target_r` a layer on average at step `total_steps - t_final`, and no more changes after it.

        b(t) = b_T + (b_0 − b_T)·(1 − (t − t_init)/(total_steps − t_init − t_final))³

    So b(t_init) = b_0 and b(total_steps − t_final) = b_T. The numerator that the paper prints, t − t_init − t_final,
    would make b jump to above b_0 at t_init, and never reach b_T.

    delta_t: between the two, masks are made at steps that are multiples of it. beta1, beta2: of the averages Ī and Ū.
    """

    target_r: int
    total_steps: int
    t_init: int = 0
    t_final: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def checked(self, caller: str) -> RankSchedule:
        """Raises ValueError for a value out of range."""
        least = {"target_r": 1, "total_steps": 1, "t_init": 0, "t_final": 0, "delta_t": 1}
        for argument, lowest in least.items():
            check_integer(caller, argument, getattr(self, argument), lowest)
        for argument in ("beta1", "beta2"):
            value = getattr(self, argument)
            check(is_number(value) and 0 < value < 1, caller, argument, value, "a number between 0 and 1")
        if self.t_init >= self.last:
            raise ValueError(
                f"{caller}: t_init: got {self.t_init} and t_final {self.t_final} of {self.total_steps} steps, want "
                "some steps between them, in which ranks are dealt out"
            )
        return self

    @property
    def last(self) -> int:
        """The step after which nothing changes any more."""
        return self.total_steps - self.t_final

    def budget(self, t: int, initial: int, final: int) -> int:
        """b(t), rounded down, for b_0 = initial and b_T = final."""
        if t <= self.t_init:
            return initial
        if t >= self.last:
            return final
        left = 1 - (t - self.t_init) / (self.last - self.t_init)
        return int((initial - final) * left**3 + final)

    def allocates(self, t: int) -> bool:
        """Whether step t makes masks."""
        return t == self.last or (self.t_init < t < self.last and t % self.delta_t == 0)


@dataclass(frozen=True)
class Allocation:
    """Of one adapter in one layer. schedule: the allocator's, or the one that a file was trained with; kept: which of
    the ranks that it began with are left, once that is final: those that it has, or those that are not masked."""

    schedule: RankSchedule | None = None
    kept: tuple[bool, ...] | None = None


def composed(there: Sequence[bool], kept: Sequence[bool]) -> list[bool]:
    """Of the ranks that an adapter began with those that are left, when of the ones that were there some are kept."""
    of_those = iter(kept)
    return [was and next(of_those) for was in there]


def with_nonzero(kept: Sequence[bool], values: Tensor) -> list[bool]:
    """The ranks that are kept, and those whose singular value is not zero: what was masked may have been trained since.
    Reads the values (r, 1) from the device."""
    return [keep or value != 0 for keep, value in zip(kept, values.flatten().tolist(), strict=True)]
