# pyright: reportArgumentType=false
# Triton types a constexpr parameter as `constexpr` and takes an int for it.

import torch
import triton
import triton.language as tl


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs))
    tl.store(out_ptr + offs, acc)


@triton.jit
def _cast_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(target_ptr + offs, tl.load(source_ptr + offs).to(target_ptr.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, sum_ptr, less_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(sum_ptr + offs, a + b)
    tl.store(less_ptr + offs, a < b)


@triton.jit
def _count_kernel(out_ptr, steps):
    count = 0
    for _ in range(tl.program_id(0), steps):
        count += 1
    tl.store(out_ptr + tl.program_id(0), count)


def test_dot_multiplies_values_and_not_bit_patterns():
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.full((16, 16), float("nan"))
    _dot_kernel[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=1e-5)


def test_casts_round_as_torch_does():
    torch.manual_seed(0)
    values = torch.randn(1024) * torch.logspace(-40, 38, 1024)
    values[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -float("inf"), 0.0, -0.0])  # two ties first
    for source, target in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ):
        given = values.to(source)
        out = torch.full((1024,), float("nan"), dtype=target)
        _cast_kernel[(1,)](given, out, SIZE=1024)
        assert torch.equal(out, given.to(target)), (source, target)


def test_arithmetic_works_on_values():
    torch.manual_seed(0)
    a, b = torch.randn(2, 256).bfloat16()
    total, less = torch.full((256,), float("nan")).bfloat16(), torch.zeros(256, dtype=torch.bool)
    _arithmetic_kernel[(1,)](a, b, total, less, SIZE=256)
    assert torch.equal(total, a + b)
    assert torch.equal(less, a < b)


def test_a_run_time_value_bounds_a_loop():
    out = torch.zeros(3, dtype=torch.int32)
    _count_kernel[(3,)](out, 5)
    assert out.tolist() == [5, 4, 3]
