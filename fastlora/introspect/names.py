"""Names of modules: as in the unwrapped model, which files have, and patterns as PEFT's configuration has them."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module")
_MODULE = {  # whose `module` is the one they wrap, by the names of their classes: other libraries have their own
    *("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "AveragedModel"),
    *("ModelEma", "ModelEmaV2", "ModelEmaV3"),
}


# What a module is called on disk.
def inner(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper that keeps names (torch.compile, checkpoint_wrapper, data-parallel and averaging ones);
    None for any other module."""
    children = module._modules
    for key in _INSIDE:
        if (child := children.get(key)) is not None:
            return child
    child = children.get("module")
    return child if child is not None and any(cls.__name__ in _MODULE for cls in type(module).__mro__) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all its wrappers."""
    while (child := inner(module)) is not None:
        module = child
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` of the unwrapped model: at any depth what is in a wrapper has the wrapper's place."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(f"{name}.{key}" if name else key, child)

    return walk("", model)


@contextlib.contextmanager
def peeled(model: nn.Module) -> Iterator[None]:
    """Within it the wrappers inside a model are out of it, for code of PEFT's that reads names off the modules."""
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is not None and inner(child) is not None and inner(parent) is None
    ]
    for parent, key, child in places:
        parent._modules[key] = unwrapped(child)
    try:
        yield
    finally:
        for parent, key, child in places:
            if parent._modules.get(key) is unwrapped(child):  # else it was replaced, and the wrapper would run the old
                parent._modules[key] = child


# Patterns.
def _ends_with_one_of(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def selects(config: dict[str, Any], name: str) -> bool:
    """Whether the configuration targets a module, by PEFT's rules."""
    exclude, targets = config.get("exclude_modules"), config.get("target_modules")
    targets = () if targets is None else targets  # where only parameters are targeted
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


def as_integer(number: float) -> float:
    """An integer where it is one: so PEFT writes its alphas."""
    return int(number) if float(number).is_integer() else number


def most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def common_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Settings by module as PEFT writes them: the most common one, and a pattern for each module with another."""
    common = most_common(values.values())
    return common, {pattern(name): value for name, value in values.items() if value != common}


def target_parameters(targets: set[str], parameters: set[str]) -> list[str]:
    """The parameters' last two names where those select exactly these, else full names."""
    short = {".".join(name.split(".")[-2:]) for name in targets}
    return sorted(short if {name for name in parameters if _ends_with_one_of(name, short)} == targets else targets)


def target_modules(targets: set[str], modules: set[str]) -> list[str] | str:
    """The modules' last names where those select exactly these, else full names, else a regular expression."""
    for names in ({name.rpartition(".")[2] for name in targets}, targets):
        if "" not in names and {name for name in modules if _ends_with_one_of(name, names)} == targets:
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(targets))
