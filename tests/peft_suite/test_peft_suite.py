"""PEFT's own tests, with every LoRA layer patched: each ends as it does without fastlora, and plain LoRA runs fused.

Needs PEFT's source: run.py says how. `python tests/peft_suite/run.py` runs all that work offline.
"""

import pytest
import run


@pytest.fixture(scope="module")
def tests():
    try:
        return run.peft_tests()
    except run.Unavailable as problem:
        pytest.skip(str(problem))


@pytest.mark.slow
@pytest.mark.parametrize(("file", "expression"), run.QUICK)
def test_peft_s_tests_end_as_they_do_without_fastlora(tests, file, expression):
    comparison = run.compare(tests, file, expression, workers=2)
    assert comparison.plain.outcomes, "no test was selected"
    assert comparison.plain.counts["fused"] == 0
    assert comparison.differing == []
    counts = comparison.patched.counts
    assert counts["plain_not_fused"] == {}
    assert counts["plain_fused"] > 200
    # Whatever ran in PEFT's own forward was a variant of LoRA.
    assert {reason.split()[0] for reason, number in counts["fallback"].items() if number} <= {"variant"}


@pytest.mark.slow
def test_a_test_that_ends_otherwise_and_a_plain_call_left_to_peft_are_found(tmp_path, monkeypatch):
    """The comparison itself: with a fastlora that computes something else it must not pass."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_small.py").write_text(
        "import peft, torch\n"
        "def model():\n"
        "    base = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "    return peft.get_peft_model(base, peft.LoraConfig(target_modules=['0'], init_lora_weights=False))\n"
        "def test_runs():\n"
        "    assert model()(torch.ones(2, 4)).shape == (2, 3)\n"
        "def test_class():\n"
        "    assert type(model().base_model.model[0]) is peft.tuners.lora.layer.Linear\n"
        "def test_mixed_dtypes():\n"
        "    layer = model().base_model.model[0]\n"
        "    layer.lora_A['default'].bfloat16()\n"
        "    assert layer(torch.ones(2, 4)).shape == (2, 3)\n"
    )
    comparison = run.compare(tests, "test_small.py", "", workers=1)
    assert comparison.differing == ["peft_tests/test_small.py::test_class"]
    counts = comparison.patched.counts
    assert (counts["fused"], counts["plain_fused"]) == (1, 1)
    assert {why: n for why, n in counts["fallback"].items() if n} == {"adapter dtypes torch.bfloat16, torch.float32": 1}
    assert list(counts["plain_not_fused"].values()) == [1]
