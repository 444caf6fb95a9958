"""The benchmarks of groups, blocks and training steps: that all contenders compute the same, what is counted, what is
saved for the backward pass, the runner from end to end, tiny."""

import json

import pytest
import torch

from bench.harness import turns
from bench.harness.contenders import Contender, Tensors, build
from bench.harness.counting import Problem, Roof
from bench.harness.memory import saved_bytes
from bench.harness.timing import CpuTimer
from bench.layers import experts, forms, mixed
from bench.models import blocks, suite
from bench.show import summary

CPU = torch.device("cpu")
ROOF = Roof(flops=1e11, bandwidth=1e10)


def values_of(case, name):
    contender = case.builders[name]()
    return turns.step_values(contender, *case.inputs[0])[1]


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("bfloat16", "float32")])
def test_groups_agree(kinds):
    pytest.importorskip("peft")
    case = forms.group_case("qkv", forms.Group(512, 264, (40, 24, 24), 4, *kinds), CPU)
    want = values_of(case, "eager")
    assert len(want) == 3 + 1 + 6  # outputs, dX, and two factors for each layer
    for name in ("peft", "addmm", "one by one", "group"):
        turns.check_close(values_of(case, name), want, 1e-5 if kinds[0] == "float32" else 2e-2)


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("bfloat16", "float32")])
def test_mlps_and_mixed_batches_agree(kinds):
    pytest.importorskip("peft")
    like = Problem(0, 0, 0, 4, *kinds)
    allowed = 1e-5 if kinds[0] == "float32" else 2e-2
    case = forms.mlp_case(512, 264, 320, like, CPU)
    want = values_of(case, "eager")
    for name in ("peft", "addmm", "one by one", "mlp"):
        turns.check_close(values_of(case, name), want, allowed)
    case = mixed.mixed_case(mixed.Batch(9, 60, 40, 264, 3), like, CPU)
    want = values_of(case, "eager")
    assert len(want) == 2 + 2 * 3
    for name in ("peft", "mixed batch"):
        turns.check_close(values_of(case, name), want, allowed)


@pytest.mark.parametrize("name", ["tiny", "llama-tiny"])
def test_whole_models_agree(name):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    make = blocks.block_case if name == "tiny" else blocks.training_case
    case = make(name, blocks.Settings(4, 512, r=4, dtype="float32", adapter_dtype="float32"), CPU, 1)
    want = values_of(case, "eager")
    assert all(value.abs().max() > 0 for value in want)
    for other in ("peft", "fastlora", "fastlora grouped", "fastlora fused"):
        turns.check_close(values_of(case, other), want, 1e-4)


def test_a_blocks_work_by_hand():
    layers = {"a": torch.nn.Linear(10, 6), "b": torch.nn.Linear(6, 10)}
    settings = blocks.Settings(2, 4, r=2, dtype="float32", adapter_dtype="float32")
    found = blocks.work(layers, settings, hidden=10, attention=6)
    one = 2 * 8 * (60 + 2 * 16)  # of each layer: 8 tokens, the weight and the two factors
    assert found["forward"].flops == 2 * one + 4 * 8 * 4 * 6
    assert found["both"].flops == 2 * (one + 2 * 8 * (60 + 2 * 2 * 16)) + 3 * 4 * 8 * 4 * 6
    parameters, factors, passed = 2 * 60 * 4, 2 * 32 * 4, 8 * 10 * 4
    assert found["forward"].bytes == parameters + factors + 2 * passed
    assert found["both"].bytes == 2 * parameters + 3 * factors + 4 * passed


@pytest.mark.parametrize(
    "kinds, dropout, fewer",
    [
        (("float32", "float32"), 0.0, False),  # all keep x and S, and nothing else
        (("float32", "float32"), 0.1, False),  # and ATen's mask, on a CPU: a GPU keeps a seed (tests/gpu)
        (("bfloat16", "float32"), 0.0, True),
        (("bfloat16", "float32"), 0.1, True),
    ],
)
def test_a_layer_saves_fewer_bytes(kinds, dropout, fewer):
    """Than eager PyTorch, which keeps copies of the factors, and PEFT, which keeps an fp32 copy of x. Never more."""
    pytest.importorskip("peft")
    problem = Problem(512, 384, 320, 8, *kinds, dropout=dropout)
    tensors = Tensors.random(problem, CPU)
    ((x, _),) = tensors.inputs(1, CPU)
    saved = {name: saved_bytes(build(name, tensors), x) for name in ("frozen", "eager", "peft", "torch")}
    assert saved["frozen"] == 0
    mask = problem.x if dropout else 0  # the torch backend keeps ATen's own mask, of x's dtype on a CPU
    assert saved["torch"] == problem.x + problem.s + mask
    if fewer:
        assert saved["torch"] < min(saved["eager"], saved["peft"])
    else:
        assert saved["torch"] <= min(saved["eager"], saved["peft"])


