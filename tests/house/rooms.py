"""The rooms of fastlora and their floors, and what the source says about them: `python -m tests.house` prints it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A room imports from floors below its own. Its modules may import one another.
FLOORS = {
    "fastlora.kernels": 0,
    "fastlora.runtime": 1,
    "fastlora.introspect": 1,
    "fastlora.linalg": 2,
    "fastlora.ops": 2,
    "fastlora.functional": 3,
    "fastlora.layers": 3,
    "fastlora.optim": 3,
    "fastlora.integrations": 4,
    "fastlora.adapters": 5,
    "fastlora.variants": 5,
    "fastlora.init": 6,
    "fastlora": 7,
    "fastlora.doctor": 7,
    "fastlora.tune": 7,
    "bench": 8,
    "examples": 8,
}
NEIGHBOURS: set[tuple[str, str]] = set()  # imports allowed on one floor
# The optional packages, and the rooms that may import them.
OPTIONAL = {
    "peft": ("fastlora.integrations", "bench", "examples"),
    "transformers": ("fastlora.integrations", "bench", "examples"),
    "triton": ("fastlora.kernels", "fastlora.ops", "fastlora.runtime", "bench", "examples"),
}


def sources() -> Iterator[tuple[str, Path]]:
    """(module, path) of every source file outside the tests."""
    for top in ("fastlora", "kernels", "bench", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("fastlora", "kernels"), ("fastlora", "csrc")):
                continue  # symbolic links, which some Pythons follow
            if top == "kernels":
                parts = ("fastlora", *parts)
            yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(sources())


def room_of(module: str) -> str | None:
    """The room of a module: the longest one whose name it begins with; None for what is not the project's."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        room = ".".join(parts[:length])
        if room in FLOORS and (room != "fastlora" or length == len(parts)):
            return room
    return None


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, tree: ast.Module | None = None) -> list[tuple[str, str | None]]:
    """(module, name or None) of everything that a module imports, wherever in the file, as absolute names."""
    path = MODULES.get(module, ROOT / "some.py")
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree or tree_of(module)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.append((whole, None) if whole in MODULES or whole in FLOORS else (source, alias.name))
    return found


def uses(module: str, tree: ast.Module | None = None) -> dict[str, set[str]]:
    """The rooms that a module imports, each with the imported modules."""
    rooms: dict[str, set[str]] = {}
    for other, _ in imports(module, tree):
        room = room_of(other)
        if room is not None and room != room_of(module):
            rooms.setdefault(room, set()).add(other)
    return rooms


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def violations(module: str, tree: ast.Module | None = None) -> list[str]:
    """What is wrong with a module's imports, in words."""
    own, found = room_of(module), []
    assert own is not None, f"{module} is in no room: give it one in tests/house/rooms.py"
    for room, others in uses(module, tree).items():
        if FLOORS[room] > FLOORS[own]:
            found.append(f"{module} (floor {FLOORS[own]}) imports {', '.join(sorted(others))} (floor {FLOORS[room]})")
        elif FLOORS[room] == FLOORS[own] and own != "fastlora" and (own, room) not in NEIGHBOURS:
            found.append(f"{module} imports its neighbour {', '.join(sorted(others))}")
    for other, name in imports(module, tree):
        package = other.split(".")[0]
        if own not in OPTIONAL.get(package, (own,)):
            found.append(f"{module} imports {other}: only {', '.join(OPTIONAL[package])} may")
        private = next(
            (part for part in [*other.split("."), name or ""] if part.startswith("_") and part[1:2] != "_"), None
        )
        if room_of(other) is not None and private and other.rpartition(".")[0] != module.rpartition(".")[0]:
            found.append(f"{module} imports the private {private} of {other}")
    return found


def circles() -> list[list[str]]:
    """Circles of imports at module level between files, which only the order of imports would keep working."""
    edges: dict[str, set[str]] = {}
    for module in MODULES:
        if not module.startswith("fastlora"):
            continue
        top = ast.Module([n for n in tree_of(module).body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        targets = (other for other, _ in imports(module, top))
        edges[module] = {other for other in targets if other in MODULES and other != module}
    found: list[list[str]] = []
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for other in sorted(edges.get(module, ())):
            if state.get(other) == 1:
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                visit(other, [*path, other])
        state[module] = 2

    for module in edges:
        if module not in state:
            visit(module, [module])
    return found


def table() -> str:
    """Room, floor, files, lines and what it imports: the drawing of docs/architecture.md."""
    rows = ["| floor | room | files | lines | imports |", "|---|---|---|---|---|"]
    for room, floor in sorted(FLOORS.items(), key=lambda item: (-item[1], item[0])):
        members = [module for module in MODULES if room_of(module) == room]
        lines = sum(len(MODULES[module].read_text(encoding="utf-8").splitlines()) for module in members)
        others = sorted({other for module in members for other in uses(module)}, key=lambda r: (-FLOORS[r], r))
        names = ", ".join(other.removeprefix("fastlora.") for other in others)
        rows.append(f"| {floor} | {room} | {len(members)} | {lines} | {names} |")
    return "\n".join(rows)
