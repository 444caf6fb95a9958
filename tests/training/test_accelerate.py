"""accelerate's loop on patched models: gradient accumulation, mixed precision, its state saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from problems import through_the_function
from training_runs import adapters, assert_same_training, examples, trainable_model

the_function = pytest.fixture(autouse=True)(through_the_function)


def loop(model: Any, steps: range = range(6), folder: Path | None = None, **settings: Any) -> list[float]:
    """Micro-batches of two, an optimiser step every second. With a folder: a run from step 0 on saves its state
    there after four, one that begins later loads it first."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process, otherwise
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows: Any = examples("llama", 12)
    model, optimizer, loader = accelerator.prepare(
        model.train(), optimizer, torch.utils.data.DataLoader(rows, batch_size=2)
    )
    losses = []
    for step, batch in enumerate(loader):
        if step not in steps:
            continue
        if folder is not None and step == steps.start > 0:  # not earlier: to begin a loader draws from the generator
            accelerator.load_state(str(folder))
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if folder is not None and step == 3 and not steps.start:
            accelerator.save_state(str(folder))
    return losses


@pytest.mark.parametrize("way", ["PEFT patched", "patched"])
def test_gradient_accumulation(way):
    model, other = trainable_model("llama", way), trainable_model("llama", "PEFT")
    assert_same_training(loop(model), model, loop(other), other)


def test_mixed_precision():
    """bf16: at most twice as far from fp32's losses as PEFT's are."""
    exact = torch.tensor(loop(trainable_model("llama", "PEFT")))
    errors = []
    for way in ("patched", "PEFT"):
        model = trainable_model("llama", way)
        errors.append((torch.tensor(loop(model, mixed_precision="bf16")) - exact).norm().item())
        assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    assert 0 < errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("way", ["PEFT patched", "patched"])
def test_saving_and_loading_the_state(tmp_path, way):
    """Resumed in another model, which started elsewhere: the same bits, with dropout."""
    whole = trainable_model("llama", way, dropout=0.2)
    torch.manual_seed(3)
    losses = loop(whole, folder=tmp_path)
    resumed = trainable_model("llama", way, dropout=0.2, seed=99)
    assert loop(resumed, range(4, 6), tmp_path) == losses[4:]
    theirs = adapters(whole)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in adapters(resumed).items())
