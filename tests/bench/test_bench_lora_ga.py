"""bench/starts/shapes.py at tiny shapes: its measure against the plain formula, and what it writes."""

import json

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from transformers import BatchEncoding

from bench.starts import lora_ga
from bench.starts import shapes as lora_ga_shapes


@pytest.mark.parametrize("tokens", [20, 300])  # through the factors' QR, and through G
def test_the_measure_is_the_one_of_full_gradients(tokens):
    layer = lora_ga_shapes.MODELS["tiny"][4]
    settings = lora_ga_shapes.Settings("tiny", 4, 32, tokens, 2, "float32", "cpu")
    batches = settings.batches(4, layer)
    gradient = sum(dy.double().t() @ x.double() for x, dy in batches)
    a, b = torch.randn(4, layer.m), torch.randn(layer.n, 4)  # not orthonormal, as PEFT's B is not
    expected = lora_ga.errors({"": gradient}, {"": (a, b)}, 4)[0]  # type: ignore[dict-item]
    assert lora_ga_shapes.Truth(batches, 4).error(a, b) == pytest.approx(expected, rel=1e-6)
    assert expected > 1


def test_a_models_gradients(monkeypatch, tmp_path, capsys):
    """Ours next to PEFT's in one run, with seconds, bytes and errors."""
    model, batch = tiny_model("llama"), BatchEncoding(tiny_batch("llama"))
    task = lora_ga.Task(model.requires_grad_(False), [batch, batch], lambda model, batch: model(**batch).loss)
    monkeypatch.setattr(lora_ga, "docstring_task", lambda *settings: task)
    assert lora_ga.main(["--r", "2", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    rows, printed = result["results"], capsys.readouterr().out
    assert result["settings"]["layers"] == 14 and all(name in printed for name in rows)
    frozen, refined, peft = (
        rows[name] for name in ("backward passes alone", "GradientSketch, c = 32, refined", "PEFT's LoRA-GA")
    )
    assert frozen["seconds"] > 0 and frozen["errors"] == [] and frozen["peak"] is not None
    assert len(refined["errors"]) == 14 and 0.9999 < refined["median"] <= refined["worst"] < 1.001 < peft["median"]
    assert peft["held"] == 4 * sum(layer.weight.numel() for layer in lora_ga.linear_layers(task).values())


def test_the_whole_command(tmp_path, capsys):
    out = tmp_path / "results" / "lora_ga.json"
    arguments = ["--shapes", "tiny", "--r", "4", "--tokens", "30", "--micro-batches", "2", "--layers", "1", "--whole"]
    assert lora_ga.main([*arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["settings"]["width"] == 32 and result["machine"]["cpu"]
    (layer,) = result["compare"]
    errors = {name: contender["error"] for name, contender in layer["contenders"].items()}
    assert 0.9999 < errors["sketch, refined"] <= errors["sketch"] + 1e-6 < 1.05 < errors["two-sided sketch"]
    whole = result["whole_model"]
    assert whole["layers"] == 14 and whole["linalg"].startswith("torch")
    # Q, Z and what eight probes gave.
    assert whole["state_bytes"] == sum(
        4 * (32 * (layer.n + layer.m) + 8 * layer.n) for layer in lora_ga_shapes.MODELS["tiny"]
    )
    assert "svd_lowrank of the full gradient" in capsys.readouterr().out
