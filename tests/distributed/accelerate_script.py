"""The accelerate recipe of docs/distributed.md, for `torchrun`: writes the adapter and a checkpoint into argv[1], with
argv[2] "ddp" or "fsdp2". On a CPU accelerate takes a plugin for FSDP2 and trains with DDP: its state is set by hand, so
that its code for FSDP2 runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from two_processes import WORLD, adapters, assert_close, build, loss_of, optimizer_of, spied, whole_batch

import fastlora
from fastlora.introspect.sharding import is_sharded
from fastlora.ops import call

call.SMALL = 0
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
sharded = sys.argv[2] == "fsdp2"
if sharded:
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT"
    )
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
model, alone = build("plain"), build("plain")  # patch first, then prepare
optimizer = optimizer_of(model)
rows = [row for step in range(4) for row in whole_batch(step)]
loader = torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
assert accelerator.num_processes == WORLD and accelerator.is_fsdp2 == sharded
assert all(is_sharded(parameter) == sharded for parameter in model.parameters())
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
if accelerator.is_main_process or sharded:
    fastlora.save_adapter(accelerator.unwrap_model(model), folder / "adapter")
accelerator.save_state(str(folder / "state"))
accelerator.wait_for_everyone()  # the first process writes
moments = [state["momentum_buffer"].clone() for state in optimizer.optimizer.state.values()]
for changed in (False, True):  # trains the same step twice, the second time from the checkpoint
    if changed:
        accelerator.load_state(str(folder / "state"))
        assert_close(adapters(model), adapters(alone))
        assert_close([state["momentum_buffer"] for state in optimizer.optimizer.state.values()], moments)
    accelerator.backward(2 * loss_of(model, whole_batch(4).chunk(WORLD)[accelerator.process_index]))
    optimizer.step()
    optimizer.zero_grad()
loss_of(alone, whole_batch(4)).backward()
single.step()
assert_close(adapters(model), adapters(alone))
accelerator.end_training()
