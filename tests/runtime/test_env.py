"""fastlora.runtime.env: parsing, defaults, errors, and that it is the only reader and the documentation is complete."""

import re
from pathlib import Path

import pytest

from fastlora.runtime import env

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_defaults():
    assert env.backend() == "auto"
    assert env.build_cuda() is False
    assert env.linalg() == "auto"
    assert env.measure() == "auto"
    assert env.cuda_archs() == ("80", "90a", "100")


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_means_unset(monkeypatch, text):
    monkeypatch.setenv("FASTLORA_BUILD_CUDA", text)
    monkeypatch.setenv("FASTLORA_CACHE_DIR", text)
    assert env.build_cuda() is False
    assert env.cache_dir().name == "fastlora"


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("FASTLORA_BACKEND", "torch", "torch"),
        ("FASTLORA_BACKEND", " Triton ", "triton"),
        ("FASTLORA_BUILD_CUDA", "1", True),
        ("FASTLORA_BUILD_CUDA", "on", True),
        ("FASTLORA_BUILD_CUDA", "False", False),
        ("FASTLORA_CUDA_ARCHS", "90a; 100,120f", ("90a", "100", "120f")),
    ],
)
def test_values(monkeypatch, name, text, value):
    monkeypatch.setenv(name, text)
    assert env.get(name) == value


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("FASTLORA_BACKEND", "cuda", "auto, torch, cublas, triton"),
        ("FASTLORA_BUILD_CUDA", "-1", "1 or 0"),
        ("FASTLORA_CUDA_ARCHS", "9.0", "without the dot"),
        ("FASTLORA_CUDA_ARCHS", ",", "without the dot"),
        ("FASTLORA_CACHE_DIR", "relative/path", "absolute"),
        ("FASTLORA_LINALG", "cusolver", "auto, torch, native"),
        ("FASTLORA_MEASURE", "yes", "auto, off, always"),
        ("FASTLORA_PROGRESS", "perhaps", "auto, on, off"),
    ],
)
def test_bad_values_name_the_variable_what_came_and_what_is_wanted(monkeypatch, name, text, wanted):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=re.escape(f"{name}={text!r}")) as error:
        env.get(name)
    assert wanted in str(error.value)


def test_every_variable_has_a_test_of_a_bad_value():
    tested = {
        arguments[0]
        for mark in test_bad_values_name_the_variable_what_came_and_what_is_wanted.pytestmark  # pyright: ignore
        for arguments in mark.args[1]
    }
    assert tested == set(env.VARIABLES)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / "fastlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert env.cache_dir() == tmp_path / "home" / ".cache" / "fastlora"
    monkeypatch.setenv("FASTLORA_CACHE_DIR", "~/kept")
    assert env.cache_dir() == tmp_path / "home" / "kept"
    assert not env.cache_dir().exists()  # asking makes nothing


def test_cache_dir_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="this is a file"):
        env.cache_dir()


def test_unknown_names_come_with_the_closest_known_one():
    environ = {"FASTLORA_BACKENDS": "torch", "FASTLORA_QQQ": "1", "FASTLORA_BACKEND": "torch", "HOME": "/"}
    assert env.unknown(environ) == {"FASTLORA_BACKENDS": "FASTLORA_BACKEND", "FASTLORA_QQQ": None}


def test_nothing_else_reads_the_variables():
    # Reading is os.environ/os.getenv on a FASTLORA_ name; mentioning one in a message or a docstring is fine.
    reader = re.compile(r"""(environ|getenv)\W[^\n]{0,20}["']FASTLORA_""")
    sources = [*(ROOT / "fastlora").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]
    assert len(sources) > 3
    found = [str(path) for path in sources if path.name != "env.py" and reader.search(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("function", ["backend", "build_cuda", "cache_dir", "cuda_archs", "measure"])
def test_every_variable_is_used(function):
    sources = [path for path in (ROOT / "fastlora").rglob("*.py") if path.name != "env.py"] + [ROOT / "setup.py"]
    uses = re.compile(rf"\b(env|load\(.runtime.env.\))\.{function}\(")
    assert any(uses.search(path.read_text(encoding="utf-8")) for path in sources)
    assert "FASTLORA_" + function.upper() in env.VARIABLES


@pytest.mark.parametrize("name", sorted(env.VARIABLES))
def test_contributing_lists_every_variable(name):
    variable = env.VARIABLES[name]
    row = f"| `{name}` | {variable.default} | {variable.meaning} |"
    assert row in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_contributing_lists_no_other_variable():
    mentioned = set(re.findall(r"FASTLORA_[A-Z_]+", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert mentioned <= set(env.VARIABLES)
