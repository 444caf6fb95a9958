"""What reports and errors share: aligned tables, lists that end early, and many layers with one reason in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells (the header first) as aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names, sorted, and how many more."""
    return _shortened(sorted(names), most)


def by_reason(reasons: Iterable[tuple[str, str]], most: int = 3, verb: str = "") -> list[str]:
    """Of (name, reason) pairs a line per reason, the most common first: "a, b, c and 11 more{verb}: reason"."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    ordered = sorted(names.items(), key=lambda item: -len(item[1]))
    return [f"{_shortened(found, most)}{verb}: {reason}" for reason, found in ordered]


def _shortened(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
