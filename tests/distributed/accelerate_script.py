"""The accelerate recipe of docs/distributed.md, for `torchrun`: writes the adapter and a checkpoint into argv[1]."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from two_processes import WORLD, adapters, assert_close, build, loss_of, optimizer_of, spied, whole_batch

import fastlora
from fastlora.ops import call

call.SMALL = 0
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model, alone = build("plain"), build("plain")  # patch first, then prepare
optimizer = optimizer_of(model)
rows = [row for step in range(4) for row in whole_batch(step)]
loader = torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
assert accelerator.num_processes == WORLD
with spied() as seen:
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x))
            optimizer.step()
            optimizer.zero_grad()
assert seen == {"fused": {torch.float32}}
single = optimizer_of(alone)
for step in range(4):
    (loss_of(alone, whole_batch(step)) / 2).backward()
    if step % 2:
        single.step()
        single.zero_grad()
assert_close(adapters(model), adapters(alone))
folder = Path(sys.argv[1])
if accelerator.is_main_process:
    fastlora.save_adapter(accelerator.unwrap_model(model), folder / "adapter")
accelerator.save_state(str(folder / "state"))
accelerator.wait_for_everyone()  # the first process writes
accelerator.load_state(str(folder / "state"))
assert_close(adapters(model), adapters(alone))
accelerator.end_training()
