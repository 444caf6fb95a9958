"""The four-bit dequantisation kernel compiles for Ampere, Hopper and Blackwell into what it was written as."""

import pytest
import torch
from aot.pretend import Census, Launch, pretend, take_censuses
from aot.sweep import ARCHS, BF16, FP32, META

from fastlora.kernels.nf4 import dequantise_4bit

# (dtype, block, doubly quantised, elements)
PROBLEMS = [
    (BF16, 64, True, 4096 * 4096),
    (FP32, 4096, False, 4096 * 4096),
    (BF16, 64, True, 4097 * 1001),
]


def empty(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(n, dtype=dtype, device=META)


def launch() -> None:
    for dtype, block, nested, n in PROBLEMS:
        blocks = -(-n // block)
        inner = {}
        if nested:
            inner = {"code2": empty(256, FP32), "absmax2": empty(-(-blocks // 256), FP32), "offset": empty(1, FP32)}
        absmax = empty(blocks, torch.uint8 if nested else FP32)
        dequantise_4bit(empty(-(-n // 2), torch.uint8), empty(16, FP32), absmax, empty(n, dtype), block, **inner)


def launches_of(arch: int) -> list[Launch]:
    with pretend(arch) as launches:
        launch()
        return list(launches)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, list[tuple[Launch, Census]]]:
    """Every launch with its census, a kind once."""
    kinds = {arch: list({launch.key: launch for launch in launches_of(arch)}.values()) for arch in ARCHS}
    everything = [launch for launches in kinds.values() for launch in launches]
    results = take_censuses(everything, tmp_path_factory.mktemp("triton"))
    censuses = {key: census for key, census in results.items() if isinstance(census, Census)}
    assert len(censuses) == len(results), results
    return {arch: [(launch, censuses[launch.key]) for launch in launches] for arch, launches in kinds.items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_little_is_held(compiled, arch):
    assert len(compiled[arch]) == len(PROBLEMS)
    for launch, census in compiled[arch]:
        assert census.spills == 0 and census.local == 0 and census.scratch == 0, launch.constants()
        assert census.registers <= 128, census  # four programs of 4 warps a multiprocessor
        assert census.atomics == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_products_and_sums_are_rounded_apart(compiled, arch):
    """bitsandbytes' bits: code2 · absmax2 + offset in two roundings, not in one fused multiply-add."""
    for _, census in compiled[arch]:
        assert census.count("FMUL", "FMUL2") > 0
        assert census.count("FFMA", "FFMA2") == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_is_read_and_written_16_bytes_at_a_time(compiled, arch):
    """Where the weight is bf16 and 4096², in blocks of 64."""
    launch, _ = compiled[arch][0]
    ptx = launch.compile().asm["ptx"]
    assert "st.global.v4.b32" in ptx
    assert "ld.global.v4.b32" in ptx
