"""What is measured, when, and what is made of it: on a pretended GPU, by the real code on the CPU's clock."""

from __future__ import annotations

import json
import logging
import threading
import time
import types
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGpu, backend_with

from fastlora.ops.lora import choice as lora_choice
from fastlora.ops.lora import measure

SLOW_S = 0.004  # beside some 50 µs of a pass at these sizes: what sleeps loses on any machine


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("FASTLORA_BACKEND", "FASTLORA_MEASURE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(measure, "LIMIT_S", 0.0)  # FEWEST_ROUNDS


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return PretendedGpu(monkeypatch, tmp_path)


def slow(forward_s: float = 0.0, backward_s: float = 0.0) -> types.ModuleType:
    """A right backend that takes its time."""

    def forward(*results):
        time.sleep(forward_s)
        return results

    def backward(grads, _):
        time.sleep(backward_s)
        return grads

    return backend_with(forward if forward_s else None, backward if backward_s else None)


def cache_file(tmp_path):
    (path,) = (tmp_path / "measured").glob("*.json")
    return path


def test_each_direction_takes_the_fastest(gpu, tmp_path):
    cublas, triton = gpu.put("cublas", slow(forward_s=SLOW_S)), gpu.put("triton", slow(backward_s=SLOW_S))
    gpu.put("triton_s_inside", slow(SLOW_S, SLOW_S))
    gpu.put("torch", slow(SLOW_S, SLOW_S))
    choice = gpu.select()
    assert choice.name == "triton" and choice.passes == ("triton", "cublas")
    assert (choice.module.forward, choice.module.backward) == (triton.forward, cublas.backward)
    assert choice.reason.startswith("measured: forward triton ") and ", backward cublas " in choice.reason
    assert "cublas " in choice.reason and gpu.measured == [
        measure.Key(16, 6, 8, 3, torch.float32, torch.float32, False)
    ]
    entry = json.loads(cache_file(tmp_path).read_text())["entries"]["M16 N6 K8 r3 float32+float32"]
    assert entry["forward"]["cublas"] > SLOW_S > entry["forward"]["triton"] and entry["left_out"] == {}


def test_what_computes_the_pair_is_right(gpu):
    """The forward pass of one backend and the backward pass of another, through autograd."""
    from fastlora.ops.lora.autograd import LoraLinearFunction

    gpu.put("cublas", slow(forward_s=SLOW_S))
    gpu.put("triton", slow(backward_s=SLOW_S))
    module = gpu.select().module
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 8), (3, 8), (6, 3)))
    weight = torch.randn(6, 8, dtype=torch.float64)
    y = LoraLinearFunction.apply(x, weight, None, a, b, 2.0, 0.0, module, False)
    expected = x @ weight.t() + 2.0 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(expected)
    for got, want in zip(torch.autograd.grad(y, (x, a, b), dy), torch.autograd.grad(expected, (x, a, b), dy)):
        torch.testing.assert_close(got, want)


def test_one_kind_of_call_is_measured_once_in_a_process_and_never_again_after(gpu, caplog):
    gpu.put("cublas", backend_with())
    with caplog.at_level(logging.INFO, logger="fastlora"):
        first = gpu.select()
    assert "measured M16 N6 K8 r3 float32+float32 in " in caplog.text and " µs" in caplog.text
    assert gpu.select() is first and gpu.select(M=16).passes == first.passes and len(gpu.measured) == 1
    for number, how in enumerate(
        ({"M": 17}, {"N": 7}, {"K": 9}, {"r": 4}, {"dtype": torch.bfloat16}, {"dropout_p": 0.1}, {"by_column": True}), 2
    ):
        if how.get("dropout_p"):
            gpu.put("triton", backend_with())  # torch is no candidate there, and one alone is not measured
        gpu.select(**how)
        assert len(gpu.measured) == number, how
    lora_choice._choices.clear()  # as another process: what the file says is taken
    lora_choice.tuning_cache.for_device.cache_clear()
    again = gpu.select()
    assert again.passes == first.passes and again.reason.startswith("measured: ") and len(gpu.measured) == 8


@pytest.mark.parametrize(
    "times, winner",
    [
        ({"cublas": 1.0, "triton": 0.981}, "cublas"),
        ({"cublas": 1.0, "triton": 0.979}, "triton"),
        ({"cublas": 1.0, "triton": 0.9, "triton_s_inside": 0.89}, "triton_s_inside"),
        ({"cublas": 1.0, "torch": 0.5}, "torch"),
        ({"triton": 1.0, "torch": 0.99}, "triton"),  # without cublas the next is the baseline
        ({"torch": 1.0}, "torch"),
        ({}, None),
    ],
)
def test_only_what_is_two_percent_faster_than_cublas_replaces_it(times, winner):
    assert lora_choice.fastest(times) == winner


