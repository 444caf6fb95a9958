"""bench/galore/cost.py at tiny sizes: what it writes, and that its measures are what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.galore import cost as galore_cost
from bench.galore import training as galore_training


def test_the_whole_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(galore_training, "RATES", (0.02,))
    monkeypatch.setattr(galore_training, "SEEDS", (0,))
    out = tmp_path / "results" / "galore.json"
    arguments = ["--sizes", "96", "--rank", "8", "--tokens", "20", "--rounds", "2", "--training", "3"]
    threads = torch.get_num_threads()
    assert galore_cost.main([*arguments, "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    assert result["machine"]["cpu"] and result["settings"]["rank"] == 8
    captured = {line["name"]: line["captured"] for line in result["refresh"]["96"]}
    assert captured["full SVD"] == pytest.approx(1, abs=1e-5)
    assert 0.9 < captured["subspace, refresh_iterations=1"] < captured["subspace, refresh_iterations=2"] <= 1 + 1e-5
    assert captured["R alone, in the old basis"] < captured["streamed, 1 iteration, besides R"] < 1
    nbytes = {line["name"]: line["nbytes"] for line in result["step"]["96"]}
    assert nbytes["torch.optim.AdamW"] == 2 * 4 * 96 * 96
    assert nbytes["GaLore, plain"] == nbytes["GaLore, factored"] == 4 * 8 * (96 + 2 * 96)
    assert all(line["seconds"] > 0 for kind in ("refresh", "step") for line in result[kind]["96"])
    assert set(result["training"]) == set(galore_training.WAYS)
    printed = capsys.readouterr().out
    assert "svd_lowrank, niter=2" in printed and "GaLore, official" in printed


def test_the_committed_results_are_complete():
    result = json.loads(Path(galore_cost.OUT).read_text())
    assert result["settings"]["sizes"] == [1024, 2048] and set(result["training"]) == set(galore_training.WAYS)
    losses = {name: min(line.values()) for name, line in result["training"].items()}
    assert losses["torch.optim.AdamW"] < losses["GaLore"] < losses["projected weights frozen"]
