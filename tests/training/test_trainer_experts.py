"""transformers' Trainer on a mixture whose experts are adapted: checkpoints resume to the bit."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from mixtures import experts_in, mixture, tokens

import fastlora


def test_resuming_from_a_checkpoint(tmp_path):
    x = tokens(4)
    rows = [{"input_ids": row, "labels": row} for row in x]
    settings: dict[str, Any] = {"save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, **settings
    )
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        model = mixture("qwen3_moe")
        torch.manual_seed(0 if checkpoint is None else 1)  # another start, which the checkpoint's replaces
        fastlora.patch(model, r=2, target_modules=["o_proj"], target_parameters=experts_in(model), lora_dropout=0.1)
        begin = {name: p.detach().clone() for name, p in model.named_parameters()}
        transformers.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    moved = [name for name in begin if not torch.equal(begin[name], states[1][name])]
    assert moved and all("lora" in name for name in moved)
    assert all(torch.equal(states[0][name], states[1][name]) for name in begin)
