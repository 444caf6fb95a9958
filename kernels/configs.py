"""Launch configurations as data, and the rule that chooses among them.

`capability` and `num_sms` are the only places in `kernels/` that ask what a device is; every launcher goes through them, so
a test (or someone with a new GPU) can stand in for a device by replacing these two. Nothing is probed at import.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# What CPU tensors under Triton's interpreter report: tiny tiles, host descriptors allowed, a few programs, so that each
# program walks over several tiles as it does on a GPU.
INTERPRETER = (0, 0)
INTERPRETER_SMS = 3


@functools.lru_cache(maxsize=None)
def _properties(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, INTERPRETER for a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    return _properties(torch.cuda.current_device() if device.index is None else device.index)[0]


def num_sms(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device, INTERPRETER_SMS for a CPU."""
    if device.type != "cuda":
        return INTERPRETER_SMS
    return _properties(torch.cuda.current_device() if device.index is None else device.index)[1]


def has_tma(target: tuple[int, int]) -> bool:
    """Whether host-side tensor descriptors are copied by hardware there (Hopper and later)."""
    return target >= (9, 0) or target == INTERPRETER


def shared_memory_limit(target: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may have (CUDA C++ programming guide, "Compute Capabilities")."""
    if target in ((8, 0), (8, 7)):
        return 166_912
    if target[0] in (9, 10):
        return 232_448
    return 101_376  # 8.6, 8.9, 12.x, and the safe guess for the unknown


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_at_least(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


# ---- the GEMMs with a rank-r step (gemm.py) ----


@dataclass(frozen=True)
class GemmConfig:
    """One way to launch the GEMM kernel.

    epilogue_split: the finished tile leaves in this many column slices, each with its own rank-r step, so that the second
    accumulator is a slice wide. max_rank_block: columns of S and B taken by one rank-r `tl.dot`.
    efficiency: the assumed fraction of the tensor-core rate at large K, relative to the best tile: used only to choose.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    epilogue_split: int = 1
    max_rank_block: int = 64
    group_m: int = 8
    efficiency: float = 1.0
