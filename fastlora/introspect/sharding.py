"""Models whose parameters are spread over processes: how they are described, and how whole tensors go in and out.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) a parameter is a DTensor but for the time that its module runs. After
a forward the outermost module's may stay whole, as copies that the next step throws away: `reshard` lets go of them, so
that nothing is read from or written to a copy. Nothing of torch.distributed is imported here before a model brings it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BEFORE = "before the model is wrapped: the parameters that it adds or changes would not be the wrapper's"


def is_sharded(tensor: Any) -> bool:
    """True for a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def class_of(model: nn.Module) -> type:
    """A model's class; of one in FSDP2, whose class `fully_shard` changed, the one before."""
    fsdp, bases = sys.modules.get("torch.distributed.fsdp"), type(model).__bases__
    return bases[1] if fsdp is not None and bases[0] is fsdp.FSDPModule else type(model)


def has_shards(model: nn.Module) -> bool:
    """Whether some parameter is a DTensor, or is one while the model does not run."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        return True
    return any(is_sharded(parameter) for parameter in model.parameters())


def check_whole_activations(model: nn.Module, caller: str) -> None:
    """Raises ValueError for a model under tensor parallelism: its DTensors are not (or not only) FSDP2's."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = list(model.modules())
    cut = any(getattr(module, "tensor_parallel", None) is not None for module in modules)
    if cut or (has_shards(model) and not (fsdp and any(isinstance(module, fsdp.FSDPModule) for module in modules))):
        raise ValueError(
            f"{caller}: model: under tensor parallelism a layer sees parts of X and dY, want this before "
            "parallelize_module, in a model that is whole or under fully_shard"
        )


def wrapper(model: nn.Module) -> str | None:
    """By what the parameters in a model are managed, in words; None where nothing is found."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return "DistributedDataParallel"
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            return "FullyShardedDataParallel"
    return "sharded parameters (fully_shard, DTensor)" if has_shards(model) else None


def is_flat(model: nn.Module) -> str | None:
    """Why nothing can be read from a model whose parameters FSDP1 has flattened and spread; None where it can."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    for module in model.modules():
        state: Any = getattr(module, "training_state", None)
        if isinstance(module, fsdp.FullyShardedDataParallel) and state.name != "SUMMON_FULL_PARAMS":
            return (
                "FullyShardedDataParallel has its parameters in flat pieces; want this call in every process within "
                "FullyShardedDataParallel.summon_full_params(model), with a directory each, or fully_shard instead"
            )
    return None


def reshard(model: nn.Module) -> None:
    """Lets go of FSDP2's whole copies: every parameter is its own shard afterwards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()  # type: ignore[operator]


def whole(tensor: Any) -> Any:
    """A DTensor's whole value, to be asked for by all its processes; anything else as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Any) -> Any:
    """What this process has of a DTensor, in place; anything else as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def by_rows(tensor: Any) -> bool:
    """Whether a DTensor is split by its rows over the one dimension of its mesh, as `fully_shard` does."""
    shard = sys.modules["torch.distributed.tensor"].Shard
    return tuple(tensor.placements) == (shard(0),)


def of_parts(part: Tensor, mesh: Any, shape: tuple[int, ...], dim: int | None = 0) -> Any:
    """The DTensor of this shape that the processes' parts make along `dim`, or as a sum (None); nothing is sent."""
    tensors: Any = sys.modules["torch.distributed.tensor"]
    placement = tensors.Partial() if dim is None else tensors.Shard(dim)
    stride = torch.empty(shape, device="meta").stride()
    return tensors.DTensor.from_local(part, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, laid out as another one is; nothing is sent."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    parts: Any = like
    return distribute(tensor.to(like.device), parts.device_mesh, parts.placements, src_data_rank=None)


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, as a DTensor that can meet `like` in an operation."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    tensors: Any = sys.modules["torch.distributed.tensor"]
    mesh = like.device_mesh  # type: ignore[attr-defined]
    return tensors.DTensor.from_local(tensor, mesh, [tensors.Replicate()] * mesh.ndim, run_check=False)


def on_first_process(do: Callable[[], None]) -> None:
    """Runs it in the first of the processes, which all call this, and waits; what it raises is raised in all."""
    distributed = torch.distributed
    outcome: list[BaseException | None] = [None]
    if distributed.get_rank() == 0:
        try:
            do()
        except Exception as error:
            outcome = [error]
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
