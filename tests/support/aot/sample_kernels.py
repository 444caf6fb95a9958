"""Small kernels with known faults, so that the tests of the machinery can see it find them."""

import triton
import triton.language as tl


@triton.jit
def copy_rows(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    """y = 2x, blockwise, rows `stride` apart."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64) * stride
    x = tl.load(x_ptr + row + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + row + offs, x * 2, mask=offs < n)


@triton.jit
def add_atomically(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y[0] += sum x, in whichever order the blocks arrive."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0)))


@triton.jit
def matmul(x_desc, w_desc, y_ptr, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y = x wᵀ through descriptors."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
    offs_m, offs_n = (m + tl.arange(0, BLOCK_M)).to(tl.int64), n + tl.arange(0, BLOCK_N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty))
