"""The bytes that processes exchange: two processes sent what is counted from shapes, and the page has the count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.models import distributed

ROOT = Path(__file__).resolve().parents[2]


def test_what_was_sent_is_what_is_counted():
    record = json.loads((ROOT / "bench/results/cpu/distributed.json").read_text())
    assert {(case["way"], case["kind"]) for case in record["cases"]} == {
        (way, kind) for way in distributed.WAYS for kind in distributed.KINDS
    }
    for case in record["cases"]:
        arguments = case["way"], case["kind"], 2, record["tokens"], False
        assert case["sent"] == distributed.counted(distributed.SMALL, *arguments), case
    rows = distributed.table()
    assert record["counted"] == rows
    assert distributed.written(rows) in (ROOT / "docs/distributed.md").read_text()


def test_the_counts_at_one_layer():
    one = distributed.Model(8, 8, 8, 1, 1, r=2, base_bytes=2, adapter_bytes=4)
    assert one.adapters() == 7 * 2 * (8 + 8) * 4
    assert one.adapters(2) == 7 * 2 * (8 + 4) * 4
    sent = {kind: distributed.counted(one, "tp", kind, 2, 5) for kind in distributed.KINDS}
    assert sent["frozen"] == 4 * 5 * 8 * 2  # two all-reduces of x's size each way, of which two processes send all
    assert sent["fastlora"] - sent["frozen"] == 7 * 2 * 8 * 4 and sent["peft"] - sent["frozen"] == 7 * 2 * 5 * 4
    assert distributed.counted(one, "ddp", "peft", 4, 5) == 1.5 * one.adapters()


@pytest.mark.slow
def test_two_processes(tmp_path):
    assert distributed.main(["--out", str(tmp_path / "distributed.json"), "--tokens", "32"]) == 0
