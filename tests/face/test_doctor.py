"""python -m fastlora.doctor: says what is so, survives what is missing, and fails when a result is wrong."""

import os
import subprocess
import sys

import pytest
import torch

from fastlora import doctor
from fastlora.ops.lora import aten as lora_aten
from fastlora.runtime import env


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith(env.PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path / "cache"))


def rows(output):
    """{label: text} of the indented lines."""
    lines = [line.strip() for line in output.splitlines() if line.startswith("  ")]
    return {label: text.strip() for label, _, text in (line.partition("  ") for line in lines)}


def test_report(capsys, tmp_path):
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    found = rows(output)
    assert found["torch float32"].startswith("right: relative errors (eager's) y ")
    assert torch.__version__ in output
    assert "available" in output
    assert found["cache"] == f"{tmp_path / 'cache'} (not there yet, can be made)"
    assert "not built" in output
    assert output.endswith("all checks passed\n")
    assert not (tmp_path / "cache").exists()  # looking changes nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why(capsys):
    doctor.main([])
    found = rows(capsys.readouterr().out)
    assert found["gpu"].startswith("none: torch ")
    for name in ("cublas", "triton"):
        assert doctor.backend_states()[name] is not None


def test_variables_are_shown_with_their_meaning_and_typing_errors_with_the_closest_name(capsys, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    monkeypatch.setenv("FASTLORA_CACHEDIR", "/tmp")
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert f"torch ({env.VARIABLES['FASTLORA_BACKEND'].meaning})" in output
    assert "FASTLORA_CACHEDIR WARNING: fastlora does not know this name; did you mean FASTLORA_CACHE_DIR?" in output


def test_a_bad_value_fails(capsys, monkeypatch):
    monkeypatch.setenv("FASTLORA_CUDA_ARCHS", "hopper")
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    assert "BAD VALUE: FASTLORA_CUDA_ARCHS='hopper'" in output
    assert "torch float32" in output  # the other sections are there


def test_linear_algebra_says_which_and_why(capsys, monkeypatch):
    if not torch.cuda.is_available():
        doctor.main([])
        assert rows(capsys.readouterr().out)["linalg"].startswith("torch: not on a GPU")
    monkeypatch.setenv("FASTLORA_LINALG", "native")
    monkeypatch.setattr(doctor.native._trusted, "verdicts", {(doctor._device(),): "its basis is 0.5 from orthonormal"})
    doctor.main([])
    assert rows(capsys.readouterr().out)["linalg"] == "torch: its basis is 0.5 from orthonormal"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_gradient_fails(capsys, monkeypatch, which):
    right = lora_aten.backward

    def wrong(*arguments, **keywords):
        gradients = list(right(*arguments, **keywords))
        gradients[which] = gradients[which] * 1.1
        return tuple(gradients)

    monkeypatch.setattr(lora_aten, "backward", wrong)
    assert doctor.main([]) == 1
    found = rows(capsys.readouterr().out)
    assert found["torch float32"].startswith("FAILED")
    assert found["torch dropout"].startswith("FAILED")


def test_a_wrong_output_fails(capsys, monkeypatch):
    right = lora_aten.forward

    def wrong(*arguments, **keywords):
        y, *rest = right(*arguments, **keywords)
        return (y * 1.01, *rest)

    monkeypatch.setattr(lora_aten, "forward", wrong)
    assert doctor.main([]) == 1
    assert rows(capsys.readouterr().out)["torch float32"].startswith("FAILED")


def test_a_section_that_raises_keeps_no_other_from_being_printed(capsys, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: 1 / 0)
    monkeypatch.setattr(doctor.env, "cache_dir", lambda: 1 / 0)
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert output.count("could not be determined: ZeroDivisionError") >= 2
    assert "torch float32" in output


def test_a_self_check_that_raises_fails(capsys, monkeypatch):
    monkeypatch.setattr(doctor.lora_op, "lora_linear", lambda *_, **__: 1 / 0)
    assert doctor.main([]) == 1
    assert "could not be determined: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_cache_is_reported(capsys, monkeypatch, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path / "locked" / "cache"))
    doctor.main([])
    assert "not writable" in capsys.readouterr().out


def test_works_without_triton_peft_and_transformers():
    program = (
        "import runpy, sys\n"
        "for name in ('triton', 'peft', 'transformers'): sys.modules[name] = None\n"
        "runpy.run_module('fastlora.doctor', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert found["torch float32"].startswith("right")
    assert found["triton"].startswith(("unavailable: ", "3.", "not installed"))
    assert "cublas           unavailable: cannot be imported" in done.stdout


@pytest.mark.slow
def test_build_compiles_and_checks_the_ops(tmp_path):
    environ = {**os.environ, "CUDA_HOME": "", "FASTLORA_CACHE_DIR": str(tmp_path), "FASTLORA_CUDA_ARCHS": "80"}
    command = [sys.executable, "-m", "fastlora.doctor", "--build"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    text = rows(done.stdout)["csrc ops"]
    if "no C++ compiler" in done.stdout:
        assert "cannot be built here" in text
    else:
        assert text.endswith("loads, and its dropout mask is right"), done.stdout
        assert list(tmp_path.rglob("fastlora_ops.so"))
