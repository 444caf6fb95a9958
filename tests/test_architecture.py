"""The floors of docs/architecture.md, read from the imports; file lengths; what must not be there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500
MAX_TEST_LINES = 700  # a test file mirrors one source file, and its tables of cases are long

# Each module of the project with its floor. A module imports from floors below its own, or from its own floor.
FLOORS = {
    "fastlora.env": 0,
    "fastlora.progress": 0,
    "fastlora.reference": 0,
    "fastlora.sharding": 0,
    "fastlora.kernels": 0,
    "fastlora._build": 0,
    "fastlora.ops": 0,
    "fastlora.backends": 1,
    "fastlora.dispatch": 1,
    "fastlora.measure": 1,
    "fastlora.self_check": 1,
    "fastlora.tuning_cache": 1,
    "fastlora.group_dispatch": 1,
    "fastlora.segments_dispatch": 1,
    "fastlora.mlp_dispatch": 1,
    "fastlora.autograd": 2,
    "fastlora.mlp_autograd": 2,
    "fastlora.dora_dispatch": 1,
    "fastlora.importance_dispatch": 1,
    "fastlora.dora_autograd": 2,
    "fastlora.dora_functional": 3,
    "fastlora.kept_norms": 3,
    "fastlora.adapter_variants": 4,
    "fastlora.rank_schedule": 4,
    "fastlora.variants": 6,
    "fastlora.group_autograd": 2,
    "fastlora.segments_autograd": 2,
    "fastlora.quantized": 1,
    "fastlora.quant_autograd": 2,
    "fastlora.functional": 3,
    "fastlora.mlp_functional": 3,
    "fastlora.linalg": 3,
    "fastlora.mixed_batches": 3,
    "fastlora.starts": 4,
    "fastlora.layers": 4,
    "fastlora.grouping": 5,
    "fastlora.mlp": 5,
    "fastlora.targets": 5,
    "fastlora.peft_layers": 5,
    "fastlora.peft_merge": 5,
    "fastlora.peft_fused": 5,
    "fastlora.peft_adalora": 5,
    "fastlora.peft_starts": 5,
    "fastlora.peft_quantized": 5,
    "fastlora.peft_bnb": 5,
    "fastlora.peft_tuner": 5,
    "fastlora.peft_wrappers": 5,
    "fastlora.peft_format": 5,
    "fastlora.peft_ranks": 5,
    "fastlora.patch_report": 5,
    "fastlora.peft_patching": 6,
    "fastlora.adapters": 6,
    "fastlora.checkpoint": 6,
    "fastlora.combination": 6,
    "fastlora.adapter_files": 6,
    "fastlora.doctor": 6,
    "fastlora.explanation": 6,
    "fastlora.model_shapes": 0,
    "fastlora.tune": 6,
    "fastlora.init": 6,
    "fastlora.optim": 6,
    "fastlora.patching": 6,
    "fastlora": 6,
    "examples": 7,
    "bench": 7,
}
# Floor 0 is not one place: these know nothing of the rest of it either.
ALONE = ("fastlora.kernels", "fastlora.env", "fastlora.reference")
# Where the optional packages may be imported at all.
PEFT_ALLOWED = (
    "fastlora.peft_layers",
    "fastlora.peft_merge",
    "fastlora.peft_fused",
    "fastlora.peft_adalora",
    "fastlora.peft_quantized",
    "fastlora.peft_bnb",
    "fastlora.peft_tuner",
    "fastlora.patching",
    "fastlora.targets",
    "fastlora.adapter_files",
    "fastlora.checkpoint",
    "examples",
    "bench",
)
TRITON_ALLOWED = ("fastlora.kernels", "fastlora.backends", "examples", "bench")


def modules():
    """(module name, path) of every source file outside the tests."""
    for path in sorted((ROOT / "fastlora").glob("**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "kernels" not in parts:  # the symlink, which some Pythons follow here; kernels/ comes below
            yield ".".join(part for part in parts if part != "__init__"), path
    for path in sorted((ROOT / "kernels").glob("**/*.py")):
        yield ".".join(("fastlora", *path.relative_to(ROOT).with_suffix("").parts)), path
    for folder in ("examples", "bench"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


MODULES = dict(modules())


def floor_of(name):
    """The floor of the longest known prefix of a module's name; None for what is not the project's."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix == "fastlora" and length < len(parts):
            return None
        if prefix in FLOORS:
            return FLOORS[prefix]
    return None


