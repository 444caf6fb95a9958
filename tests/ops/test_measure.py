"""Medians of interleaved runs, what is run, and what is left alone: with clocks that tell what a test wants."""

from __future__ import annotations

import types

import pytest
import torch
from pretended_gpu import backend_with

from fastlora.ops.lora import aten as lora_aten
from fastlora.ops.lora import measure
from fastlora.ops.lora.measure import Key

CPU = torch.device("cpu")
KEY = Key(16, 12, 20, 4, torch.float32, torch.float32, False)


@pytest.mark.parametrize(
    "M, bucket", [(0, 16), (1, 16), (16, 16), (17, 32), (5000, 8192), (8192, 8192), (8193, 16384), (10**6, 16384)]
)
def test_rows_are_rounded_up_to_powers_of_two(M, bucket):
    assert measure.bucket(M) == bucket


def test_a_key_reads_well_and_tells_calls_apart():
    assert str(KEY) == "M16 N12 K20 r4 float32+float32"
    other = Key(16, 12, 20, 4, torch.bfloat16, torch.float32, True, by_column=True, precision="tf32")
    assert str(other) == "M16 N12 K20 r4 bfloat16+float32 dropout by_column tf32"
    x, weight, a = torch.empty(9, 20), torch.empty(12, 20), torch.empty(4, 20)
    assert measure.key_of(x, weight, a, 0.0) == KEY
    assert measure.key_of(x, torch.empty(20, 12).t(), a, 0.5) == KEY._replace(dropout=True, by_column=True)


class ScriptedClock(measure.Clock):
    """Says in turn what it was given, per function; runs every function once, as a real one does."""

    def __init__(self, seconds: list[list[float]]) -> None:
        self.seconds = [list(values) for values in seconds]
        self.order: list[int] = []

    def timed(self, function):
        function()
        number, values = len(self.order), self.seconds.pop(0)
        self.order.append(-1)

        def run() -> float:
            self.order.append(number)
            return values.pop(0) if len(values) > 1 else values[0]

        return run


def test_times_are_medians_per_call_and_runs_take_turns():
    # Forward and backward of two candidates; the first run of each is thrown away, and one outlier does not count.
    clock = ScriptedClock([[90.0, 2.0, 2.0, 50.0, 2.0, 2.0], [8.0], [90.0, 4.0], [6.0]])
    found = measure.measure(KEY, {"cublas": backend_with(), "torch": lora_aten}, CPU, clock)
    assert found.forward == {"cublas": 1.0, "torch": 2.0}  # of 2 sets of inputs
    assert found.backward == {"cublas": 4.0, "torch": 3.0}
    forward_turns = [number for number in clock.order if number in (0, 2)]
    assert forward_turns == [0, 2, *[0, 2, 2, 0] * 2, 0, 2] and found.seconds > 0


def test_short_runs_are_repeated_more_often_within_the_limit():
    def rounds(seconds):
        runs = []
        measure.interleaved({"a": lambda: runs.append(1) or seconds})
        return len(runs) - 1

    assert rounds(1.0) == measure.FEWEST_ROUNDS
    assert rounds(1e-6) == measure.MOST_ROUNDS
    assert rounds(measure.LIMIT_S / 10.5) == 10
    assert measure.interleaved({}) == {}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_passes_on_the_wall_clock(dtype, dropout):
    before = torch.get_rng_state()
    key = Key(64, 32, 48, 4, dtype, torch.float32, False, by_column=dropout)
    found = measure.measure(key, {"torch": lora_aten}, CPU)
    assert 0 < found.forward["torch"] < 1 and 0 < found.backward["torch"] < 1 and found.left_out == {}
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_have_the_keys_sizes_dtypes_and_layout():
    key = Key(16, 12, 20, 4, torch.bfloat16, torch.float32, True, by_column=True)
    problem = measure.Problem.random(key, CPU)
    assert (problem.lora_A.shape, problem.lora_B.shape, problem.lora_A.dtype) == ((4, 20), (12, 4), torch.float32)
    assert len(problem.sets) == 2 and problem.seed is not None and problem.dropout_p == 0.1
    for x, dy, weight in problem.sets:
        assert (x.shape, dy.shape, weight.shape) == ((16, 20), (16, 12), (12, 20))
        assert weight.t().is_contiguous() and x.dtype == dy.dtype == weight.dtype == torch.bfloat16
    assert not torch.equal(problem.sets[0][0], problem.sets[1][0])


