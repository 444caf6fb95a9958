"""The sum of fp32 partial results in a fixed order: what the kernels here do instead of atomics.

An atomic addition would save this pass over the partials, but it adds them in whatever order the programs finish, and
fp32 addition is not associative: two runs would differ in their last bits.
"""

import torch
import triton
import triton.language as tl

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
