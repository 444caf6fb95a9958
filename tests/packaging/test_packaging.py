"""The wheel, the source distribution and every way to install, built offline from a copy of the checkout.

`pytest tests/packaging`. Nothing is downloaded: what fastlora requires is linked to from this environment, and no more.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastlora.runtime import build

ROOT = Path(__file__).resolve().parents[2]
IGNORED = (
    ".git",
    ".venv*",
    ".cache",
    "build",
    "dist",
    "runs",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "_prebuilt",
)

pytestmark = pytest.mark.skipif(find_spec("setuptools") is None, reason="no setuptools here (the dev extra has it)")


def run(*command, cwd, **variables):
    """What a command that succeeds prints. It sees none of fastlora's variables but those that are given here."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "FASTLORA_"))}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy, so that building leaves nothing in the checkout and two builds do not share a folder."""
    ignored = shutil.ignore_patterns(*IGNORED)
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", symlinks=True, ignore=ignored))


def wheel_of(folder, out, **variables):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "-w", out, ".", cwd=folder, **variables)
    (wheel,) = out.glob("*.whl")
    return wheel


def package_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_files():
    """fastlora/kernels and fastlora/csrc, symlinks in the checkout, are folders in a wheel."""
    files = {path.relative_to(ROOT) for path in (ROOT / "fastlora").rglob("*.py")}
    files |= {Path("fastlora") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    endings = (".h", ".cpp", ".cu", ".cuh")
    files |= {Path("fastlora") / path.relative_to(ROOT) for path in (ROOT / "csrc").iterdir() if path.suffix in endings}
    return {str(path) for path in files} | {"fastlora/py.typed"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Links to what fastlora says that it requires, and to nothing else: torch is too large to be installed again."""
    folder = tmp_path_factory.mktemp("packages")
    waiting, seen = [Requirement(name) for name in ("fastlora", "pip", "setuptools")], set()
    while waiting:
        want = waiting.pop()
        one = distribution(want.name)
        for line in one.requires or ():
            more = Requirement(line)
            if not more.marker or any(more.marker.evaluate({"extra": extra}) for extra in ("", *want.extras)):
                waiting += [more] if str(more) not in seen else []
                seen.add(str(more))
        for entry in {Path(file).parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if "fastlora" not in entry and not (folder / entry).exists():
                (folder / entry).symlink_to(Path(sysconfig.get_path("purelib")) / entry)
    return folder


@pytest.fixture
def python(tmp_path, packages):
    """The Python of a fresh environment that sees those packages."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site) / "packages.pth").write_text(f"{packages}\n")
    return python


def test_wheel(checkout, tmp_path, python):
    """Built from the checkout and, the same, from the source distribution; its requirements; installed and used."""
    stale = checkout / "build" / "lib" / "fastlora" / "deleted_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    wheel = wheel_of(checkout, tmp_path / "out")
    assert wheel.name == "fastlora-0.1.0-py3-none-any.whl"
    assert package_files(wheel) == expected_files()
    with zipfile.ZipFile(wheel) as archive:
        assert "fastlora-0.1.0.dist-info/licenses/LICENSE" in archive.namelist()
        check_requirements(Parser().parsestr(archive.read("fastlora-0.1.0.dist-info/METADATA").decode()))

    program = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        if hasattr(tarfile, "data_filter"):
            file.extractall(tmp_path / "unpacked", filter="data")
        else:
            file.extractall(tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    wanted = "LICENSE README.md CITATION.cff constraints.txt dev.py tests/conftest.py kernels/configs.py"
    assert [name for name in wanted.split() if not (folder / name).is_file()] == []
    assert package_files(wheel_of(folder, tmp_path / "again")) == expected_files()

    # pip resolves the requirements, and finds them all in place. Then the package works where no checkout is.
    run(python, "-m", "pip", "install", "-q", "--no-index", wheel, cwd=tmp_path)
    place = tmp_path / "elsewhere"
    place.mkdir()
    assert "all checks passed" in run(python, "-m", "fastlora.doctor", cwd=place)
    without = run(python, "-m", "fastlora.doctor", cwd=place, CXX="no-such-compiler", FASTLORA_CACHE_DIR=str(place))
    assert "no C++ compiler: no-such-compiler is not on PATH" in without and "all checks passed" in without
    assert Path(run(python, "-c", USE, cwd=place, FASTLORA_CACHE_DIR=str(place)).strip()).is_relative_to(
        tmp_path / "venv"
    )


def check_requirements(metadata):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]

    def of(extra):
        """What an extra adds to the rest."""
        marked = [one for one in requirements if one.marker and not one.marker.evaluate({"extra": ""})]
        return [one for one in marked if one.marker and one.marker.evaluate({"extra": extra})]

    runtime = {one.name for one in requirements if not one.marker or one.marker.evaluate({"extra": ""})}
    assert runtime == {"torch", "safetensors", "numpy", "filelock"} | ({"triton"} if sys.platform == "linux" else set())
    pulled = {
        extra: {name for one in of(extra) if one.name == "fastlora" for name in one.extras}
        for extra in metadata.get_all("Provides-Extra")
    }
    assert pulled == {
        **{extra: set() for extra in ("docs", "peft")},
        **{extra: {"peft"} for extra in ("bench", "examples", "test", "trl")},
        "dev": {"bench", "docs", "examples", "test"},
    }
    assert {one.name for one in of("trl")} == {"fastlora", "datasets", "trl"}
    assert {one.name for one in of("peft")} == {"peft", "transformers"}


USE = """
import copy, shutil, sys, torch, fastlora
from fastlora.kernels import configs
from fastlora.ops import dropout
from fastlora.runtime import build, compiled

assert not {"peft", "transformers"} & set(sys.modules)
base = torch.nn.Sequential(torch.nn.Linear(48, 40), torch.nn.GELU(), torch.nn.Linear(40, 24)).double()
model = copy.deepcopy(base)
assert len(fastlora.patch(model, r=4, lora_alpha=8).patched) == 2
x = torch.randn(6, 48, dtype=torch.float64)
for layer in (model[0], model[2]):
    torch.nn.init.normal_(layer.lora_B["default"])
y = model(x)
merged = copy.deepcopy(base)
with torch.no_grad():
    for mine, layer in ((merged[0], model[0]), (merged[2], model[2])):
        mine.weight += 2 * layer.lora_B["default"] @ layer.lora_A["default"]
torch.testing.assert_close(y, merged(x))
y.square().sum().backward()
merged(x).square().sum().backward()
torch.testing.assert_close(model[2].lora_B["default"].grad, 2 * merged[2].weight.grad @ model[2].lora_A["default"].T)
torch.testing.assert_close(model[0].lora_A["default"].grad, 2 * model[0].lora_B["default"].T @ merged[0].weight.grad)
fastlora.save_adapter(model, "adapter")

gxx = shutil.which("g++")
if gxx and sys.platform == "linux":
    build.find_toolchain = lambda: build.Toolchain(gxx, None, ())  # without nvcc, which takes a minute
    compiled.load()
    assert dropout.dropout_keep_mask(torch.tensor([1]), 2, 9, 0.5).shape == (2, 9)
assert (build._SOURCES / "philox.h").is_file()
print(fastlora.__file__)
"""


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


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(checkout, tmp_path, python, mode):
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--config-settings", f"editable_mode={mode}", "--editable", checkout, cwd=tmp_path)
    program = (
        "import fastlora, fastlora.functional, fastlora.kernels.configs as configs\n"
        "from fastlora.runtime import build\n"
        "assert (build._SOURCES / 'philox.h').is_file()\n"
        "print(fastlora.__file__); print(configs.__file__)\n"
    )
    for file in run(python, "-c", program, cwd=tmp_path).split():
        assert Path(file).resolve().is_relative_to(checkout)
    # Even in the checkout, its kernels/ does not pose as the package of that name which transformers looks for.
    program = "from importlib.util import find_spec as f; k = f('kernels'); print(k and k.origin)"
    assert "checkout" not in run(python, "-c", program, cwd=checkout)
