"""What the processes of a run share, wherever its tensors are: NCCL's travel by the GPU, others' by the host."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def running() -> bool:
    """Whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def _home() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def add(*tensors: Tensor) -> None:
    """Sums each over the processes, in place."""
    for tensor in tensors:
        moved = tensor.to(_home())
        dist.all_reduce(moved)
        tensor.copy_(moved)


def added(*numbers: float) -> list:
    """The sums over the processes."""
    sums = torch.tensor(numbers, dtype=torch.float64 if isinstance(numbers[0], float) else None)
    add(sums)
    return sums.tolist()


def gathered(tensor: Tensor) -> list[Tensor]:
    """Every process's, in the order of ranks."""
    moved = tensor.to(_home())
    parts = [torch.empty_like(moved) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, moved)
    return parts


def copy_first(*tensors: Tensor) -> None:
    """Gives every process the first one's, in place."""
    for tensor in tensors:
        moved = tensor.to(_home()).contiguous()
        dist.broadcast(moved, src=0)
        tensor.copy_(moved)
