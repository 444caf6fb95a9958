"""The type hints from a user's side: pyright, strict, on typing_sample.py and the package as pip installs it."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tests" / "face" / "typing_sample.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pyright") is None, reason="no pyright here (the dev extra has it)"),
]


@pytest.fixture(scope="module")
def script_folder(tmp_path_factory):
    """A folder for scripts, with an environment beside it that has a copy of the package and torch, but no sources."""
    folder = tmp_path_factory.mktemp("user")
    packages = folder / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    shutil.copytree(ROOT / "fastlora", packages / "fastlora", ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "rest.pth").write_text("\n".join(site.getsitepackages()))
    (folder / "pyrightconfig.json").write_text(
        json.dumps(
            {
                "venvPath": ".",
                "venv": "venv",
                "exclude": ["venv"],
                "typeCheckingMode": "strict",
                "reportUnnecessaryTypeIgnoreComment": "error",
            }
        )
    )
    return folder


def problems(folder: Path, code: str) -> list[str]:
    """What pyright reports of a script: "line rule: message"."""
    (folder / "script.py").write_text(code, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [sys.executable, "-m", "pyright", "--outputjson", "script.py"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [f"{p['range']['start']['line'] + 1} {p.get('rule')}: {p['message']}" for p in found]


def test_the_sample(script_folder):
    assert problems(script_folder, SAMPLE.read_text(encoding="utf-8")) == []


def test_mistakes_are_found_where_nothing_hides_them(script_folder):
    """The check itself checked: the same script without its ignores has an error on each of those lines."""
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    hidden = {number for number, line in enumerate(lines, 1) if "# pyright: ignore" in line}
    bare = "\n".join(line.split("  # pyright: ignore")[0] for line in lines)
    assert {int(problem.split()[0]) for problem in problems(script_folder, bare)} == hidden
    assert len(hidden) > 12
