"""PeriodicReinit: when it re-initialises, from which gradients, what it leaves behind; two processes as one."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_state import ModelState
from started_nets import SKETCHED, R, optimizer_of, patched
from tiny_models import tiny_model
from torch import Tensor, nn

import fastlora
from fastlora import AlignmentMonitor, PeriodicReinit


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    target = torch.randn(5, 4, 3, generator=generator)
    return (model(torch.randn(5, 4, 6, generator=generator)) - target).square().mean()


def train(model: nn.Module, optimizer: Any, reinit: Any, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if reinit is not None:
            reinit.step()
        losses.append(loss.item())
    return losses


def test_every_so_many_steps():
    model = patched()
    optimizer, seen = optimizer_of(model), []
    with PeriodicReinit(model, optimizer, every=5, window=2, on_reinit=seen.append) as reinit:
        done = []
        for step in range(12):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            done.append(reinit.step() is not None)
    assert done == [step in (4, 9) for step in range(12)]
    assert seen == reinit.reports and [list(report.layers) for report in seen] == [SKETCHED, SKETCHED]
    assert reinit.skipped == {"head": "3×6 has fewer than 2r = 4 singular triplets"}
    assert "2 re-initialisations" in repr(reinit) and "12 steps" in repr(reinit)
    assert [line.frozen_rank for line in seen[1].layers.values()] == [4 * R] * 6


def test_until_then_training_is_not_disturbed_and_then_the_function_is_kept():
    """The losses are the same bits while gradients are sketched, and the next one has the same function."""
    model = patched()
    alone = copy.deepcopy(model)
    expected = train(alone, optimizer_of(alone), None, 4)
    optimizer = optimizer_of(model)
    with PeriodicReinit(model, optimizer, every=4, window=4) as reinit:
        assert train(model, optimizer, reinit, 4) == expected
        assert len(reinit.reports) == 1
        assert loss_of(model, 4).item() == pytest.approx(loss_of(alone, 4).item(), rel=1e-6)
    after = train(model, optimizer, None, 3, start=4)
    assert after[1:] != train(alone, optimizer_of(alone), None, 3, start=4)[1:]


def test_the_gradients_are_the_windows():
    """As a sketch of the same backward passes, at the parameters of the time; the discount is for earlier steps."""
    model = patched()
    by_hand, optimizer = copy.deepcopy(model), optimizer_of(model)
    its = optimizer_of(by_hand)
    with PeriodicReinit(model, optimizer, every=3, window=2, discount=0.5, smoothing=0.0) as reinit:
        train(model, optimizer, reinit, 3)
    train(by_hand, its, None, 1)
    sketch = fastlora.GradientSketch(
        by_hand, r=R, exclude_modules=["head"], weighting="equal", freeze=False, dropout=True, discount=0.5
    )
    with sketch:
        train(by_hand, its, None, 1, start=1)
        sketch.step()
        train(by_hand, its, None, 1, start=2)
    fastlora.reinit_lora_ga(by_hand, sketch, its, smoothing=0.0)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), by_hand.named_parameters()):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("threshold, expected", [(1.0, [2 + 2, 8 + 2]), (1e-6, [])])
def test_triggered_by_the_monitor(threshold, expected):
    """At the first record below the threshold a window of two steps begins; then not before the gap is over."""
    model = patched()
    optimizer, monitor = optimizer_of(model), AlignmentMonitor(model, every=2)
    done = []
    with PeriodicReinit(model, optimizer, monitor=monitor, threshold=threshold, min_gap=3, window=2) as reinit:
        assert monitor.active
        for step in range(12):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if reinit.step() is not None:
                done.append(step)
    assert not monitor.active
    assert [record.step for record in monitor.history] == [0, 2, 4, 6, 8, 10]
    assert done == expected
    if expected:  # the step after is measured on the new factors
        assert reinit.reports[0].layers.keys() == set(SKETCHED)


def test_close_and_exceptions_leave_no_hooks():
    model = patched()
    optimizer = optimizer_of(model)
    state = ModelState(model)
    with pytest.raises(ValueError, match="shape"), PeriodicReinit(model, optimizer, every=2, window=2):
        model(torch.randn(2, 5))
    state.assert_unchanged()
    reinit = PeriodicReinit(model, optimizer, every=2, window=2).start()
    with pytest.raises(RuntimeError, match="active already"):
        reinit.start()
    reinit.close()
    state.assert_unchanged()
    with pytest.raises(RuntimeError, match="not active"):
        reinit.step()


def test_a_failure_leaves_model_and_optimiser_and_the_next_window_comes(monkeypatch):
    model = patched()
    optimizer = optimizer_of(model)
    original = fastlora.FusedLoraLinear.set_frozen_factors
    with PeriodicReinit(model, optimizer, every=2, window=1) as reinit:
        train(model, optimizer, reinit, 1)
        loss_of(model, 1).backward()
        optimizer.step()
        before, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
        monkeypatch.setattr(fastlora.FusedLoraLinear, "set_frozen_factors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reinit.step()
        monkeypatch.setattr(fastlora.FusedLoraLinear, "set_frozen_factors", original)
        assert list(before) == list(model.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(now[i][key], moments[i][key]) for i in moments for key in moments[i])
        train(model, optimizer, reinit, 2, start=2)
    assert len(reinit.reports) == 1


def test_windows_without_a_finite_gradient():
    model = patched()
    state = ModelState(model)
    with PeriodicReinit(model, None, every=1, window=1) as reinit:
        (loss_of(model, 0) * float("nan")).backward()
        model.zero_grad()
        with pytest.warns(UserWarning, match="no layer had a finite gradient"):
            assert reinit.step() is None
    state.assert_unchanged()


def test_resuming():
    """Model, optimiser and the counts: the run goes on as if it had not been interrupted."""
    model = patched()
    optimizer = optimizer_of(model)
    monitor = AlignmentMonitor(model, every=3)
    options: dict[str, Any] = {"every": 4, "window": 2, "min_gap": 100, "threshold": 0.01}
    reinit = PeriodicReinit(model, optimizer, monitor=monitor, **options).start()
    train(model, optimizer, reinit, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), reinit.state_dict()))
    assert saved[2] == {"steps": 5, "since": 1, "monitor_steps": 5}
    expected = train(model, optimizer, reinit, 5, start=5)
    resumed = patched()  # without the frozen part that the first re-initialisation has made
    its = optimizer_of(resumed)
    again = PeriodicReinit(resumed, its, monitor=AlignmentMonitor(resumed, every=3), **options)
    resumed.load_state_dict(saved[0])
    its.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    with again:
        assert train(resumed, its, again, 5, start=5) == expected
    assert len(again.reports) == 1
    with pytest.raises(RuntimeError, match="load before"):
        reinit.load_state_dict(saved[2])
    reinit.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "every: got None and no monitor"),
        ({"every": 4}, "every: got 4, want at least the window's 8 steps"),
        ({"every": 0}, "every: got 0"),
        ({"every": 9, "window": 0}, "window: got 0"),
        ({"every": 9, "threshold": 0.5}, "got one without the other"),
        ({"every": 9, "smoothing": -1}, "PeriodicReinit: smoothing: got -1"),
        ({"every": 9, "adapter_name": "other"}, "has an adapter 'other'"),
        ({"every": 9, "optimizer": "adam"}, "optimizer: got str"),
        ({"every": 9, "model": "model"}, "model: got str"),
    ],
)
def test_wrong_arguments(options, message):
    model = patched()
    with pytest.raises(ValueError, match=message):
        PeriodicReinit(options.pop("model", model), options.pop("optimizer", optimizer_of(model)), **options)
    monitor = AlignmentMonitor(model)
    with pytest.raises(ValueError, match=r"threshold: got 2, want a number in \(0, 1\]"):
        PeriodicReinit(model, None, monitor=monitor, threshold=2)


# Two processes.


def process(rank: int, folder: str) -> None:
    """One of two processes, each with a batch of its own, whose gradients are averaged by hand."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(run([rank]), f"{folder}/{rank}")
    dist.destroy_process_group()


