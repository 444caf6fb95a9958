"""Names of modules: patterns as PEFT's configuration writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


# Names.
def _ends_with_one_of(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def selects(config: dict[str, Any], name: str) -> bool:
    """Whether the configuration targets a module, by PEFT's rules."""
    exclude, targets = config.get("exclude_modules"), config["target_modules"]
    if exclude and (re.fullmatch(exclude, name) if isinstance(exclude, str) else _ends_with_one_of(name, exclude)):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    if not _ends_with_one_of(name, targets):
        return False
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if indices is None or indices == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for pattern in patterns:
        prefix = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        match = re.match(rf"{prefix}{pattern}\.(\d+)\.", name)
        if match:
            return int(match[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def from_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the name, from a dot or from the start."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def pattern(name: str) -> str:
    """A key of rank_pattern or alpha_pattern for this module and no other: PEFT reads it as a regular expression."""
    return f"^{re.escape(name)}"


def target_modules(targets: set[str], modules: set[str]) -> list[str] | str:
    """The modules' last names where those select exactly these, else full names, else a regular expression."""
    for names in ({name.rpartition(".")[2] for name in targets}, targets):
        if "" not in names and {name for name in modules if _ends_with_one_of(name, names)} == targets:
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(targets))
