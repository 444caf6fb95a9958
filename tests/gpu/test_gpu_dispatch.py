"""The dispatcher on a GPU: it measures once, keeps the times, and what it chooses is right."""

from __future__ import annotations

import json

import pytest
import torch
from numerics import assert_close_to_fp64

from fastlora import tune
from fastlora.functional import lora_linear
from fastlora.ops import reference
from fastlora.ops.lora import choice as lora_choice
from fastlora.ops.lora import measure


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    for name in ("FASTLORA_BACKEND", "FASTLORA_MEASURE"):
        monkeypatch.delenv(name, raising=False)
    lora_choice.reset()
    yield
    lora_choice.reset()


def call(device, m=256, n=512, k=384, r=16, dropout_p=0.0) -> lora_choice.Call:
    def normal(*shape, scale=1.0):
        return torch.randn(shape, device=device).mul_(scale).bfloat16()

    torch.manual_seed(0)
    return lora_choice.Call(
        normal(m, k),
        normal(n, k, scale=k**-0.5),
        None,
        normal(r, k, scale=k**-0.5),
        normal(n, r, scale=0.25),
        dropout_p,
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_first_call_measures_every_candidate_and_the_second_does_not(
    device, tmp_path, dropout_p, monkeypatch, allocated
):
    given = call(device, dropout_p=dropout_p)
    before, held = torch.cuda.get_rng_state(), allocated()
    choice = lora_choice.select(*given)
    assert choice.reason.startswith("measured: "), choice.reason
    assert torch.equal(torch.cuda.get_rng_state(), before)
    (path,) = (tmp_path / "measured").glob("*.json")
    (entry,) = json.loads(path.read_text())["entries"].values()
    expected = {"cublas", "triton"} | ({"triton_s_inside", "torch"} if dropout_p == 0.0 else set())
    assert set(entry["forward"]) == set(entry["backward"]) == expected, entry
    assert allocated() - held < 1 << 20
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured again"))
    assert lora_choice.select(*given) is choice
    lora_choice.reset()
    assert lora_choice.select(*given).passes == choice.passes


def test_graphs_are_captured_and_tell_about_what_events_tell(device):
    a = torch.randn(4096, 4096, device=device).bfloat16()
    out = torch.empty_like(a)
    clock = measure.CudaClock(device)
    timed = measure.interleaved({"mm": clock.timed(lambda: torch.mm(a, a, out=out))})
    assert 20e-6 < timed["mm"] < 20e-3  # 137 GFLOP
    replay = clock._captured(lambda: torch.mm(a, a, out=out))
    assert replay.__name__ == "replay"


def test_what_is_chosen_is_right(device):
    x, weight, _, a, b, _ = call(device)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = lora_linear(leaves[0], weight, leaves[1], leaves[2], 2.0)
    dy = torch.randn_like(y)
    got = (y.detach(), *torch.autograd.grad(y, leaves, dy))
    results = []
    for double in (True, False):
        given = [(t.double() if double else t).clone().requires_grad_() for t in (x, a, b)]
        want = reference.lora_linear(given[0], weight.double() if double else weight, given[1], given[2], 2.0)
        results.append((want.detach(), *torch.autograd.grad(want, given, dy.double() if double else dy)))
    for what, value, exact, eager in zip(("y", "dx", "dA", "dB"), got, *results):
        assert_close_to_fp64(value, exact, eager, what)


def test_nothing_is_measured_during_capture(device):
    given = call(device)
    with lora_choice.measuring("off"):
        lora_choice.select(*given._replace(x=given.x[:16]))  # the self-checks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choice = lora_choice.select(*given)
    assert "capture" in choice.reason
    assert lora_choice.select(*given).reason.startswith("measured: ")


def test_tuning_ahead(device, capsys, tmp_path):
    asked = ["--shape", "384x512", "--tokens", "256", "--r", "16", "--adapter-dtype", "bf16"]
    assert tune.main([*asked, "--json", str(tmp_path / "copy.json")]) == 0, capsys.readouterr().out
    with lora_choice.measuring("off"):
        assert lora_choice.select(*call(device)).reason.startswith("measured: ")
