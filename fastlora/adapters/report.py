"""What `patch` did to a model, and why: a line per module, and many modules with one reason in one line."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..runtime.messages import by_reason, table

_LINES = 20  # of reasons in a summary


@dataclass(frozen=True)
class ModuleReport:
    """One module, or one expert weight: `patched` or not, and why (for a patched one: what it got)."""

    name: str
    kind: str
    patched: bool
    reason: str
    targeted: bool = True


@dataclass
class PatchReport:
    """What `patch` did. `print(report)` shows its `summary`; `table()` has a line per module."""

    modules: list[ModuleReport] = field(default_factory=list)
    groups: list[tuple[str, ...]] = field(default_factory=list)  # names of the layers that `group` has put together
    mlps: dict[str, str] = field(default_factory=dict)  # names of the modules that `mlp` has fused: what each is
    fused_losses: list[str] = field(default_factory=list)  # names of the heads whose loss needs no logits
    losses_left_alone: dict[str, str] = field(default_factory=dict)  # of the other heads: why not
    mlps_left_alone: dict[str, str] = field(default_factory=dict)  # of those that look like an MLP: why not

    @property
    def patched(self) -> list[str]:
        """Names of the modules that run fused now."""
        return [line.name for line in self.modules if line.patched]

    @property
    def left_alone(self) -> dict[str, str]:
        """Name -> reason for every linear layer, expert weight or target that was left as it was."""
        return {line.name: line.reason for line in self.modules if not line.patched}

    @property
    def refused(self) -> dict[str, str]:
        """Name -> reason for every target that was left as it was."""
        return {line.name: line.reason for line in self.modules if line.targeted and not line.patched}

    @property
    def counts(self) -> str:
        """The summary's first line."""
        grouped = f", {len(self.groups)} groups" if self.groups else ""
        grouped += f", {len(self.mlps)} MLPs" if self.mlps else ""
        grouped += ", loss without logits" if self.fused_losses else ""
        return f"fastlora: {len(self.patched)} modules patched, {len(self.left_alone)} left alone{grouped}"

    @property
    def summary(self) -> str:
        """How many modules were patched and left alone, and a line for each reason."""
        patched = [(_shown(line.name), line.reason) for line in self.modules if line.patched]
        left = [(_shown(name), reason) for name, reason in self.left_alone.items()]
        mlps = [(_shown(name), reason) for name, reason in self.mlps_left_alone.items()]
        lines = [f"  patched     {line}" for line in by_reason(patched)]
        lines += [f"  left alone  {line}" for line in by_reason(left)]
        lines += [f"  no MLP      {line}" for line in by_reason(mlps)]
        more = [f"  and {len(lines) - _LINES} more reasons: report.table()"] if len(lines) > _LINES else []
        return "\n".join([self.counts, *lines[:_LINES], *more])

    def table(self) -> str:
        """A line per module: its kind, patched or left alone, and why."""
        rows = [
            (_shown(line.name), line.kind, "patched" if line.patched else "left alone", line.reason)
            for line in self.modules
        ]
        return table([("module", "kind", "", "why"), *rows])

    def __str__(self) -> str:
        return self.summary

    __repr__ = __str__


def _shown(name: str) -> str:
    return name or "(the model itself)"


def refusal(refused: dict[str, str]) -> str:
    """Of targets that cannot be patched, in one line for an error: who and why."""
    return "; ".join(by_reason(((repr(name), why) for name, why in refused.items()), verb=" cannot be patched"))
