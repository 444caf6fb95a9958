"""Tiles: which one a program works on, how one is read, multiplied and written, how fp32 parts are added.

Parts are added in a fixed order, by the program that finishes last (`store_sum`) or by a pass of their own
(`reduce_partials`). Atomic additions would need neither, but they add in whatever order the programs finish, and fp32
addition is not associative: two runs would differ in their last bits.
"""

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .launch import launch


@triton.jit
def grouped_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of tile number `tile`, in columns of GROUP_M tiles.

    Programs that run at the same time then cover a block of the output that is about as high as it is wide, so that
    the rows of x and of the weight which they share are read from L2.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % height, within // height


@triton.jit
def load_tile(
    ref,  # a tensor descriptor of blocks (ROWS, COLUMNS), or a pointer
    row,
    column,
    num_rows,
    num_columns,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """The block (ROWS, COLUMNS) that starts at (row, column), with zeros beyond the matrix (num_rows, num_columns)."""
    if DESCRIPTOR:
        tile = ref.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        # 64 bits: M·K passes 2^31 at 131072 tokens of 16384 features.
        pointers = ref + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
        tile = tl.load(pointers, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    ref,  # a tensor descriptor of blocks like `value`, or a pointer
    value,
    row,
    column,
    num_rows,
    num_columns,
    stride_row,
    stride_column,
    DESCRIPTOR: tl.constexpr,
):
    """Write the block `value` at (row, column), as far as it lies in the matrix (num_rows, num_columns)."""
    if DESCRIPTOR:
        ref.store([row, column], value.to(ref.dtype))
    else:
        rows = row + tl.arange(0, value.shape[0])
        columns = column + tl.arange(0, value.shape[1])
        pointers = ref + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tl.store(pointers, value.to(ref.dtype.element_ty), mask=mask)


@triton.jit
def _bf16_parts(wide):
    """(high, low) in bf16 with high + low = wide to 2^-17."""
    high = wide.to(tl.bfloat16)
    return high, (wide.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _fp16_parts(wide):
    """(high, low, scale (columns,)) in fp16: (high + low)·scale is wide to 2^-22, or to 2^-39 of its column's largest.

    A power of two for each column puts its largest number into [2^14, 2^15), the top of fp16's range.
    """
    exponent = tl.max(wide.to(tl.int32, bitcast=True) >> 23 & 0xFF, axis=0)
    exponent = tl.maximum(exponent, 15)  # so that both powers are normal numbers
    scaled = wide * (268 - exponent << 23).to(tl.float32, bitcast=True)[None, :]
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    return high, low, (exponent - 14 << 23).to(tl.float32, bitcast=True)


@triton.jit
def dot(x, w, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x w in fp32. w of another dtype than x is cast to x's, or with WIDE, for w in fp32, keeps its digits.

    WIDE splits w into two parts that tensor cores multiply exactly, the smaller one first: bf16 ones, to 2^-17 in all
    of fp32's range, or for x in fp16 scaled fp16 ones. (Two tf32 parts hold fp16's x exactly too, but x then passes
    through 64 registers more a thread, and where it is transposed Triton loads it without asynchronous copies.) x in
    fp32 (S, dS) is split as well, and the product of the two low parts, 2^-18 of the result, is left out: what it
    adds to leaves in half precision.
    """
    if not WIDE or (w.dtype == x.dtype and x.dtype != tl.float32):
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    elif x.dtype == tl.float16:
        high, low, scale = _fp16_parts(w.to(tl.float32))
        part = tl.dot(x, low)
        acc += tl.dot(x, high, part) * scale[None, :]
    elif x.dtype == tl.bfloat16:
        high, low = _bf16_parts(w)
        acc = tl.dot(x, low, acc)
        acc = tl.dot(x, high, acc)
    else:
        x_high, x_low = _bf16_parts(x)
        w_high, w_low = _bf16_parts(w)
        acc = tl.dot(x_low, w_high, acc)
        acc = tl.dot(x_high, w_low, acc)
        acc = tl.dot(x_high, w_high, acc)
    return acc


def is_wide(low_rank: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether S or dS is wider than x, dY or y: then their products with the adapters keep fp32's digits (`dot`)."""
    return low_rank.dtype.itemsize > x.dtype.itemsize


@triton.jit
def store_sum(
    value,  # this program's part of a block of out, fp32
    out_ptr,  # (rows, columns)
    partials_ptr,  # (parts, rows, columns) fp32, contiguous; None where there is one part
    counter_ptr,  # int32: how many parts of this block have been written; zero before and after
    part,
    num_parts,
    row,
    column,
    num_rows,
    num_columns,
    stride_row,
    stride_column,
):
    """out's block at (row, column) = the sum of its parts, from the first to the last, by the last program to arrive.

    Which program that is differs from run to run; the sum does not. The barrier puts all threads' stores before the
    atomic, which releases them; the one that counts the last part acquires the others', and the barrier inside
    `tl.atomic_add` hands them to all threads.
    """
    if partials_ptr is None:
        store_tile(out_ptr, value, row, column, num_rows, num_columns, stride_row, stride_column, False)
    else:
        ROWS: tl.constexpr = value.shape[0]
        COLUMNS: tl.constexpr = value.shape[1]
        size = tl.cast(num_rows, tl.int64) * num_columns
        store_tile(partials_ptr + part * size, value, row, column, num_rows, num_columns, num_columns, 1, False)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == num_parts - 1:
            total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for _ in range(num_parts):
                total += load_tile(
                    partials_ptr, row, column, num_rows, num_columns, num_columns, 1, ROWS, COLUMNS, False
                )
                partials_ptr += size
            store_tile(out_ptr, total, row, column, num_rows, num_columns, stride_row, stride_column, False)
            tl.store(counter_ptr, 0)


BLOCK = 1024


@triton.jit(do_not_specialize=["num_parts"])
def _reduce_kernel(
    partials_ptr,  # (num_parts, rows, columns) fp32, contiguous
    out_ptr,  # (rows, columns)
    num_parts,
    size,  # rows · columns
    columns,
    stride_row,
    stride_column,
    BLOCK: tl.constexpr,
):
    """out = partials[0] + partials[1] + …, from the first to the last."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    pointers = partials_ptr + offs
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(num_parts):
        acc += tl.load(pointers, mask=inside, other=0.0)
        pointers += size
    out_pointers = out_ptr + (offs // columns) * stride_row + (offs % columns) * stride_column
    tl.store(out_pointers, acc.to(out_ptr.dtype.element_ty), mask=inside)


def reduce_partials(partials: torch.Tensor, out: torch.Tensor, num_parts: int) -> None:
    """out (any strides, any float dtype) = the sum of the `num_parts` fp32 matrices lying in a row in `partials`."""
    rows, columns = out.shape
    size = rows * columns
    assert partials.dtype == torch.float32
    assert partials.is_contiguous()
    assert partials.numel() >= num_parts * size
    launch(
        _reduce_kernel,
        (cdiv(size, BLOCK),),
        partials,
        out,
        num_parts,
        size,
        columns,
        out.stride(0),
        out.stride(1),
        BLOCK=BLOCK,
        num_warps=4,
    )