def run(ranks: list[int]) -> Any:
    model = tiny_model("llama")
    torch.manual_seed(0)
    fastlora.patch(model, r=R, init_lora_weights=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
    monitor = AlignmentMonitor(model, every=1, probes=64)
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(3, 61, (3, 2, 2, 7), generator=generator)  # steps, ranks
    options: dict[str, Any] = {"every": 2, "window": 2, "monitor": monitor, "threshold": 1e-6}
    with PeriodicReinit(model, optimizer, **options) as reinit:
        for step in range(3):
            for rank in ranks:
                (model(input_ids=data[step, rank], labels=data[step, rank]).loss / len(ranks)).backward()
            for parameter in model.parameters():
                if parameter.grad is not None and len(ranks) == 1:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= 2
            optimizer.step()
            optimizer.zero_grad()
            reinit.step()
    assert len(reinit.reports) == 1
    return [record.overall for record in monitor.history], model.state_dict()


def test_two_processes_are_as_one():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, args=(folder,), nprocs=2)
        (alignments, first), (other, second) = (torch.load(Path(folder) / str(rank)) for rank in range(2))
    assert alignments == other
    assert all(torch.equal(first[key], second[key]) for key in first)
    expected, alone = run([0, 1])
    assert alignments == pytest.approx(expected, rel=1e-3)
    for key, value in alone.items():
        if "lora_A.default" in key:  # its rows' span; the merged sketch is as good as one, not the same bits
            q, its = (torch.linalg.qr(rows.double().t())[0] for rows in (value, first[key]))
            assert torch.linalg.svdvals(q.t() @ its).min() > 0.9
