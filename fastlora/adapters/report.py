"""What `patch` did to a model, and why: a line per module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_REPR_ROWS = 40


@dataclass(frozen=True)
class ModuleReport:
    """One module: `patched` or not, and why (for a patched one: what it got)."""

    name: str
    kind: str
    patched: bool
    reason: str
    targeted: bool = True


@dataclass
class PatchReport:
    """What `patch` did, a line per module; `str(report)` is the table."""

    modules: list[ModuleReport] = field(default_factory=list)
    groups: list[tuple[str, ...]] = field(default_factory=list)  # names of the layers that `group` has put together
    mlps: dict[str, str] = field(default_factory=dict)  # names of the modules that `mlp` has fused: what each is
    mlps_left_alone: dict[str, str] = field(default_factory=dict)  # of those that look like an MLP: why not

    @property
    def patched(self) -> list[str]:
        """Names of the modules that run fused now."""
        return [line.name for line in self.modules if line.patched]

    @property
    def left_alone(self) -> dict[str, str]:
        """Name -> reason for every linear layer or target that was left as it was."""
        return {line.name: line.reason for line in self.modules if not line.patched}

    def __str__(self) -> str:
        rows = [("module", "kind", "", "why")]
        rows += [
            (line.name or "(the model itself)", line.kind, "patched" if line.patched else "left alone", line.reason)
            for line in self.modules
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[3]}"
            for row in rows
        )
        return f"{self.summary}\n{table}"

    @property
    def summary(self) -> str:
        """The table's first line: how many modules were patched and left alone."""
        grouped = f", {len(self.groups)} groups" if self.groups else ""
        grouped += f", {len(self.mlps)} MLPs" if self.mlps else ""
        return f"fastlora: {len(self.patched)} modules patched, {len(self.left_alone)} left alone{grouped}"

    def __repr__(self) -> str:
        """The table, or for a model of many layers what a prompt can show: how many have which reason."""
        if len(self.modules) <= _REPR_ROWS:
            return str(self)
        counts = Counter((line.patched, line.kind, line.reason) for line in self.modules)
        rows = [
            f"  {count} × {kind} {'patched' if patched else 'left alone'}: {reason}"
            for (patched, kind, reason), count in counts.most_common(_REPR_ROWS)
        ]
        return "\n".join([self.summary, *rows, "  (print the report for a line each)"])
