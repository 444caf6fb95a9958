"""Launch configurations as data, and the rule that chooses among them.

`capability` and `num_sms` are the only places in `kernels/` that ask what a device is; every launcher goes through
them, so a test (or someone with a new GPU) can stand in for a device by replacing these two. Nothing is probed at
import.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

# What CPU tensors under Triton's interpreter report: tiny tiles, host descriptors allowed, a few programs, so that each
# program walks over several tiles as it does on a GPU.
INTERPRETER = (0, 0)
INTERPRETER_SMS = 3


@functools.cache
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
    """Whether the GEMMs use host-side tensor descriptors there: Hopper and data-centre Blackwell copy them by hardware.

    So does sm_12x, which takes the generic rule: with 99 KiB of shared memory and no wgmma its kernels are Ampere's.
    """
    return target[0] in (9, 10) or target == INTERPRETER


def shared_memory_limit(target: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may have (CUDA C++ programming guide, "Compute Capabilities")."""
    if target in ((8, 0), (8, 7)):
        return 166_912
    if target[0] in (9, 10):
        return 232_448
    return 101_376  # 8.6, 8.9, 12.x, and the safe guess for the unknown


def vectorised(*matrices: torch.Tensor) -> bool:
    """Whether a thread can read 16 bytes of a row at a time; else single elements wait in registers, and less fits."""
    return all(matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 for matrix in matrices)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_at_least(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


# ---- the GEMMs with a rank-r step (gemm.py) ----
#
# Every number here comes from compiled code (docs/kernels/gemm.md has the table) or from a source that is named; none
# from a run.


@dataclass(frozen=True)
class GemmConfig:
    """One way to launch the GEMM kernel. In the tables below, num_stages and block_r are upper bounds.

    epilogue_split: the finished tile leaves in this many slices of columns, each with its own rank-r step, so that the
    second accumulator is a slice wide. block_r: columns of S and B taken by one rank-r `tl.dot`; a larger rank loops.
    programs_per_sm: how many programs a multiprocessor can hold; the grid is that many times the multiprocessors.
    efficiency: the tensor cores' rate that the tile is expected to reach at large K, as a share of the best tile's.
    s_inside, rank_loop: whether it may be used with S computed inside, with a rank beyond block_r.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 4
    epilogue_split: int = 1
    block_r: int = 64
    group_m: int = 8
    programs_per_sm: int = 1
    efficiency: float = 1.0
    s_inside: bool = True
    rank_loop: bool = True


# The efficiencies follow the operands that a tile reads for its FLOPs, (1/block_m + 1/block_n): a quarter more of them
# for each halving. Only their order matters where tiles are plenty; they were not measured.
_HOPPER = (
    # One program of 8 warps holds 128×256 fp32 in 128 registers a thread. In 2 slices the rank-r accumulator takes 64
    # more and dX with dropout spills (42 stores); in 4 slices nothing does, and a fourth stage fits next to the output
    # slice at r <= 16.
    GemmConfig(128, 256, 64, 8, epilogue_split=4),
    GemmConfig(128, 128, 64, 8, epilogue_split=2, efficiency=0.85),  # with 4 warps dX with dropout spills
    GemmConfig(64, 128, 64, 4, epilogue_split=2, efficiency=0.7),
    GemmConfig(64, 64, 64, 4, efficiency=0.55),
)
# The accumulators live in 512 columns of tensor memory. The slices' rank-r accumulators take block_n columns more,
# which at 256 fills it exactly: with S inside, which needs r columns besides, ptxas gets a kernel that traps. Hence
# block_n <= 128 there.
_BLACKWELL = (
    GemmConfig(128, 256, 64, 8, epilogue_split=4, block_r=32, s_inside=False),  # r = 64 spills
    GemmConfig(128, 128, 64, 8, epilogue_split=2, block_r=32, efficiency=0.85),
    GemmConfig(128, 64, 64, 8, block_r=32, efficiency=0.7),
)
# At most 66 KiB of shared memory, so that these also fit the 99 KiB of sm_86, sm_89 and sm_120, and of the unknown.
_AMPERE = (
    # With 4 warps, the better shape for mma.m16n8k16, the two accumulators fill 255 registers and most variants spill
    # a few.
    GemmConfig(128, 128, 32, 8, block_r=32),
    GemmConfig(64, 64, 32, 4, block_r=32, programs_per_sm=2, efficiency=0.6),
)
# Operands that no 16-byte copy can fetch go through registers, element by element: larger tiles spill.
_UNALIGNED = (GemmConfig(64, 64, 32, 4, num_stages=2, block_r=16, programs_per_sm=2),)
# fp32 through pointers everywhere: with descriptors the FMA kernels spill on sm_90 (86 stores at 64×64×32).
_FP32_IEEE = (
    # In one slice dX with dropout spills on sm_100 with Triton 3.6; with the loop over the rank, on sm_90.
    GemmConfig(128, 64, 32, 8, num_stages=3, epilogue_split=2, block_r=16, rank_loop=False),
    GemmConfig(64, 64, 16, 4, num_stages=3, block_r=16, programs_per_sm=2, efficiency=0.8),
)
_FP32_TF32 = (
    # In two slices dX with dropout spills on sm_80 with Triton 3.9.
    GemmConfig(128, 128, 32, 8, num_stages=3, epilogue_split=4, block_r=16),
    GemmConfig(64, 64, 32, 4, num_stages=3, block_r=16, programs_per_sm=2, efficiency=0.7),
)
_INTERPRETED = (GemmConfig(32, 64, 32, 4, num_stages=2, epilogue_split=2, block_r=16),)


def _gemm_table(dtype: torch.dtype, precision: str, target: tuple[int, int], aligned: bool) -> tuple[GemmConfig, ...]:
    if target == INTERPRETER:
        return _INTERPRETED
    if dtype == torch.float32:
        return _FP32_TF32 if precision == "tf32" else _FP32_IEEE
    if not aligned:
        return _UNALIGNED
    return {9: _HOPPER, 10: _BLACKWELL}.get(target[0], _AMPERE)


def _gemm_stage_count(config: GemmConfig, itemsize: int, compute_s: bool, target: tuple[int, int]) -> int:
    """The most stages, up to the config's own number, whose shared memory fits.

    A stage holds a tile of x, one of the weight, and one of A where S is computed inside; next to the stages lie one
    tile of S and of B each, and with descriptors a slice of the output. The compiler reports at most 48 bytes more
    than this.
    """
    stage = (config.block_m + config.block_n + (config.block_r if compute_s else 0)) * config.block_k * itemsize
    low_rank = ((0 if compute_s else config.block_m) + config.block_n) * config.block_r * itemsize
    output_slice = config.block_m * config.block_n // config.epilogue_split * itemsize if has_tma(target) else 0
    free = shared_memory_limit(target) // config.programs_per_sm - low_rank - output_slice - 256
    return max(1, min(config.num_stages, free // stage))


def gemm(
    M: int,
    N: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    aligned: bool = True,
    compute_s: bool = False,
    wide_adapters: bool = False,
) -> GemmConfig:
    """The configuration for out (M, N) with a rank-r step.

    aligned: x, the weight and out can be moved 16 bytes at a time. compute_s: S is computed inside. wide_adapters: A
    and B are of a wider dtype than x and are cast in registers. Takes the tile
    with the least predicted time: waves of programs over the multiprocessors × a tile's area ÷ its efficiency. So few
    or small tiles win where large ones would leave multiprocessors idle or compute mostly padding.
    """
    rank = max(16, power_of_two_at_least(r))
    table = _gemm_table(dtype, input_precision(dtype), capability(device), aligned)
    config = _best_gemm(M, N, rank, dtype.itemsize, compute_s, table, capability(device), num_sms(device))
    if wide_adapters and not compute_s and config.block_r > 16:
        # S and B in two parts each: 32 columns spill where dX is masked (62 on sm_80, 24 at 128×256 on sm_90).
        config = replace(config, block_r=16)
    return config


@functools.lru_cache(maxsize=4096)  # the choice takes 35 µs, and every call of every layer asks
def _best_gemm(
    M: int,
    N: int,
    rank: int,
    itemsize: int,
    compute_s: bool,
    table: tuple[GemmConfig, ...],
    target: tuple[int, int],
    sms: int,
) -> GemmConfig:
    def time(config: GemmConfig) -> float:
        tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
        waves = cdiv(tiles, sms * config.programs_per_sm) * config.programs_per_sm
        return waves * config.block_m * config.block_n / config.efficiency

    def allowed(config: GemmConfig) -> bool:
        return (config.s_inside or not compute_s) and (config.rank_loop or rank <= config.block_r)

    row = min(filter(allowed, table), key=time)
    config = replace(row, block_r=rank if compute_s else min(rank, row.block_r))
    return replace(config, num_stages=_gemm_stage_count(config, itemsize, compute_s, target))


MAX_RANK_INSIDE = 32  # 64 spills on sm_80


def s_inside(N: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout_p: float) -> bool:
    """Whether the forward GEMM should compute S itself instead of having it computed by a pass of its own over x.

    Inside, S costs 2·M·K·r FLOPs more for every column of tiles, ceil(N/256) times; outside, 2·M·K bytes at memory
    speed. On an H200 (790 TFLOP/s, 4.3 TB/s) they break even at r·ceil(N/256) = 184 if a narrow wgmma ran at full
    rate. It does not (64×16 needs 16 cycles to read its 64×16 of x for 8 cycles of work, and A arrives by 16-byte
    copies), so half of that is the bound. With dropout every column of tiles would make the mask again; adapters of
    another dtype would be cast again.
    """
    rank = max(16, power_of_two_at_least(r))
    same = adapter_dtype == dtype and dtype != torch.float32
    return same and dropout_p == 0.0 and rank <= MAX_RANK_INSIDE and rank * cdiv(N, 256) <= 92


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


def _wide(dtype: torch.dtype, adapter_dtype: torch.dtype) -> bool:
    """Whether an adapter may be split into parts (`tiling.dot`), for which its blocks need room."""
    return adapter_dtype.itemsize > dtype.itemsize


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32: as torch would. Other dtypes have one way only.

    Triton's own default is tf32, ten bits of mantissa; torch's is IEEE fp32, which on a GPU means no tensor cores.
    "tf32" is taken where torch takes it: `torch.backends.cuda.matmul.fp32_precision`, which the older `allow_tf32` and
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
    wanted = max(1, min(wanted_programs // max(1, programs), blocks // 4))
    return cdiv(blocks, cdiv(blocks, wanted)) if blocks else 1


def shrink(
    M: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
    vectorised: bool = True,
) -> ShrinkConfig:
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_k, block_r, num_warps = 16, 16, min(rank, 32), 4
    elif dtype == torch.float32:
        block_m, block_k, block_r, num_warps = 64, 16, min(rank, 32), 4  # a FMA `tl.dot` keeps block_k numbers per row
    elif rank <= 64:
        # Wider blocks would spill: with dropout at r = 64, and where x is read element by element.
        block_k = 32 if not vectorised else 128 if rank <= 32 else 64
        block_m, block_r, num_warps = 64, rank, 4
    else:
        block_m, block_k, block_r, num_warps = 128, 64, 128, 8
    if _wide(dtype, adapter_dtype) and rank >= 32 and target != INTERPRETER:
        # The two parts of A: with 64 columns sm_100 spills 6 at r = 64, sm_80 11 to 2419.
        block_k = min(block_k, 64 if rank == 32 else 32)
        block_r = min(block_r, 32 if not vectorised else 64 if target < (9, 0) else 128)
    stage_bytes = block_k * (block_m * dtype.itemsize + block_r * adapter_dtype.itemsize)
    programs = cdiv(M, block_m) * cdiv(r, block_r)
    # One program per multiprocessor keeps 4.3 TB/s busy (33 KB in flight for each of 132, at 1 µs); more cost a
    # reduction.
    num_splits = _parts(programs, cdiv(K, block_k), num_sms(device))
    # Reads of single elements wait in registers and not in shared memory: more stages would spill.
    num_stages = _stages(stage_bytes, 0, target) if vectorised else 2
    return ShrinkConfig(block_m, block_k, block_r, num_splits, num_warps, num_stages)


def expand(
    M: int, N: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device
) -> ExpandConfig:
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_n, block_r, num_warps = 16, 32, 16, 4
    elif dtype == torch.float32:
        block_m, block_n, block_r, num_warps = 32, 64, 16, 4
    else:
        # Steps of 64 above r = 64 would take 254 registers on sm_80.
        block_m, block_n, block_r, num_warps = 64, 128, rank if rank <= 64 else 32, 4
        if _wide(dtype, adapter_dtype):  # both operands in two parts: 64 ranks at once spill 227, 32 still 3 on sm_80
            block_r = min(rank, 16 if target < (9, 0) else 32)
    stage_bytes = block_r * (block_m * dtype.itemsize + block_n * adapter_dtype.itemsize)
    num_stages = 1 if rank <= block_r else min(3, _stages(stage_bytes, 0, target))
    return ExpandConfig(block_m, block_n, block_r, num_warps, num_stages)


def weight_grad(
    M: int, K: int, r: int, dtype: torch.dtype, device: torch.device, wide: bool = False
) -> WeightGradConfig:
    """wide: G is in fp32 and x in half precision."""
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_k, block_r, num_warps = 16, 32, min(rank, 32), 4
    elif dtype == torch.float32:
        block_m, block_k, block_r, num_warps = 32, 64, min(rank, 32), 4
    elif rank <= 64:
        # With 4 warps r = 64 spills 4 on sm_80 with dropout, and 6 on sm_100 where x is read element by element.
        block_m, block_k, block_r, num_warps = 64, 128, rank, 8 if rank == 64 and target[0] != 9 else 4
    else:
        block_m, block_k, block_r, num_warps = 64, 128, 128, 8
    if wide and target != INTERPRETER:
        # The two parts of G: with 64 rows sm_80 spills 38 to 2561 from r = 64 on; with 4 warps sm_100 8 under a mask.
        block_m, num_warps = 32 if rank >= 64 else 64, 8
        block_r = min(block_r, 64 if target < (9, 0) else 128)
    stage_bytes = block_m * (block_k * dtype.itemsize + block_r * (4 if wide else dtype.itemsize))
    programs = cdiv(K, block_k) * cdiv(r, block_r)
    num_chunks = _parts(programs, cdiv(M, block_m), 2 * num_sms(device))
    return WeightGradConfig(block_m, block_k, block_r, num_chunks, num_warps, _stages(stage_bytes, 0, target))


def ds_db(
    M: int,
    N: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device,
    vectorised: bool = True,
) -> DsDbConfig | None:
    """None where two passes over dY cost less than the partials of dS, which are written and read once per strip."""
    target, rank = capability(device), max(16, power_of_two_at_least(r))
    if target == INTERPRETER:
        block_m, block_n, num_warps = 16, 32, 4
    elif dtype == torch.float32:
        block_m, block_n, num_warps = 32, 32, 4
    else:
        block_m, block_n, num_warps = 64, 256, 8
    strips = cdiv(N, block_n)
    partials_bytes = 8 * r * strips if strips > 1 else 0
    most = 48 if dtype.itemsize == 2 or target == INTERPRETER else 16  # fp32 spills beyond (21 to 47 stores and loads)
    if _wide(dtype, adapter_dtype) and target != INTERPRETER:
        most = 32 if vectorised else 0  # 51 spill on sm_90 at r = 48, element by element 38 at 8
    if r > most or (partials_bytes > 0.8 * N * dtype.itemsize and target != INTERPRETER):
        return None
    # One program a multiprocessor with all of its shared memory: dS leaves at every step, and with two stages the next
    # copy would be asked for after the products and waited for at once.
    wide = _wide(dtype, adapter_dtype)
    stage_bytes = block_m * (block_n * dtype.itemsize + rank * (4 if wide else dtype.itemsize))
    # The parts of B and S, as compiled for sm_100 (69,680 bytes at r = 32).
    fixed_bytes = block_n * rank * 8 + 4096 if wide else block_n * rank * dtype.itemsize + 16384
    num_stages = max(2, min(4, (shared_memory_limit(target) - fixed_bytes) // stage_bytes))
    num_chunks = _parts(strips, cdiv(M, block_m), num_sms(device))
    return DsDbConfig(block_m, block_n, rank, num_chunks, num_warps, num_stages)