def imports(name, path, tree=None):
    """Absolute names of everything that a module imports, wherever in the file, resolved as far as modules go."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                # `from fastlora import dispatch` imports a module, `from fastlora.env import get` a name out of one.
                yield full if full in MODULES or floor_of(full) is not None else module


def starts_with(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(name, path, tree=None):
    own = floor_of(name)
    for imported in imports(name, path, tree):
        other = floor_of(imported)
        if other is not None and own is not None and other > own:
            yield f"{name} (floor {own}) imports {imported} (floor {other})"
        for place in ALONE:
            if starts_with(name, [place]) and imported.startswith("fastlora") and not starts_with(imported, [place]):
                yield f"{name} imports {imported}; {place} knows nothing of the rest"
        if starts_with(imported, ["peft", "transformers"]) and not starts_with(name, PEFT_ALLOWED):
            yield f"{name} imports {imported}: only {', '.join(PEFT_ALLOWED)} may"
        if starts_with(imported, ["triton"]) and not starts_with(name, TRITON_ALLOWED):
            yield f"{name} imports {imported}: only {', '.join(TRITON_ALLOWED)} may"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name):
    assert list(violations(name, MODULES[name])) == []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_floor(name):
    assert floor_of(name) is not None, f"give {name} a floor here and in docs/architecture.md"


@pytest.mark.parametrize(
    "name, source",
    [
        ("fastlora.dispatch", "from fastlora import functional"),
        ("fastlora.dispatch", "from . import layers"),
        ("fastlora.backends.torch", "from ..autograd import lora_linear"),
        ("fastlora.kernels.gemm", "import fastlora.env"),
        ("fastlora.kernels.gemm", "def f():\n    from fastlora import env"),
        ("fastlora.layers", "import fastlora.patching as p"),
        ("fastlora.functional", "import fastlora"),
        ("fastlora.layers", "from peft.tuners import lora"),
        ("fastlora.dispatch", "import triton.language as tl"),
    ],
)
def test_the_check_sees_a_wrong_import(name, source):
    assert list(violations(name, ROOT / "some.py", ast.parse(source)))


@pytest.mark.parametrize(
    "name, source",
    [
        ("fastlora.patching", "from fastlora import functional\nfrom .layers import FusedLoraLinear"),
        ("fastlora.kernels.gemm", "from fastlora.kernels import tiling\nfrom . import dropout\nimport triton"),
        ("fastlora.dispatch", "from fastlora.env import backend"),
    ],
)
def test_the_check_allows_a_right_import(name, source):
    assert list(violations(name, ROOT / "some.py", ast.parse(source))) == []


def test_the_floor_table_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    for name in FLOORS:
        place = name.removeprefix("fastlora.")
        if place in ("fastlora", "_build", "ops"):  # the package itself, and csrc/'s Python side
            continue
        assert any(place in line for line in table), f"{name} is not in docs/architecture.md's table"


def source_files():
    folders = [ROOT / name for name in ("fastlora", "kernels", "csrc", "examples", "bench", "tests")]
    endings = (".py", ".cpp", ".cu", ".h", ".cuh", ".sh")
    found = {path.resolve() for folder in folders for path in folder.rglob("*") if path.suffix in endings}
    return sorted(found | {ROOT / "dev.py", ROOT / "setup.py"})


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    allowed = MAX_TEST_LINES if path.is_relative_to(ROOT / "tests") else MAX_LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= allowed


def test_kernels_is_no_regular_package():
    # With an __init__.py a checkout on sys.path would shadow the `kernels` package that transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastlora" / "kernels").resolve() == ROOT / "kernels"
    assert (ROOT / "fastlora" / "csrc").resolve() == ROOT / "csrc"


def test_importing_does_nothing_and_needs_no_optional_package():
    program = (
        "import sys\n"
        "for name in ('triton', 'peft', 'transformers'): sys.modules[name] = None\n"
        "import torch\n"
        "torch.cuda.is_available = torch.cuda.init = torch.cuda.device_count = None  # a probe would raise\n"
        "import fastlora\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
