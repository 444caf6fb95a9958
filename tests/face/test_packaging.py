"""The wheel, the source distribution and every way to install, built offline from a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastlora.runtime import build

ROOT = Path(__file__).resolve().parents[2]
IGNORED = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "runs",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "_prebuilt",
)

pytestmark = pytest.mark.slow
needs_setuptools = pytest.mark.skipif(
    find_spec("setuptools") is None, reason="no setuptools here (the dev extra has it)"
)


@pytest.fixture
def checkout(tmp_path):
    """A copy, so that building leaves nothing in the checkout and two tests do not share a build folder."""
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", symlinks=True, ignore=shutil.ignore_patterns(*IGNORED)))


def run(*command, cwd, **variables):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "FASTLORA_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(folder, out, **variables):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "-w", out, ".", cwd=folder, **variables)
    (wheel,) = out.glob("*.whl")
    return wheel


def package_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_files():
    files = {path.relative_to(ROOT) for path in (ROOT / "fastlora").rglob("*.py")}
    files |= {Path("fastlora") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    endings = (".h", ".cpp", ".cu", ".cuh")
    files |= {Path("fastlora") / path.relative_to(ROOT) for path in (ROOT / "csrc").iterdir() if path.suffix in endings}
    return {str(path) for path in files} | {"fastlora/py.typed"}


@needs_setuptools
def test_wheel(checkout, tmp_path):
    stale = checkout / "build" / "lib" / "fastlora" / "deleted_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    wheel = wheel_of(checkout, tmp_path / "out")
    assert wheel.name == "fastlora-0.1.0-py3-none-any.whl"
    assert package_files(wheel) == expected_files()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("fastlora-0.1.0.dist-info/METADATA").decode()
    assert "fastlora-0.1.0.dist-info/licenses/LICENSE" in names
    runtime = {line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in line}
    assert {re.split(r"[ ;<>=]", line)[0] for line in runtime} == {"torch", "triton", "safetensors", "filelock"}


@needs_setuptools
def test_source_distribution_makes_the_same_wheel(checkout, tmp_path):
    program = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        if hasattr(tarfile, "data_filter"):
            file.extractall(tmp_path / "unpacked", filter="data")
        else:
            file.extractall(tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    for name in ("LICENSE", "README.md", "constraints.txt", "dev.py", "tests/conftest.py", "kernels/configs.py"):
        assert (folder / name).is_file(), name
    assert package_files(wheel_of(folder, tmp_path / "out")) == expected_files()


@needs_setuptools
@pytest.mark.skipif(sys.platform != "linux" or build._find_nvcc() is None, reason="no nvcc")
def test_wheel_with_compiled_ops(checkout, tmp_path):
    variables = {"FASTLORA_BUILD_CUDA": "1", "FASTLORA_CUDA_ARCHS": "80"}
    wheel = wheel_of(checkout, tmp_path / "out", **variables)
    assert re.fullmatch(r"fastlora-0\.1\.0-py3-none-linux_\w+\.whl", wheel.name)
    assert package_files(wheel) - expected_files() == {
        f"fastlora/_prebuilt/{build.OBJECT_NAME}",
        "fastlora/_prebuilt/stamp.json",
    }
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = (
        "import torch\nfrom fastlora.ops import dropout\nfrom fastlora.runtime import compiled\n"
        "print(compiled.load())\ndropout.dropout_keep_mask(torch.tensor([1]), 2, 9, 0.5)"
    )
    loaded = run(
        sys.executable,
        "-P" if sys.version_info >= (3, 11) else "-B",
        "-c",
        program,
        cwd=tmp_path / "installed",
        PYTHONPATH=str(tmp_path / "installed"),
        FASTLORA_CACHE_DIR=str(tmp_path / "unused"),
    )
    assert Path(loaded.strip()).parent.name == "_prebuilt"
    assert not (tmp_path / "unused").exists()


INSTALLS = {
    "plain": (),
    "editable": ("--editable",),
    "editable strict": ("--config-settings", "editable_mode=strict", "--editable"),
    "editable compat": ("--config-settings", "editable_mode=compat", "--editable"),
}


@needs_setuptools
@pytest.mark.parametrize("mode", INSTALLS)
def test_install(checkout, tmp_path, mode):
    # An empty environment that sees this one's packages, but not its installed fastlora: .pth files do not nest.
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, *INSTALLS[mode], checkout, cwd=tmp_path)
    program = (
        "import fastlora, fastlora.functional, fastlora.kernels.configs as configs\n"
        "from fastlora.runtime import build\n"
        "assert len(build.key(build.Toolchain('g++', None, ()))) == 20\n"
        "assert (build._SOURCES / 'philox.h').is_file()\n"
        "print(fastlora.__file__); print(configs.__file__)\n"
    )
    place = checkout if mode != "plain" else tmp_path / "venv"
    for file in run(python, "-c", program, cwd=tmp_path).split():
        assert Path(file).resolve().is_relative_to(place)
    # Even in the checkout, its kernels/ does not pose as the package of that name which transformers looks for.
    kernels = run(
        python, "-c", "from importlib.util import find_spec as f; k = f('kernels'); print(k and k.origin)", cwd=checkout
    )
    assert "checkout" not in kernels
