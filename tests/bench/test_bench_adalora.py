"""bench/models/adalora.py at a tiny size: what it compares, and what it writes."""

import json

import pytest
import torch

from bench.models import adalora
from fastlora.variants import RankAllocator


def test_both_models_have_the_same_factors_and_gradients_and_scores():
    theirs, ours = adalora.build(4, 6, 3, torch.device("cpu"))
    names = {name for name, _ in ours.named_parameters() if ".lora_" in name}
    assert len(names) == 4 * 3
    for name in names:
        one, other = ours.get_parameter(name), theirs.base_model.model.get_parameter(name)
        assert torch.equal(one, other) and torch.equal(one.grad, other.grad) and one.grad.abs().sum() > 0
    allocator = RankAllocator(ours, 2, adalora.STEPS)
    theirs.base_model.update_and_allocate(1)
    allocator.step()
    adalora.check(theirs, allocator)
    allocator._parts[0].scores *= 1.01
    with pytest.raises(RuntimeError, match=r"the scores of blocks\.0\.q differ from PEFT's by 1"):
        adalora.check(theirs, allocator)


def test_the_whole_command(tmp_path, capsys):
    out = tmp_path / "results" / "adalora.json"
    assert (
        adalora.main(
            ["--device", "cpu", "--layers", "4", "--width", "6", "--r", "3", "--rounds", "2", "--out", str(out)]
        )
        == 0
    )
    record = json.loads(out.read_text())
    (case,) = record["cases"]
    assert set(case["times"]) == {"peft step", "fastlora step", "peft penalty", "fastlora penalty"}
    assert record["machine"]["cpu"] and case["numbers"] == 4 * (2 * 6 * 3 + 3)
    assert "x peft" in capsys.readouterr().out
