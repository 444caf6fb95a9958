"""Tiles: which one a program works on, and how one is read and written. Device functions shared by the kernels.

The sum of fp32 partial results in a fixed order: what the kernels here do instead of atomics.

An atomic addition would save this pass over the partials, but it adds them in whatever order the programs finish, and
fp32 addition is not associative: two runs would differ in their last bits.
"""

import torch
import triton
import triton.language as tl


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
    _reduce_kernel[(triton.cdiv(size, BLOCK),)](
        partials, out, num_parts, size, columns, out.stride(0), out.stride(1), BLOCK=BLOCK, num_warps=4
    )
