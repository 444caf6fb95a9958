"""`python -m bench head` at a tiny size: what agrees is measured, what is wrong is not."""

import json

from bench.layers import head


def test_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "head.json"
    assert head.main(["--device", "cpu", "--sizes", "tiny", "--rounds", "2", "--out", str(out)]) == 0
    (case,) = json.loads(out.read_text())["heads"]
    assert case["failed"] == {} and set(case["ways"]) == {"eager", "eager frozen", "frozen", "fastlora", "log_probs"}
    assert case["ways"]["fastlora"]["saved_bytes"] < case["ways"]["eager"]["saved_bytes"]
    assert "32 tokens, 24 -> 101 words, r=16 fp32" in capsys.readouterr().out
