"""Four-bit weights back to floating point: bitsandbytes' NF4 and FP4, with plain or doubly quantised block maxima.

A weight of n elements lies in memory as blocks of B elements, two to a byte, the earlier one in the high half. Block
i has one maximum,

    absmax[i]                                         as fp32, or, quantised itself in blocks of 256,
    code2[absmax[i]] · absmax2[i // 256] + offset     as a byte

and element j of it is code[nibble] · maximum. Both products and the sum are rounded to fp32 each, as bitsandbytes does,
so that the results are its bits: nothing here may be contracted to a fused multiply-add.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import configs
from .launch import launch

NESTED_BLOCK = 256  # the block of doubly quantised maxima: bitsandbytes knows no other


@dataclass(frozen=True)
class DequantiseConfig:
    """How to launch the kernel. `elements` a program, a power of two, at least one block of the weight."""

    elements: int
    num_warps: int


def dequantise_config(block: int, device: torch.device) -> DequantiseConfig:
    """4096 elements by 4 warps: 16 bytes read and 64 written a thread. Not measured."""
    if configs.capability(device) == configs.INTERPRETER:
        return DequantiseConfig(max(2 * block, 128), 1)
    return DequantiseConfig(max(4096, block), 4)


@triton.jit
def _dequantise_kernel(
    packed_ptr,  # (⌈n/2⌉,) uint8
    code_ptr,  # (16,) fp32
    absmax_ptr,  # (blocks,) fp32, or uint8 with NESTED
    code2_ptr,  # (256,) fp32, read only with NESTED
    absmax2_ptr,  # (⌈blocks/256⌉,) fp32, read only with NESTED
    offset_ptr,  # () fp32, read only with NESTED
    out_ptr,  # (n,)
    n,
    num_bytes,  # ⌈n/2⌉, an argument because bytes leave memory 16 at a time where it is known to be a multiple of 16
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """out[e] = code[nibble e] · maximum of block e // BLOCK, for BLOCKS blocks a program."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = blocks * BLOCK < n
    absmax = tl.load(absmax_ptr + blocks, mask=is_block, other=0)
    if NESTED:
        outer = tl.load(absmax2_ptr + blocks // NESTED_BLOCK, mask=is_block, other=0.0)
        absmax = tl.load(code2_ptr + absmax.to(tl.int32)) * outer + tl.load(offset_ptr)

    pairs = tl.arange(0, BLOCK // 2)[None, :]
    positions = blocks[:, None] * (BLOCK // 2) + pairs
    packed = tl.load(packed_ptr + positions, mask=positions < num_bytes, other=0).to(tl.int32)
    high = tl.load(code_ptr + (packed >> 4)) * absmax[:, None]
    low = tl.load(code_ptr + (packed & 15)) * absmax[:, None]

    elements = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + elements, values, mask=elements < n)


def dequantise_4bit(
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    out: torch.Tensor,
    block: int,
    *,
    code2: torch.Tensor | None = None,
    absmax2: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    config: DequantiseConfig | None = None,
) -> None:
    """Writes the n = out.numel() elements of a four-bit weight into `out`, contiguous, of any float dtype.

    packed: uint8, ⌈n/2⌉ elements. code: 16 fp32 values. absmax: ⌈n/block⌉ maxima, fp32, or uint8 with `code2` (256
    fp32 values), `absmax2` (fp32, one for 256 of them) and `offset` (one fp32 value). block: a power of two.
    """
    n = out.numel()
    blocks = configs.cdiv(n, block)
    nested = code2 is not None
    assert packed.dtype == torch.uint8 and packed.numel() == configs.cdiv(n, 2), (packed.shape, n)
    assert absmax.numel() == blocks and absmax.dtype == (torch.uint8 if nested else torch.float32), absmax.shape
    assert block >= 2 and block & (block - 1) == 0, block
    assert all(tensor.is_contiguous() for tensor in (packed, code, absmax, out))
    if nested:
        assert absmax2 is not None and absmax2.numel() == configs.cdiv(blocks, NESTED_BLOCK), absmax2
        assert offset is not None and offset.numel() == 1, offset
    if n == 0:
        return
    config = config or dequantise_config(block, out.device)
    per_program = max(1, config.elements // block)
    launch(
        _dequantise_kernel,
        (configs.cdiv(blocks, per_program),),
        packed,
        code,
        absmax,
        code2,
        absmax2,
        offset,
        out,
        n,
        packed.numel(),
        BLOCK=block,
        BLOCKS=per_program,
        NESTED_BLOCK=NESTED_BLOCK,
        NESTED=nested,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
