"""The rooms of docs/architecture.md, read from the source: floors, circles, file lengths."""

import ast
import re
import subprocess
import sys

import pytest
from rooms import FLOORS, MODULES, ROOT, circles, room_of, violations

MAX_LINES = 800


def test_imports_go_downward():
    assert [text for module in MODULES for text in violations(module)] == []


def test_no_circle_of_imports():
    assert circles() == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("fastlora.ops.lora.choice", "from fastlora.layers import linear"),
        ("fastlora.ops.lora.aten", "from ...adapters.patch import patch"),
        ("fastlora.kernels.gemm", "def f():\n    from fastlora.runtime import env"),
        ("fastlora.introspect.names", "from ..runtime import env"),
        ("fastlora.layers.linear", "from peft.tuners import lora"),
        ("fastlora.layers.linear", "from ..ops.lora.autograd import _library"),
        ("fastlora.adapters.save", "from ..variants.adalora import RankAllocator"),
    ],
)
def test_the_check_sees_a_wrong_import(module, source):
    assert violations(module, ast.parse(source))


def test_the_check_allows_a_right_import():
    right = "from . import kinds\nfrom ..ops.call import Adapter\nfrom .kinds import _private\nimport torch"
    assert violations("fastlora.layers.linear", ast.parse(right)) == []


def test_few_modules_lie_flat():
    flat = {path.name for path in (ROOT / "fastlora").glob("*.py")}
    assert flat == {"__init__.py", "functional.py", "doctor.py", "tune.py"}


def test_the_page_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("| "))
    for room in FLOORS:
        place = (
            "fastlora/__init__.py"
            if room == "fastlora"
            else room.replace(".", "/").replace("fastlora/kernels", "kernels")
        )
        assert place in table, f"{place} is not in the table of docs/architecture.md"
    assert all(room_of(module) for module in MODULES)


def test_files_are_short():
    folders = ("fastlora", "kernels", "csrc", "examples", "bench", "tests")
    endings = (".py", ".cpp", ".cu", ".h", ".cuh", ".sh")
    found = {path.resolve() for name in folders for path in (ROOT / name).rglob("*") if path.suffix in endings}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in found}
    assert {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_kernels_is_no_regular_package():
    # With an __init__.py a checkout on sys.path would shadow the `kernels` package that transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastlora" / "kernels").resolve() == ROOT / "kernels"
    assert (ROOT / "fastlora" / "csrc").resolve() == ROOT / "csrc"


def test_launchers_launch_in_one_way():
    """`launch.launch`, which can be recorded: a plan would leave out a `kernel[grid](...)`."""
    sources = [path for path in (ROOT / "kernels").glob("*.py") if path.name != "launch.py"]
    others = [path.name for path in sources if re.search(r"_kernel\[[^:\]]+\]\(", path.read_text())]
    assert len(sources) > 10 and not others


def test_modules_are_found_by_imports_and_not_by_name():
    """No look-up of a module of fastlora in sys.modules, and no class of it named in a string."""
    for module, path in MODULES.items():
        if module.startswith("fastlora"):
            assert 'sys.modules["fastlora' not in path.read_text(encoding="utf-8").replace('.get("', '["'), module


def test_importing_does_nothing_and_needs_no_optional_package():
    program = (
        "import sys\n"
        "for name in ('triton', 'peft', 'transformers', 'bitsandbytes', 'trl'): sys.modules[name] = None\n"
        "import torch\n"
        "torch.cuda.is_available = torch.cuda.init = torch.cuda.device_count = None  # a probe would raise\n"
        "import fastlora\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