def test_with_dropout_the_passes_share_a_seed_so_torch_is_no_candidate(gpu):
    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    gpu.put("triton", slow(2 * SLOW_S, 2 * SLOW_S))
    choice = gpu.select(dropout_p=0.1)
    assert choice.passes == ("cublas", "cublas") and "torch" not in choice.reason
    assert gpu.select(dropout_p=0.0).passes == ("torch", "torch")


def test_a_wrong_backend_is_not_measured_and_one_that_is_wrong_at_size_is_left_out(gpu, tmp_path):
    def wrong_at_size(y, s, state):
        return (y if y.shape[0] == 203 else y.roll(1, 0)), s, state  # 203 rows: the self-check's

    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    gpu.put("triton", backend_with(forward=wrong_at_size))
    gpu.put("triton_s_inside", backend_with(forward=lambda y, s, state: (-y, s, state)))
    gpu.put("torch", slow(2 * SLOW_S, 2 * SLOW_S))
    with pytest.warns(RuntimeWarning, match="'triton_s_inside' failed its self-check"):
        choice = gpu.select()
    assert choice.passes == ("cublas", "cublas")
    left_out = json.loads(cache_file(tmp_path).read_text())["entries"]["M16 N6 K8 r3 float32+float32"]["left_out"]
    assert "output differs by 1." in left_out["triton"] and "at these sizes" in left_out["triton"]
    assert "differs from the reference" in left_out["triton_s_inside"]


def test_a_candidate_that_raises_is_left_out(gpu):
    def raises_at_size(y, s, state):
        assert y.shape[0] == 203, "no such kernel"
        return y, s, state

    gpu.put("cublas", backend_with())
    gpu.put("triton", backend_with(forward=raises_at_size))
    assert "triton" not in gpu.select().passes


def test_a_cached_winner_that_fails_its_check_now_is_passed_over(gpu):
    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    gpu.put("triton", backend_with())
    gpu.put("torch", slow(2 * SLOW_S, 2 * SLOW_S))
    assert gpu.select().passes == ("triton", "triton")
    for trusted in lora_choice._trusted.values():
        trusted.verdicts.clear()
    gpu.put("triton", backend_with(forward=lambda y, s, state: (-y, s, state)))
    with pytest.warns(RuntimeWarning, match="'triton' failed"):
        assert gpu.select().passes == ("cublas", "cublas")
    assert len(gpu.measured) == 1


@pytest.mark.parametrize("how", ["capture", "profiler", "mode", "compile"])
def test_nothing_is_measured_where_it_would_be_seen_and_a_later_call_is_asked_again(gpu, how, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    gpu.put("triton", backend_with())
    gpu.put("torch", slow(2 * SLOW_S, 2 * SLOW_S))
    gpu.select(M=999, dropout_p=0.5)  # cublas and triton are checked, for another kind of call
    with lora_choice.measuring("off"):
        assert gpu.select(M=100).name == "cublas"
    measured = len(gpu.measured)
    with monkeypatch.context() as patch:
        if how == "capture":
            gpu.capturing = True
            first, second = gpu.select(), gpu.select()
        elif how == "compile":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            first, second = gpu.select(), gpu.select()
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) if how == "profiler" else TorchDispatchMode():
                first, second = gpu.select(), gpu.select()
    assert len(gpu.measured) == measured and second is first
    assert first.name == "cublas" and ("while" in first.reason or "capture or compilation" in first.reason)
    gpu.capturing = False
    assert gpu.select().name == "triton" and len(gpu.measured) == measured + 1


def test_on_request_a_profiler_sees_it_and_a_capture_never_does(gpu, monkeypatch):
    gpu.put("cublas", backend_with())
    with lora_choice.measuring("always"):
        gpu.capturing = True
        gpu.select()
        assert gpu.measured == []
        gpu.capturing = False
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            gpu.select()
        assert len(gpu.measured) == 1
    monkeypatch.setenv("FASTLORA_MEASURE", "always")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    gpu.select(M=100)
    assert len(gpu.measured) == 2


@pytest.mark.parametrize("why", ["off", "distributed", "deterministic", "budget"])
def test_reasons_not_to_measure(gpu, monkeypatch, why):
    gpu.put("cublas", backend_with())
    if why == "off":
        monkeypatch.setenv("FASTLORA_MEASURE", "off")
    elif why == "distributed":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    elif why == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setattr(lora_choice, "_spent_s", lora_choice.BUDGET_S)
    choice = gpu.select()
    assert choice.name == "cublas" and gpu.measured == []
    assert choice.reason.startswith("default on a GPU: ") and why[:6] in choice.reason.replace("measured for", "budget")


