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


# ---- the skinny kernels (shrink.py, expand.py, grads.py): one side of every product is the rank ----
#
# They are bound by memory, so the rules look for three things: enough blocks in flight (stages × programs), enough
# programs to fill the device (rows first, then parts of the long side, whose fp32 partials cost a second small launch),
# and no spills. r is padded to a power of two of at least 16, what `tl.dot` asks for.


@dataclass(frozen=True)
class ShrinkConfig:
    """out (M, r) = x Aᵀ: a program owns block_m × block_r of the result and one of num_splits parts of K."""

    block_m: int
    block_k: int
    block_r: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig:
    """out (M, N) = S Wᵀ: a program owns a tile of the result and walks over the rank in steps of block_r."""

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WeightGradConfig:
    """out (K, r) = xᵀ G: a program owns block_k × block_r of the result and one of num_chunks parts of the rows."""

    block_m: int
    block_k: int
    block_r: int
    num_chunks: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DsDbConfig:
    """dS and dB together: a program owns a strip of block_n columns of dY and one of num_chunks parts of its rows."""

    block_m: int
    block_n: int
    block_r: int
    num_chunks: int
    num_warps: int
    num_stages: int


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32: as torch would. Other dtypes have one way only.

    Triton's own default is tf32, ten bits of mantissa; torch's is IEEE fp32, which on a GPU means no tensor cores. "tf32"
    is taken where torch takes it: `torch.backends.cuda.matmul.fp32_precision`, which the older `allow_tf32` and
    `set_float32_matmul_precision` set too (reading those raises where the new name was used).
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _stages(stage_bytes: int, fixed_bytes: int, target: tuple[int, int]) -> int:
    """As many pipeline stages as let two programs share a multiprocessor, four at most, two at least.

    So that one loads while the other computes or finishes. 8 KiB stay free for what the compiler adds, mostly layout
    conversions.
    """
    half = shared_memory_limit(target) // 2 - 8192
    return max(2, min(4, (half - fixed_bytes) // stage_bytes))


def _parts(programs: int, blocks: int, wanted_programs: int) -> int:
    """In how many parts to cut a loop of `blocks` steps, so that `programs` programs become about `wanted_programs`.

    A part keeps at least four steps: shorter ones never fill the pipeline. The parts come out equal, and none is empty.
    """
    wanted = max(1, min(wanted_programs // programs, blocks // 4))
    return cdiv(blocks, cdiv(blocks, wanted))


def shrink(M: int, K: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device) -> ShrinkConfig:
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_k, block_r, num_warps = 16, 16, min(rank, 32), 4
    elif dtype == torch.float32:
        block_m, block_k, block_r, num_warps = 64, 32, min(rank, 32), 4
    elif rank <= 64:
        block_m, block_k, block_r, num_warps = 64, 128, rank, 4
    else:
        block_m, block_k, block_r, num_warps = 128, 64, 128, 8
    stage_bytes = block_k * (block_m * dtype.itemsize + block_r * adapter_dtype.itemsize)
    programs = cdiv(M, block_m) * cdiv(r, block_r)
    # One program per multiprocessor keeps 4.3 TB/s busy (33 KB in flight for each of 132, at 1 µs); more cost a reduction.
    num_splits = _parts(programs, cdiv(K, block_k), num_sms(device))
    return ShrinkConfig(block_m, block_k, block_r, num_splits, num_warps, _stages(stage_bytes, 0, target))


def expand(M: int, N: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device) -> ExpandConfig:
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_n, block_r = 16, 32, 16
    elif dtype == torch.float32:
        block_m, block_n, block_r = 64, 64, 16
    else:
        block_m, block_n, block_r = 64, 128, min(rank, 64)
    stage_bytes = block_r * (block_m * dtype.itemsize + block_n * adapter_dtype.itemsize)
    num_stages = 1 if rank <= block_r else min(3, _stages(stage_bytes, 0, target))
    return ExpandConfig(block_m, block_n, block_r, 4, num_stages)


def weight_grad(M: int, K: int, r: int, dtype: torch.dtype, device: torch.device) -> WeightGradConfig:
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_k, block_r, num_warps = 16, 32, min(rank, 32), 4
    elif dtype == torch.float32:
        block_m, block_k, block_r, num_warps = 32, 64, min(rank, 32), 4
    elif rank <= 64:
        block_m, block_k, block_r, num_warps = 64, 128, rank, 4
    else:
        block_m, block_k, block_r, num_warps = 64, 128, 128, 8
    stage_bytes = block_m * (block_k + block_r) * dtype.itemsize
    programs = cdiv(K, block_k) * cdiv(r, block_r)
    num_chunks = _parts(programs, cdiv(M, block_m), 2 * num_sms(device))
    return WeightGradConfig(block_m, block_k, block_r, num_chunks, num_warps, _stages(stage_bytes, 0, target))


def ds_db(
    M: int, N: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device
) -> DsDbConfig | None:
    """None where two passes over dY cost less than the partials of dS, which are written and read once per strip."""
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_n, num_warps = 16, 32, 4
    elif dtype == torch.float32:
        block_m, block_n, num_warps = 32, 32, 4
    else:
        block_m, block_n, num_warps = 64, 256, 4 if rank <= 16 else 8
    strips = cdiv(N, block_n)
    partials_bytes = 8 * r * strips if strips > 1 else 0
    if r > 48 or (partials_bytes > 0.8 * N * dtype.itemsize and target != INTERPRETER):
        return None
    stage_bytes = block_m * (block_n + rank) * dtype.itemsize
    num_chunks = _parts(strips, cdiv(M, block_m), 2 * num_sms(device))
    num_stages = _stages(stage_bytes, block_n * rank * dtype.itemsize, target)
    return DsDbConfig(block_m, block_n, rank, num_chunks, num_warps, num_stages)
