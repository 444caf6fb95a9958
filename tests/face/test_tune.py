"""python -m fastlora.tune, on the CPU's clock; the shapes of models."""

from __future__ import annotations

import json

import pytest
import torch
from pretended_gpu import backend_with

from fastlora import tune
from fastlora.ops.lora import choice, measure
from fastlora.runtime import cache as tuning_cache

TINY = ["--device", "cpu", "--shape", "20x12", "--tokens", "9", "--r", "3", "--dtype", "fp32"]
KEY = "M16 N12 K20 r3 float32+float32"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Two candidates that a CPU can run, and a cache of the test's own."""
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "LIMIT_S", 0.0)
    monkeypatch.setattr(choice, "_modules", {"cublas": backend_with(), "triton": "no", "triton_s_inside": "no"})
    tuning_cache.for_device.cache_clear()
    yield
    tuning_cache.for_device.cache_clear()


def test_it_measures_prints_and_keeps(capsys, tmp_path):
    assert tune.main([*TINY, "--dropout", "off", "--json", str(tmp_path / "copy.json")]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"cpu; 1 kinds of calls; kept in {tmp_path / 'measured'}")
    assert f"[1/1] {KEY} (" in output and ": forward " in output and ", backward " in output
    assert "without triton: cannot be imported: no" in output
    (path,) = (tmp_path / "measured").glob("*.json")
    kept = json.loads(path.read_text())
    assert list(kept["entries"]) == [KEY] and kept == json.loads((tmp_path / "copy.json").read_text())
    assert set(kept["entries"][KEY]["forward"]) == {"cublas", "torch"}


def test_what_is_known_is_not_measured_again_unless_asked(capsys, tmp_path, monkeypatch):
    assert tune.main(TINY) == 0
    monkeypatch.setattr(measure, "measure", lambda *_, **__: pytest.fail("measured again"))
    tuning_cache.for_device.cache_clear()  # as another process
    assert tune.main(TINY) == 0
    assert f"{KEY} (known): forward " in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    measured = []
    found = measure.Measurement({"cublas": 7.0, "torch": 8.0}, {"cublas": 7.0, "torch": 8.0}, {}, 1.0, {})
    monkeypatch.setattr(measure, "measure", lambda key, *_, **__: measured.append(str(key)) or found)
    monkeypatch.setattr(choice, "_modules", {"cublas": backend_with(), "triton": "no", "triton_s_inside": "no"})
    assert tune.main([*TINY, "--again"]) == 0 and measured == [KEY]
    (path,) = (tmp_path / "measured").glob("*.json")
    assert json.loads(path.read_text())["entries"][KEY]["forward"]["cublas"] == 7.0


def test_ctrl_c_keeps_what_was_measured(monkeypatch, capsys, tmp_path):
    real, calls = measure.measure, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(measure, "measure", interrupted)
    assert tune.main([*TINY[:-4], "--r", "3,4", "--dtype", "fp32"]) == 130
    (path,) = (tmp_path / "measured").glob("*.json")
    assert list(json.loads(path.read_text())["entries"]) == [KEY]
    assert capsys.readouterr().out.endswith("interrupted: what was measured is kept\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_to_do(capsys):
    assert tune.main(["--model-shapes", "llama-3-8b"]) == 2
    error = capsys.readouterr().err
    assert "no GPU" in error and "machine that trains" in error and "fastlora.doctor" in error


def test_what_could_not_be_measured_or_kept_is_a_failure(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(choice, "_modules", {name: "no" for name in ("cublas", "triton", "triton_s_inside")})
    assert tune.main(TINY) == 1
    assert f"{KEY} (" in (output := capsys.readouterr().out) and "not measured: only torch can take it" in output
    monkeypatch.setattr(choice, "_modules", {"cublas": backend_with(), "triton": "no", "triton_s_inside": "no"})
    (tmp_path / "measured").write_text("a file where the folder should be")
    assert tune.main(TINY) == 1
    assert "NOT KEPT: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to measure: want --model-shapes, --config or --shape"),
        (["--model-shapes", "llama-9"], "--model-shapes: got 'llama-9', want of qwen3-0.6b, llama-3.2-1b"),
        (["--config", "/no/such/folder"], "/no/such/folder: want a transformers config.json"),
        (["--shape", "4096"], "argument --shape"),
        (["--shape", "64x32", "--tokens", "0"], "got '0', want positive integers"),
        (["--shape", "64x32", "--dtype", "int8"], "got 'int8', want one of bfloat16"),
    ],
)
def test_wrong_calls_say_what_is_wanted(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        tune.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_kinds_of_calls_that_are_asked_for():
    options = tune.arguments(["--model-shapes", "llama-3-8b", "--tokens", "2048,8192", "--dropout", "both"])
    keys = tune.keys(options)
    assert len(keys) == 4 * 2 * 2 * 2 and len(set(keys)) == len(keys)
    BF16, FP32 = torch.bfloat16, torch.float32
    assert keys[0] == measure.Key(2048, 4096, 4096, 16, BF16, FP32, False) and keys[-1].adapter_dtype == BF16
    options = tune.arguments(["--model-shapes", "llama-3-8b,mistral-7b", "--dtype", "fp32"])
    assert len(tune.keys(options)) == 4  # one adapter dtype, and the two models are alike
    options = tune.arguments(["--shape", "4096x14336", "--adapter-dtype", "bf16", "--tokens", "5000"])
    assert tune.keys(options) == [measure.Key(8192, 14336, 4096, 16, BF16, BF16, False)]


def test_an_example_call_has_the_key_it_was_made_for():
    key = measure.Key(32, 12, 20, 4, torch.bfloat16, torch.float32, True)
    call = tune.example_call(key, torch.device("cpu"))
    assert measure.key_of(call.x, call.weight, call.lora_A, call.dropout_p) == key
    assert call.lora_B.shape == (12, 4) and call.weight.untyped_storage().nbytes() == 2