def test_a_block_saves_fewer_bytes():
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    settings = blocks.Settings(4, 512, r=4, dtype="bfloat16", adapter_dtype="float32")
    case = blocks.block_case("tiny", settings, CPU, 1)
    x = case.inputs[0][0]
    saved = {name: saved_bytes(make(), x) for name, make in case.builders.items() if name not in ("frozen", "compile")}
    assert saved["fastlora"] < min(saved["eager"], saved["peft"])
    assert saved["fastlora grouped"] <= saved["fastlora"]
    assert saved["fastlora fused"] < saved["fastlora grouped"]  # h and act(gate) are made again
    peaks = {name: turns.step_values(case.builders[name](), *case.inputs[0])[0] for name in saved}
    assert peaks["fastlora"] < min(peaks["eager"], peaks["peft"])


def test_doras_agree_and_ours_keeps_less(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "dora.json"
    arguments = ["--forms", "dora", "--device", "cpu", "--size", "tiny", "--dtype", "mixed", "--out", str(out)]
    assert suite.main([*arguments, "--dropout", "0"]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert not case["unavailable"]
    assert set(case["results"]) == {"frozen", "fastlora LoRA", "eager", "fastlora", "peft"}
    kept = {name: entry["saved_bytes"] for name, entry in case["results"].items()}
    assert kept["frozen"] == 0 < kept["fastlora"] < kept["peft"]


def test_saved_storages_are_counted_once_and_parameters_not():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4, requires_grad=True)

    def forward(x):
        half = x * 1.0
        return (half[:2] @ weight).sin() + (half[2:4] @ weight)  # two views of `half`, and the argument of sin

    assert saved_bytes(Contender("", forward, (weight,)), x) == 8 * 4 * 4 + 2 * 4 * 4


def test_what_differs_from_eager_is_not_measured():
    case = forms.group_case("qkv", forms.Group(16, 8, (8, 8), 2, "float32", "float32"), CPU)
    builders = dict(case.builders)
    wrong = builders["eager"]()
    builders["group"] = lambda: Contender("", lambda x: tuple(2 * y for y in wrong.forward(x)), wrong.leaves)
    case.builders = builders
    found = turns.measure(case, ["frozen", "group", "eager"], CPU, CpuTimer(), 2, ROOF)
    assert list(found["results"]) == ["frozen", "eager"]
    assert found["unavailable"]["group"].startswith("failed: ArithmeticError")
    assert turns.failures({"cases": [found]})


def test_runs_end_to_end(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "suite.json"
    assert suite.main(["--device", "cpu", "--size", "tiny", "--dropout", "0", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["complete"]
    assert [case["facts"]["form"] for case in record["cases"]][:1] == ["group"]
    for case in record["cases"]:
        both = case["results"]["eager"]["both"]
        assert both["tflops"] == pytest.approx(both["flops"] / both["median"] / 1e12)
        assert both["over_frozen"] == both["median"] / case["results"]["frozen"]["both"]["median"]
        assert case["results"]["eager"]["saved_bytes"] > 0
    capsys.readouterr()
    assert suite.main(["--show", str(out)]) == 0
    assert "block of tiny" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    from bench.show import plot

    assert plot.main([str(out)]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_timed_is_left_out():
    class Timer(CpuTimer):
        def check(self, function):
            checked.append(function)
            if len(checked) == 2:
                raise RuntimeError("not while capturing")

    checked = []
    case = forms.group_case("qkv", forms.Group(16, 8, (8, 8), 2, "float32", "float32"), CPU)
    found = turns.measure(case, ["frozen", "group", "eager"], CPU, Timer(), 2, ROOF)
    assert list(found["results"]) == ["frozen", "eager"]
    assert found["unavailable"] == {"group": "failed: RuntimeError: not while capturing"}
    pytest.importorskip("peft")
    checked.clear()
    found = turns.measure(case, ["frozen", "peft"], CPU, Timer(), 2, ROOF)
    assert found["unavailable"] == {"peft": "cannot be timed: RuntimeError: not while capturing"}
    assert not turns.failures({"cases": [found]})  # a peer's limit is no failure of ours


def test_the_summary_has_a_line_for_each_case(tmp_path, capsys):
    case = forms.group_case("qkv", forms.Group(16, 8, (8, 8), 2, "float32", "float32"), CPU)
    found = turns.measure(case, ["frozen", "eager", "addmm"], CPU, CpuTimer(), 3, ROOF)
    found["results"]["frozen"]["both"]["median"] = 2e-3
    found["results"]["eager"]["both"]["median"] = 3e-3
    record = {"machine": {"cpu": "one", "fastlora_commit": "abc"}, "cases": [{"facts": case.facts, **found}]}
    (tmp_path / "suite.json").write_text(json.dumps(record))
    (tmp_path / "questions.json").write_text(json.dumps({"answers": {}}))
    assert summary.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "group qkv M=16, fp32 p=0.0: frozen 2.000 ms | eager +50.0%" in printed
    with pytest.raises(SystemExit):
        summary.main([str(tmp_path / "nothing")])


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_experts_agree(kinds):
    pytest.importorskip("peft")
    case = experts.experts_case(experts.Mixture(12, 4, 32, 16, 2), Problem(0, 0, 0, 4, *kinds), CPU)
    want = values_of(case, "eager")
    assert len(want) == 2 + 4 and all(value.abs().max() > 0 for value in want)
    for name in ("peft", "experts"):
        turns.check_close(values_of(case, name), want, 1e-5 if kinds[0] == "float32" else 2e-2)
