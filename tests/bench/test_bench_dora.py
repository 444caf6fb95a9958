"""bench/layers/dora.py: tiny, on the CPU; what is compared agrees, and what would be wrong is not measured."""

import json

import torch

from bench.layers import dora


def test_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "dora.json"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--dtype", "mixed", "--rounds", "2", "--out", str(out)]
    assert dora.main(arguments) == 0
    record = json.loads(out.read_text())
    assert len(record["layers"]) == 2 and "over frozen" in capsys.readouterr().out
    for case in record["layers"]:
        assert not case["failed"]
        assert set(case["times"]) == {"frozen", "fastlora LoRA", "eager", "fastlora", "peft"}
        kept = {name: memory["saved_bytes"] for name, memory in case["memory"].items()}
        assert kept["frozen"] == 0 < kept["fastlora"] < kept["peft"]


def test_what_is_wrong_is_not_measured(monkeypatch):
    monkeypatch.setattr(dora, "dora_linear", lambda x, weight, *_: x @ weight.t() + 0 * sum(t.sum() for t in _[:3]))
    case = dora.measure(dora.SHAPES["tiny"][0], "fp32", 0.0, torch.device("cpu"), 1, "cpu")
    assert "differs from eager" in case["failed"]["fastlora"]
    assert "fastlora" not in case["times"]