def test_what_differs_at_size_or_raises_is_left_out_and_the_rest_measured():
    def raises(*results):
        raise RuntimeError("no kernel image")

    modules = {
        "cublas": backend_with(forward=lambda y, s, state: (y * 1.5, s, state)),
        "triton": backend_with(backward=lambda grads, _: (grads[0], grads[1] * 1.5, grads[2])),
        "triton_s_inside": backend_with(forward=lambda y, s, state: (y, s * float("nan"), state)),
        "raising": backend_with(forward=raises),
        "torch": lora_aten,
    }
    found = measure.measure(KEY, modules, CPU)
    assert list(found.forward) == list(found.backward) == ["torch"]
    assert found.left_out["cublas"].startswith("output differs by 5.0e-01"), "the first candidate is none to go by"
    assert found.left_out["triton"].startswith("gradient of lora_A differs by 5.0e-01")
    assert found.left_out["triton_s_inside"].startswith("S differs by nan")
    assert found.left_out["raising"] == "RuntimeError: no kernel image"


def one_row(y, s, state):
    y[100] *= 1.5
    return y, s, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_row_of_many_is_seen(dtype):
    key = KEY._replace(M=1024, dtype=dtype, adapter_dtype=dtype)
    found = measure.measure(key, {"cublas": backend_with(forward=one_row), "torch": lora_aten}, CPU)
    assert list(found.forward) == ["torch"] and found.left_out["cublas"].startswith("output differs")


def test_with_dropout_all_are_compared_with_the_mask_of_the_seed():
    """Candidates that share a stale mask, as kernels that share code do, do not confirm each other."""
    right, stale = backend_with(), backend_with()
    stale.forward = lambda *args: right.forward(*args[:7], args[7] + 1, *args[8:])
    key = KEY._replace(M=64, dropout=True)
    found = measure.measure(key, {"cublas": stale, "triton": stale, "triton_s_inside": right}, CPU)
    assert list(found.forward) == ["triton_s_inside"]
    assert {why.split(" differs")[0] for why in found.left_out.values()} == {"output"}


def test_a_candidate_that_cannot_be_captured_is_left_out_and_the_hosts_time_kept_apart():
    class Clock(measure.WallClock):
        def timed(self, function):
            if len(seen) == 0:
                seen.append(function)
                raise measure.NotCapturable("cannot be captured in a CUDA graph: it synchronises")
            return super().timed(function)

        def host(self, function):
            return 8.0

    seen: list = []
    found = measure.measure(KEY, {"cublas": backend_with(), "torch": lora_aten}, CPU, Clock())
    assert list(found.forward) == ["torch"] and "it synchronises" in found.left_out["cublas"]
    assert found.host == {"forward": {"torch": 4.0}, "backward": {"torch": 4.0}}  # of 2 sets of inputs


def test_running_out_of_memory_ends_it():
    def raises(*results):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        measure.measure(KEY, {"cublas": backend_with(forward=raises)}, CPU)


def test_after_the_deadline_no_candidate_is_begun():
    found = measure.measure(KEY, {"cublas": lora_aten}, CPU, deadline=0.0)
    assert found.forward == {} and "no time left" in found.left_out["cublas"]


def test_short_memory_is_told_before_anything_is_allocated(monkeypatch):
    cuda: types.SimpleNamespace = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 30)
    measure._check_memory(1 << 30, cuda)  # type: ignore[arg-type]
    with pytest.raises(measure.ShortOfMemory, match=r"1\.5 GiB needed, 2\.0 GiB free"):
        measure._check_memory(3 << 29, cuda)  # type: ignore[arg-type]


@pytest.mark.parametrize("set_mib, sets", [(1000, 2), (64, 2), (50, 3), (1, 32)])
def test_what_rotates_is_larger_than_twice_the_l2(monkeypatch, set_mib, sets):
    cuda: types.SimpleNamespace = types.SimpleNamespace(type="cuda")
    properties = types.SimpleNamespace(L2_cache_size=40 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert measure._number_of_sets(set_mib * 2**20, cuda) == sets  # type: ignore[arg-type]


def test_inference_mode_autocast_and_gradients_do_not_matter():
    seen = []

    def spy(y, s, state):
        seen.append((y.requires_grad, y.is_inference(), y.dtype))
        return y, s, state

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        measure.measure(KEY, {"torch": backend_with(forward=spy)}, CPU)
    assert set(seen) == {(False, False, torch.float32)}