def test_measured_times_are_used_where_measuring_is_off(gpu):
    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    gpu.put("triton", backend_with())
    gpu.put("torch", slow(2 * SLOW_S, 2 * SLOW_S))
    assert gpu.select().name == "triton"
    lora_choice._choices.clear()
    with lora_choice.measuring("off"):
        assert gpu.select().name == "triton"
    with pytest.raises(ValueError, match="mode: got 'no', want one of auto, off, always"), lora_choice.measuring("no"):
        pass


@pytest.mark.parametrize(
    "error, reason",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "measuring ran out of memory"),
        (measure.ShortOfMemory("memory is short: 2.0 GiB needed, 1.0 GiB free"), "memory is short"),
        (RuntimeError("device-side assert"), "measuring failed: RuntimeError: device-side assert"),
    ],
)
def test_a_measurement_that_fails_leaves_the_default_for_good(gpu, monkeypatch, error, reason):
    attempts = []

    def fails(*_, **__):
        attempts.append(1)
        raise error

    gpu.put("cublas", backend_with())
    monkeypatch.setattr(measure, "measure", fails)
    assert reason in gpu.select().reason and gpu.select().name == "cublas" and len(attempts) == 1
    biased = gpu.call()  # another look-up, the same kind of call: as a compiled graph's backward pass is
    assert reason in lora_choice.select(*biased._replace(bias=biased.weight)).reason and len(attempts) == 1


def test_requests_come_before_what_was_measured(gpu, monkeypatch):
    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    gpu.put("triton", backend_with())
    assert gpu.select("cublas")[::2] == ("cublas", "asked for") and gpu.measured == []
    monkeypatch.setenv("FASTLORA_BACKEND", "cublas")
    assert gpu.select()[::2] == ("cublas", "asked for") and gpu.measured == []


def test_threads_measure_one_kind_of_call_once(gpu):
    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    choices = []
    threads = [threading.Thread(target=lambda: choices.append(gpu.select())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(choices) == 4 and all(choice is choices[0] for choice in choices) and len(gpu.measured) == 1


def test_peeking_runs_nothing(gpu):
    gpu.put("cublas", slow(SLOW_S, SLOW_S))
    gpu.put("triton", backend_with())
    gpu.put("torch", slow(2 * SLOW_S, 2 * SLOW_S))
    before = lora_choice.peek(gpu.call())
    assert gpu.checks == 0 and gpu.measured == [] and lora_choice._choices == {}
    assert before.choice.name == "cublas" and before.entry is None and "the first call" in (before.not_measured or "")
    assert (
        before.candidates["triton"] == "not checked yet"
        and "cannot be imported" in before.candidates["triton_s_inside"]
    )
    gpu.select()
    after = lora_choice.peek(gpu.call())
    assert after.choice.passes == ("triton", "triton") and after.entry is not None
    assert after.candidates["triton"] == "passed its self-check" and after.candidates["torch"] == "needs no check"


def test_eager_calls_cost_the_hosts_time_where_it_is_longer_and_graphs_the_devices(gpu):
    """`costs` and the choices they make: launches of many kernels take the host longer than the device."""
    for name in ("cublas", "triton", "torch"):
        gpu.put(name, backend_with())
    device = {"cublas": 90e-6, "triton": 60e-6, "torch": 100e-6}
    host = {"cublas": 95e-6, "triton": 200e-6, "torch": 70e-6}
    entry = {"forward": device, "backward": device, "left_out": {}, "host": {"forward": host, "backward": host}}
    assert lora_choice.costs(entry, "forward", eager=True) == {"cublas": 95e-6, "triton": 200e-6, "torch": 100e-6}
    assert lora_choice.costs(entry, "forward", eager=False) == device
    call = gpu.call()
    key = lora_choice.measure.key_of(call.x, call.weight, call.lora_A, 0.0)
    lora_choice.tuning_cache.for_device(call.x.device).put(str(key), entry)
    assert gpu.select().passes == ("cublas", "cublas")
    gpu.capturing = True
    assert gpu.select().passes == ("triton", "triton")
    gpu.capturing = False
    assert gpu.select().passes == ("cublas", "cublas")


@pytest.mark.parametrize("pool, private", [((0, 0), False), ((0, 3), True)])
def test_nothing_is_measured_while_allocations_go_to_a_graphs_pool(monkeypatch, pool, private):
    device: Any = types.SimpleNamespace(type="cuda")
    probe = torch.empty(1)
    segments = [
        {"address": 0, "total_size": 1, "segment_pool_id": (0, 7)},
        {"address": probe.data_ptr() - 64, "total_size": 512, "segment_pool_id": pool},
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: probe)
    assert lora_choice._in_private_pool(device) == private
