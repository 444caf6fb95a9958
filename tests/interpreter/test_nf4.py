"""The four-bit dequantisation kernel, bit for bit against bitsandbytes' own on the CPU."""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_surroundings_untouched, poisoned_empty

from fastlora.kernels.nf4 import DequantiseConfig, dequantise_4bit
from fastlora.ops.quant import weights

bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def quantised(rows: int, columns: int, *, kind: str = "nf4", block: int = 64, nested: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(rows + columns)
    weight = torch.randn(rows, columns) * torch.rand(rows, 1)
    return bnb.functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)


def formula(packed: Any, state: Any) -> torch.Tensor:
    """code · maximum, in fp32. bitsandbytes 0.50.2's CPU kernel has some weights wrong whose rows are no whole number
    of blocks (16 x 96: off by 2.5 where weights are around 1), so it is the reference only elsewhere."""
    n = torch.Size(state.shape).numel()
    absmax = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * outer + state.offset
    nibbles = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n]
    values = state.code[nibbles.long()] * absmax.repeat_interleave(state.blocksize)[:n]
    return values.view(state.shape).to(state.dtype)


def check(packed: Any, state: Any, dtype: torch.dtype, config: DequantiseConfig | None = None) -> None:
    state.dtype = dtype
    want = formula(packed, state)
    if state.shape[1] % state.blocksize == 0 and state.blocksize < 2048:
        assert torch.equal(want, bnb.functional.dequantize_4bit(packed, state))
    out = poisoned_empty(1, want.numel(), dtype=dtype, layout="offset")
    inner = {}
    if state.nested:
        inner = {"code2": state.state2.code, "absmax2": state.state2.absmax, "offset": state.offset}
    dequantise_4bit(packed.reshape(-1), state.code, state.absmax, out, state.blocksize, config=config, **inner)
    assert torch.equal(out.view(want.shape), want)
    assert_surroundings_untouched(out)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_bits_of_nf4(dtype, nested):
    check(*quantised(48, 192, nested=nested), dtype)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 2), (3, 43), (5, 130), (16, 96), (257, 66), (1, 64 * 300)])
def test_sizes_that_divide_nothing(rows, columns):
    """Odd counts, a last block that is not full, more than 256 blocks: a second outer maximum."""
    check(*quantised(rows, columns), BF16)


@pytest.mark.parametrize("block", [32, 128, 512, 4096])
@pytest.mark.parametrize("nested", [True, False])
def test_block_sizes(block, nested):
    check(*quantised(33, 250, block=block, nested=nested), FP32)


def test_fp4():
    check(*quantised(16, 128, kind="fp4"), BF16)


def test_any_number_of_blocks_a_program():
    for elements in (64, 256, 1024):
        check(*quantised(7, 200), BF16, DequantiseConfig(elements, 1))


def test_nothing_to_do():
    empty = torch.empty(0, dtype=torch.uint8)
    dequantise_4bit(empty, torch.zeros(16), torch.empty(0), torch.empty(0), 64)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_check_before_first_use_passes(dtype):
    """What a GPU is asked once: the kernel behind a layer's weight, beside bitsandbytes' function."""
    assert weights.compare_kernel(torch.device("cpu"), dtype) is None
