"""Several processes, as torchrun starts them: who this one is, a model that is trained by all, checkpoints that any
number of them resumes. Imports torch only where there is something to do, so that --help is answered at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.files import write_atomically
from study.settings import FineTuning, Settings, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from study.learner import Learner
    from study.tasks.task import Task
    from study.training import Run

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
FIRST = RANK == 0  # the process that prints and writes
# What may differ between a run and the one that resumes it: its losses do not depend on it.
FREE = ("device", "shard", "accumulate", "out", "plot", "eval_every", "save_every", "resume")


@contextlib.contextmanager
def together(settings: Settings, device: torch.device) -> Iterator[None]:
    """The process group of a run with --shard, of one process too; raises UsageError where torchrun started several
    processes that would train apart.
    """
    if settings.shard == "none":
        if WORLD > 1:
            raise UsageError(f"--shard none: torchrun started {WORLD} processes, want ddp or fsdp2, or one process")
        yield
        return
    if settings.batch_size < WORLD * settings.accumulate:
        raise UsageError(
            f"--batch-size {settings.batch_size}: want an example at least for each of {WORLD} processes × "
            f"--accumulate {settings.accumulate}"
        )
    import torch.distributed as dist

    if dist.is_initialized():  # by a caller, for several runs
        yield
        return
    alone = {} if WORLD > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wrapped(model: nn.Module, settings: Settings, device: torch.device) -> nn.Module:
    """What a step calls: the model in DDP, or sharded in place, a piece per block that transformers does not split."""
    if settings.shard == "none" or (settings.shard == "ddp" and not any(p.requires_grad for p in model.parameters())):
        return model
    if settings.shard == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (WORLD,))
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # in PEFT's wrapper; generate() does not call that
    for module in inner.modules():
        if type(module).__name__ in (inner._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    return model


def own(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """This process's of `parts` pieces a process of nearly equal length."""
    cuts = [len(items) * i // (WORLD * parts) for i in range(WORLD * parts + 1)]
    mine = range(RANK * parts, (RANK + 1) * parts)
    return [items[cuts[i] : cuts[i + 1]] for i in mine]


@contextlib.contextmanager
def accumulating(model: Any, last: bool) -> Iterator[None]:
    """Within it backward passes send gradients only where they are the last of a step."""
    if hasattr(model, "no_sync") and not last:
        with model.no_sync():
            yield
        return
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(last, recurse=False)
    yield


def total(value: float) -> float:
    """The sum over all processes."""
    if WORLD == 1:
        return value
    import torch
    import torch.distributed as dist

    place = "cuda" if dist.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(value, dtype=torch.float64, device=place)
    dist.all_reduce(summed)
    return float(summed)


def save_checkpoint(folder: Path, done: int, runs: Sequence[Run], facts: Mapping[str, Any]) -> None:
    """Writes `folder`/`done`, every process its shards: under another name until it is whole. Then those before go."""
    import torch.distributed.checkpoint as dcp

    partial = folder / "partial"
    if FIRST:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    total(0.0)
    dcp.save({run.name: _state(run.learner) for run in runs}, checkpoint_id=partial, no_dist=WORLD == 1)
    if FIRST:
        history = {run.name: run.history for run in runs}
        write_atomically(partial / "history.json", json.dumps({"facts": facts, "runs": history}))
        before = [path for path in folder.iterdir() if path.name not in (partial.name, str(done))]
        shutil.rmtree(folder / str(done), ignore_errors=True)
        partial.rename(folder / str(done))
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
    total(0.0)


def checkpoint_of(settings: FineTuning, task: Task) -> tuple[dict[str, Any], Path | None]:
    """What a checkpoint of this run must agree on, and the newest one where --resume asks for it; raises UsageError
    where there is none, or one of a run with other losses.
    """
    settled = {name: value for name, value in asdict(settings).items() if name not in FREE}
    facts = json.loads(json.dumps({**settled, **task.facts}))
    if not settings.resume:
        return facts, None
    folder = settings.out / "checkpoint"
    found = max((path for path in folder.glob("*") if path.name.isdecimal()), key=lambda p: int(p.name), default=None)
    if found is None:
        raise UsageError(f"--resume: no checkpoint under {folder}; want a run that had --save-every, with this --out")
    theirs = json.loads((found / "history.json").read_text(encoding="utf-8"))["facts"]
    if different := [key for key in {**theirs, **facts} if theirs.get(key) != facts.get(key)]:
        details = ", ".join(f"{key} {theirs.get(key)!r}, not {facts.get(key)!r}" for key in different)
        raise UsageError(f"--resume: {found} is of a run with {details}")
    return facts, found


def load_checkpoint(path: Path, runs: Sequence[Run]) -> int:
    """Sets the runs to where they were, whatever number of processes wrote it; returns how many steps they had made."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    states = {run.name: _state(run.learner) for run in runs}
    dcp.load(states, checkpoint_id=path, no_dist=WORLD == 1)
    histories = json.loads((path / "history.json").read_text(encoding="utf-8"))["runs"]
    for run in runs:
        learner, state = run.learner, states[run.name]
        learner.model.load_state_dict(state["model"], strict=False)
        if learner.optimizers:
            set_optimizer_state_dict(learner.wrapped, learner.optimizers, state["optimizers"])
        run.history = histories[run.name]
        for scheduler in learner.schedulers:
            scheduler.last_epoch = len(run.losses)
    return int(path.name)


def _state(learner: Learner) -> dict[str, Any]:
    """What training has changed, each process's part of it; of LoRA-GA's start the frozen half too."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    module: Any
    for module in learner.model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # an evaluation leaves FSDP2's outermost parameters gathered, as copies
    trained = {name for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    model = {k: v for k, v in learner.model.state_dict().items() if k in trained or "lora_" in k}
    optimizers = get_optimizer_state_dict(learner.wrapped, learner.optimizers) if learner.optimizers else {}
    return {"model": model, "optimizers": optimizers}
