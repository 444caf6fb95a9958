"""bench/layers/multi_adapter.py: tiny, on the CPU; what is compared agrees, and what would be wrong is not measured."""

import json

import pytest
import torch
from torch import Tensor

from bench.layers import multi_adapter


def test_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "multi_adapter.json"
    arguments = ["--device", "cpu", "--sizes", "tiny", "--dtype", "mixed", "--rounds", "2", "--out", str(out)]
    assert multi_adapter.main(arguments) == 0
    record = json.loads(out.read_text())
    assert len(record["cases"]) == 2 and "serve x peft" in capsys.readouterr().out
    for case in record["cases"]:
        assert not case["failed"]
        assert set(case["results"]) == {"frozen", "eager", "fastlora", "peft"}
        assert all(entry["both"]["median"] > 0 for entry in case["results"].values())


def test_sequences_are_dealt_out_in_turn():
    assert multi_adapter.Batch(5, 1, 2, 8, 8).ids() == [0, 1, 0, 1, 0]
    assert multi_adapter.Batch(5, 1, 2, 8, 8, bare=True).ids() == [-1, 0, 1, -1, 0]


def test_what_is_wrong_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    ways = multi_adapter.ways

    def with_a_wrong_one(batch, tensors):
        found = ways(batch, tensors)
        right = found["fastlora"]

        def wrong(x: Tensor) -> Tensor:
            return right(x.roll(1, 0))

        return {**found, "fastlora": wrong}

    monkeypatch.setattr(multi_adapter, "ways", with_a_wrong_one)
    case = multi_adapter.measure(multi_adapter.SIZES["tiny"][0], "fp32", torch.device("cpu"), 1, "cpu")
    assert "differs from eager" in case["failed"]["fastlora"] and "fastlora" not in case["results"]
