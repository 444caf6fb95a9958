"""bench/layers/overhead.py, and that the dispatcher's share of a call is small beside the call."""

import json

import torch

from bench.layers import overhead
from fastlora.ops.lora import choice as lora_choice

CPU = torch.device("cpu")


def test_it_prints_and_writes_every_row(capsys, tmp_path):
    before = dict(lora_choice._modules)
    assert overhead.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path / "overhead.json")]) == 0
    seconds = json.loads((tmp_path / "overhead.json").read_text())["seconds"]
    assert list(seconds) == ["F.linear", "eager", "fastlora", "python", "select"]
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] < 1 for row in seconds.values())
    assert "x 1.00" in capsys.readouterr().out and lora_choice._modules == before


def test_select_is_a_small_part_of_a_call():
    """In turns with the Python half of the call it belongs to, of which it takes about a fortieth."""
    found = overhead.measure(CPU, torch.float32, rounds=5)
    assert found["select"].p20 < 0.25 * found["python"].p20
