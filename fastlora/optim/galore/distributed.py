"""Gradients of several processes as one, where only R and the thin blocks of a refresh travel: r·(n + m) numbers of a
weight at most, never n·m. `Averaged` is for whole gradients, one a process; `Sharded` for FSDP2's rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...introspect import sharding
from ...linalg.operators import LinearOperator, Rows, working_dtype


class Averaged:
    """The mean of the processes' G: all must multiply, by the same."""

    def __init__(self, op: LinearOperator, group: dist.ProcessGroup | None) -> None:
        self.op, self.group = op, group
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device

    def matmul(self, v: Tensor) -> Tensor:
        return self._mean(self.op.matmul(v))

    def rmatmul(self, u: Tensor) -> Tensor:
        return self._mean(self.op.rmatmul(u))

    def _mean(self, product: Tensor) -> Tensor:
        product = product.contiguous()
        average([product], self.group)
        return product


class Sharded:
    """G (n, m), of which every process has rows. Products are DTensors, split by their rows: those of G v need nothing
    of the other processes, those of Gᵀu are summed where they stay."""

    def __init__(self, gradient: Any) -> None:
        self.gradient, self.mesh, self.own = gradient, gradient.device_mesh, Rows(gradient.to_local())
        self.shape, self.dtype, self.device = tuple(gradient.shape), self.own.dtype, self.own.device

    def matmul(self, v: Tensor) -> Tensor:
        return sharding.of_parts(self.own.matmul(v), self.mesh, (self.shape[0], v.shape[1]))

    def rmatmul(self, u: Tensor) -> Tensor:
        part = self.own.rmatmul(sharding.local(sharding.spread(u, self.gradient)))
        total = sharding.of_parts(part, self.mesh, tuple(part.shape), None)
        return total.redistribute(placements=self.gradient.placements)


class Gathered(Sharded):
    """The same, with products that are whole in every process: for the thin blocks of a refresh."""

    def matmul(self, v: Tensor) -> Tensor:
        return sharding.whole(super().matmul(v))

    def rmatmul(self, u: Tensor) -> Tensor:
        return sharding.whole(super().rmatmul(u))


class Zero:
    """The gradient of a weight that this process did not use, while another did."""

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(weight.shape), working_dtype(weight.dtype), weight.device

    def matmul(self, v: Tensor) -> Tensor:
        return v.new_zeros(self.shape[0], v.shape[1])

    def rmatmul(self, u: Tensor) -> Tensor:
        return u.new_zeros(self.shape[1], u.shape[1])


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def warn_of_others(gradients: str) -> bool:
    """Warns where there are several processes, whose gradients nobody averages: DistributedDataParallel does not see
    them, and does not say so."""
    if processes() == 1:
        return False
    warnings.warn(
        f"fastlora: GaLoreAdamW with gradients={gradients!r} in {processes()} processes, without reduce_across_ranks: "
        "each trains on the gradients of its own data alone",
        UserWarning,
        stacklevel=5,
    )
    return True


def average(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """The mean over the processes, in place. Sums, because gloo has no mean."""
    tensors = list(tensors)
    work = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    for tensor, sent in zip(tensors, work):
        if sent is not None:
            sent.wait()
        tensor /= dist.get_world_size(group)


def used_somewhere(flags: list[bool], device: torch.device, group: dist.ProcessGroup | None) -> list[bool]:
    """For each weight, whether some process has a gradient of it."""
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(counts, group=group)
    return [count > 0 for count in counts.tolist()]


def from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Gives every process the first one's values."""
    first = 0 if group is None else dist.get_global_rank(group, 0)
    for tensor in tensors:
        dist.broadcast(tensor, src=first, group=group)


def leave_to_optimizer(model: nn.Module, weights: Mapping[Tensor, Any]) -> None:
    """Tells DistributedDataParallel, which is to wrap the model, to leave these weights alone: torch's own way, under
    every name that they have."""
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in weights:
                names |= {f"{name}.{key}", f"{name}.{key}".lstrip(".")}  # DDP calls the root's own ".weight"
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))
