"""The counting model on values worked out by hand, the statistics, the contenders, and the runner from end to end,
tiny."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.harness import counting, runner, timing
from bench.harness.contenders import Tensors, Unavailable, build
from bench.harness.counting import H200, KERNELS, Problem, Roof, Step
from bench.layers import lora_linear

ROOT = Path(__file__).resolve().parents[2]

LLAMA = Problem(8192, 4096, 4096, 16)
UP = Problem(8192, 14336, 4096, 16)  # 4096 -> 14336
DOWN = Problem(8192, 4096, 14336, 16)
CPU = torch.device("cpu")


def test_a_steps_time_is_the_longer_of_the_two():
    roof = Roof(flops=100.0, bandwidth=10.0)
    assert Step("s", flops=400, bytes=30).time(roof) == 4.0
    assert Step("s", flops=400, bytes=50).time(roof) == 5.0
    assert Step("s", flops=400, bytes=30).bound(roof) == "compute"
    assert Step("s", flops=400, bytes=50).bound(roof) == "memory"


@pytest.mark.parametrize(
    "name, flops, nbytes",
    [  # M=4, N=6, K=10, r=2, bf16 x with fp32 adapters: x 80 B, y 48 B, W0 120 B, S 32 B, A 80 B, B 48 B, bias 12 B
        ("shrink", 2 * 4 * 2 * 10, 80 + 80 + 32),
        ("expand", 2 * 4 * 6 * 2, 32 + 48 + 12 + 48),
        ("expand_dx", 2 * 4 * 10 * 2, 32 + 80 + 80),
        ("grad_s_and_b", 2 * 2 * 4 * 6 * 2, 48 + 2 * 32 + 2 * 48),
        ("grad_a", 2 * 2 * 10 * 4, 32 + 80 + 80),
        ("gemm_forward", 2 * 4 * 6 * 12, 80 + 120 + 32 + 48 + 12 + 48),
        ("gemm_forward_s_inside", 2 * 4 * 6 * 12 + 2 * 4 * 10 * 2, 80 + 120 + 80 + 32 + 48 + 12 + 48),
        ("gemm_backward", 2 * 4 * 10 * 8, 48 + 120 + 32 + 80 + 80),
    ],
)
def test_kernels_by_hand(name, flops, nbytes):
    step = KERNELS[name](Problem(4, 6, 10, 2, "bfloat16", "float32", bias=True))
    assert (step.flops, step.bytes) == (flops, nbytes)


@pytest.mark.parametrize(
    "name, changes, expected",
    [  # percent over the floor at 4096², 4096 -> 14336, 14336 -> 4096: MN and MK below are one bf16 tensor's bytes
        ("eager", {}, (36, 26, 20)),  # 10 MN + 6 MK
        ("eager", {"dropout": 0.1}, (47, 30, 31)),  # 10 MN + 11 MK
        ("eager_autocast", {"adapter_dtype": "float32"}, (63, 34, 47)),  # 10 MN + 18 MK
        ("addmm", {}, (23, 14, 14)),  # 5 MN + 5 MK
        ("cublas", {}, (11, 6, 8)),  # 2 MN + 3 MK
        ("triton", {}, (7, 4, 5)),  # MN + 2 MK
    ],
)
def test_predicted_overheads_on_an_h200(name, changes, expected):
    for problem, percent in zip((LLAMA, UP, DOWN), expected, strict=True):
        changed = Problem(problem.m, problem.n, problem.k, problem.r, **changes)
        assert 100 * counting.overhead(name, changed, H200) == pytest.approx(percent, abs=0.6)


def test_a_slower_gemm_eats_the_fusions_gain():
    for problem, percent in zip((LLAMA, UP, DOWN), (15, 11, 13), strict=True):
        assert 100 * counting.overhead("triton", problem, H200, gemm_efficiency=0.93) == pytest.approx(percent, abs=0.6)
    assert counting.overhead("triton", LLAMA, H200, 0.93) > counting.overhead("cublas", LLAMA, H200, 0.93)


def test_summary_of_known_samples():
    summary = timing.Summary.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.median, summary.samples) == (3.0, 5)
    assert summary.p20 == pytest.approx(1.8)
    assert summary.p80 == pytest.approx(4.2)
    assert timing.Summary.of([4.0, 8.0], divide_by=2).median == 3.0
    with pytest.raises(ValueError, match="no samples"):
        timing.Summary.of([])


def test_the_cpu_timer_takes_turns():
    calls = []
    samples = timing.CpuTimer().interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    assert calls == ["a", "a", "b", "b"] + ["a", "b", "b", "a"] * 2


@pytest.mark.parametrize("kind", runner.DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_contenders_compute_the_same(kind, bias):
    """Output and all gradients: a benchmark of different functions compares nothing."""
    problem = Problem(24, 20, 28, 4, *runner.DTYPES[kind], bias=bias)
    tensors = Tensors.random(problem, CPU)
    ((x, dy),) = tensors.inputs(1, CPU)
    results = {}
    for name in ("eager", "peft", "addmm", "torch"):
        if name == "peft":
            pytest.importorskip("peft")
        contender = build(name, tensors)
        y = contender.forward(x)
        results[name] = (y.detach(), *contender.backward(y, x, dy))
    assert [value.dtype for value in results["torch"][2:]] == [getattr(torch, problem.adapter_dtype)] * 2
    for name, values in results.items():
        for got, want in zip(values, results["eager"], strict=True):
            error = (got.float() - want.float()).norm() / want.float().norm()
            assert error < (1e-5 if kind == "fp32" else 2e-2), name


def test_what_cannot_run_says_why():
    tensors = Tensors.random(Problem(8, 8, 8, 2, dropout=0.1), CPU)
    with pytest.raises(Unavailable, match="no dropout"):
        build("addmm", tensors)
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="CUDA"):
            build("cublas", tensors)


def test_runs_end_to_end_and_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--dtype", "fp32", "--rounds", "3", "--out", str(out)]
    assert lora_linear.main(arguments) == 0
    record = json.loads(out.read_text())
    assert record["complete"]
    assert record["machine"]["torch"] == torch.__version__
    assert [case["problem"]["dropout"] for case in record["cases"]] == [0.0, 0.1]
    entry = record["cases"][0]["results"]["torch"]
    both = entry["both"]
    assert both["p20"] <= both["median"] <= both["p80"]
    assert both["samples"] == 3
    frozen = record["cases"][0]["results"]["frozen"]["both"]["median"]
    assert both["over_frozen"] == pytest.approx(both["median"] / frozen)
    predicted = record["cases"][0]["results"]["addmm"]["both"]["predicted_over_frozen"]
    problem, roof = Problem(**record["cases"][0]["problem"]), Roof(**record["roofs"]["float32"])
    assert predicted == pytest.approx(1 + counting.overhead("addmm", problem, roof))
    assert entry["backward_median"] == pytest.approx(both["median"] - entry["forward"]["median"])
    printed = capsys.readouterr().out
    assert "over frozen" in printed
    assert lora_linear.main(["--show", str(out)]) == 0
    assert "M=64 32->48" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--shape", "12x34"], "want MxNxK"),
        (["--shape", "0x4x4"], "want MxNxK"),
        (["--r", "0"], "want at least 1"),
        (["--contenders", "eager,nobody"], "got nobody"),
    ],
)
def test_bad_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as error:
        lora_linear.main(["--device", "cpu", *arguments])
    assert error.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_script_refuses_what_it_cannot_do(tmp_path):
    script = ROOT / "bench" / "gpu.sh"

    def run(*arguments):
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            ["bash", script, *arguments], capture_output=True, text=True, env=environment, check=False
        )

    done = run("--fast")
    assert done.returncode == 2
    assert "want [--rehearse] [OUT]" in done.stderr
    done = run(str(tmp_path / "out"))
    assert done.returncode == 2
    assert "--rehearse" in done.stderr


def test_the_command_lists_and_refuses(capsys):
    command = runpy.run_path(str(ROOT / "bench/__main__.py"))
    assert command["main"]([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in command["CASES"])
    assert all(
        (ROOT / "bench" / f"{module.replace('.', '/')}.py").is_file() for module, *_ in command["CASES"].values()
    )
    assert command["main"](["lora_liner"]) == 2
    assert "got 'lora_liner', want one of lora_linear, " in capsys.readouterr().err
