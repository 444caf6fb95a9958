"""fp32 adapters on half precision: S, dS, dA and dB to 1e-5, in fp32's range, and outputs as near as fp32's own."""

# pyright: reportArgumentType=false

import pytest
import torch
from numerics import assert_close_to_fp64, poisoned_empty

from fastlora.kernels import group, mlp
from fastlora.kernels.expand import expand
from fastlora.kernels.gemm import forward_gemm, input_grad_gemm
from fastlora.kernels.grads import ds_and_db, ds_and_db_workspace, weight_grad, weight_grad_workspace
from fastlora.kernels.segment_factors import factors_of
from fastlora.kernels.segment_grads import (
    segment_ds_db,
    segment_ds_db_workspace,
    segment_weight_grad,
    segment_weight_grad_workspace,
)
from fastlora.kernels.segment_plan import Segments
from fastlora.kernels.segments import segment_expand, segment_shrink, segment_shrink_workspace
from fastlora.kernels.shrink import shrink, shrink_workspace

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M, N, K, R = 70, 45, 83, 5  # three chunks of rows or parts of K, and an edge everywhere
# (of x or dY, of A, B, S or dS): fp16 holds 6e-8 to 65504, bf16 and fp32 what fp32 does.
MAGNITUDES = {
    "ordinary": (lambda size: 1.0, lambda size: 1.0),
    "tiny": (lambda size: 1e-5, lambda size: 1e-12),
    "huge": (lambda size: 40.0, lambda size: 1e9),
    "mixed": (
        lambda size: 10 ** torch.empty(size).uniform_(-3, 3),
        lambda size: 10 ** torch.empty(size).uniform_(-9, 5),
    ),
    "positive": (lambda size: 300.0, lambda size: 10.0),
}
CASES = [(dtype, case) for dtype in (BF16, FP16) for case in MAGNITUDES]
ALL = pytest.mark.parametrize("dtype, case", CASES)


def operands(dtype, case, *shapes, wide):
    """One tensor a shape, those numbered in `wide` in fp32."""
    torch.manual_seed(0)
    tensors = []
    for i, shape in enumerate(shapes):
        values = torch.randn(shape) * MAGNITUDES[case][i in wide](shape)
        values = values.abs() if case == "positive" else values
        tensors.append(values if i in wide else values.clamp(-6e4, 6e4).to(dtype))
    return tensors


def workspace(size):
    return poisoned_empty(1, size, dtype=FP32)[0]


def assert_right(got, reference, what):
    assert got.dtype == FP32
    assert got.isfinite().all(), f"{what}: not finite"
    error = ((got.double() - reference).norm() / reference.norm()).item()
    assert error <= 1e-5, f"{what}: relative error {error:.1e}"
    assert not ((got == 0) & (reference.float() != 0)).any(), f"{what}: zero where fp32 has none"


@ALL
def test_shrink(dtype, case):
    x, a = operands(dtype, case, (M, K), (R, K), wide=(1,))
    s = poisoned_empty(M, R, dtype=FP32)
    shrink(x, a, s, workspace(shrink_workspace(x, a)), scale=0.5)
    assert_right(s, 0.5 * x.double() @ a.double().t(), "S")


@ALL
@pytest.mark.parametrize("r", [R, 60])  # in one pass over dY, in two
def test_ds_and_db(dtype, case, r):
    dy, b, s = operands(dtype, case, (M, N), (N, r), (M, r), wide=(1, 2))
    ds, db = poisoned_empty(M, r, dtype=FP32), poisoned_empty(N, r, dtype=FP32)
    ds_and_db(dy, b, s, ds, db, workspace(ds_and_db_workspace(dy, b)), scaling=2.0)
    assert_right(ds, 2.0 * dy.double() @ b.double(), "dS")
    assert_right(db, 2.0 * dy.double().t() @ s.double(), "dB")


@ALL
def test_weight_grad(dtype, case):
    x, ds = operands(dtype, case, (M, K), (M, R), wide=(1,))
    da = poisoned_empty(R, K, dtype=FP32)
    weight_grad(x, ds, da.t(), workspace(weight_grad_workspace(x, R)))
    assert_right(da, ds.double().t() @ x.double(), "dA")


def test_a_column_of_zeros_and_one_of_infinities_keep_to_themselves():
    x, ds = operands(FP16, "ordinary", (M, K), (M, 3), wide=(1,))
    ds[:, 0], ds[3, 1] = 0.0, float("inf")
    da = poisoned_empty(3, K, dtype=FP32)
    weight_grad(x, ds, da.t(), workspace(weight_grad_workspace(x, 3)))
    assert not da[0].any()
    assert not da[1].isfinite().any()
    assert_right(da[2], ds[:, 2].double() @ x.double(), "dA")


def in_half(case):
    """S and B for outputs that half precision holds."""
    return {"huge": (1e9, 1e-9), "tiny": (1e-12, 1e9), "mixed": (1e3, 1e-2)}.get(case, (1.0, 1.0))


@ALL
def test_expand_and_the_gemms(dtype, case):
    torch.manual_seed(0)
    size_s, size_b = in_half(case)
    s, b = torch.randn(M, R) * size_s, torch.randn(N, R) * size_b
    x, weight = torch.randn(M, K).to(dtype), (torch.randn(N, K) * K**-0.5).to(dtype)
    low_rank = 1.5 * s.double() @ b.double().t()
    out = poisoned_empty(M, N, dtype=dtype)
    expand(s, b, out, alpha=1.5)
    assert_close_to_fp64(out, low_rank, low_rank.float().to(dtype), "T")
    out = poisoned_empty(M, N, dtype=dtype)
    forward_gemm(x, weight, None, s, b, out, 1.5)
    reference = x.double() @ weight.double().t() + low_rank
    assert_close_to_fp64(out, reference, reference.float().to(dtype), "y")
    out = poisoned_empty(M, N, dtype=dtype)
    input_grad_gemm(x, weight.t(), 1.5 * s, b.t(), out)
    assert_close_to_fp64(out, reference, reference.float().to(dtype), "dX")


@ALL
def test_group(dtype, case):
    ranks = (R, 2, 20)
    x, *a = operands(dtype, case, (M, K), *((r, K) for r in ranks), wide=(1, 2, 3))
    s = [poisoned_empty(M, r, dtype=FP32) for r in ranks]
    group.group_shrink(x, a, s, workspace(group.shrink_workspace(x, a)))
    da = [poisoned_empty(r, K, dtype=FP32) for r in ranks]
    group.group_weight_grad(x, s, [grad.t() for grad in da], workspace(group.weight_grad_workspace(x, ranks)))
    for got, grad, factor in zip(s, da, a, strict=True):
        assert_right(got, x.double() @ factor.double().t(), "S")
        assert_right(grad, got.double().t() @ x.double(), "dA")
    sizes = in_half(case)
    ss, ws = [torch.randn(M, r) * sizes[0] for r in ranks], [torch.randn(N, r) * sizes[1] for r in ranks]
    out = poisoned_empty(M, N, dtype=dtype)
    group.group_expand(ss, ws, out)
    reference = torch.stack([s.double() @ w.double().t() for s, w in zip(ss, ws, strict=True)]).sum(0)
    assert_close_to_fp64(out, reference, reference.float().to(dtype), "Σ S Wᵀ")


@ALL
def test_mlp(dtype, case):
    gate, up, a, ds = operands(dtype, "ordinary", (M, K), (M, K), (R, K), (M, R), wide=(2, 3))
    size_s, size_a = in_half(case)
    a, ds = a * size_a, ds * size_s
    h, s = poisoned_empty(M, K, dtype=dtype), poisoned_empty(M, R, dtype=FP32)
    mlp.activate(gate, up, "silu", h, a, s, workspace(mlp.activate_workspace(gate, a)))
    assert_right(s, h.double() @ a.double().t(), "S")
    dh, dgate, dup = torch.randn(M, K).to(dtype), *(poisoned_empty(M, K, dtype=dtype) for _ in range(2))
    da = poisoned_empty(R, K, dtype=FP32)
    scratch = workspace(mlp.activate_backward_workspace(gate, R))
    mlp.activate_backward(dh, ds, gate, up, "silu", a, dgate, dup, da, scratch)
    assert_right(da, ds.double().t() @ h.double(), "dA")
    silu = torch.nn.functional.silu(gate.double())
    reference = (dh.double() + ds.double() @ a.double()) * silu
    assert_close_to_fp64(dup, reference, reference.float().to(dtype), "dup")


@ALL
@pytest.mark.parametrize("r", [R, 60])
def test_segments(dtype, case, r):
    x, dy, *factors = operands(dtype, case, (M, K), (M, N), (r, K), (3, K), (N, r), (N, 3), wide=(2, 3, 4, 5))
    a, b = factors[:2], factors[2:]
    segments = Segments([0, 1, 0, 1, 1], M // 5)
    known = factors_of(a, b, [2.0, 0.5], [0.0, 0.0])
    s, ds = poisoned_empty(M, r, dtype=FP32), poisoned_empty(M, r, dtype=FP32)
    segment_shrink(x, segments, known, s, workspace(segment_shrink_workspace(x, segments, known)))
    db = poisoned_empty(1, N * (r + 3), dtype=FP32)[0]
    segment_ds_db(dy, segments, known, s, ds, db, workspace(segment_ds_db_workspace(dy, segments, known)))
    da = poisoned_empty(1, K * (r + 3), dtype=FP32)[0]
    segment_weight_grad(x, segments, known, ds, da, workspace(segment_weight_grad_workspace(x, segments, known)))
    for i, (rank, scale) in enumerate(((r, 2.0), (3, 0.5))):
        rows, positions = segments.index(i, x.device), slice(*segments.starts[i : i + 2])
        x64, dy64 = x[rows].double(), dy[rows].double()
        s_i, ds_i = s[positions, :rank], ds[positions, :rank]
        assert_right(s_i, x64 @ a[i].double().t(), "S")
        assert_right(ds_i, scale * dy64 @ b[i].double(), "dS")
        assert_right(da.split([r * K, 3 * K])[i].view(rank, K), ds_i.double().t() @ x64, "dA")
        assert_right(db.split([N * r, N * 3])[i].view(N, rank), scale * dy64.t() @ s_i.double(), "dB")


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_segment_expand(dtype):
    torch.manual_seed(0)
    a, b = [torch.randn(R, K), torch.randn(3, K)], [torch.randn(N, R), torch.randn(N, 3)]
    segments, known = Segments([0, 1, 0], 7), factors_of(a, b, [2.0, 0.5], [0.0, 0.0])
    s, out = torch.randn(21, R), poisoned_empty(21, N, dtype=dtype)
    segment_expand(s, segments, known, out, accumulate=False)
    for i, (rank, scale) in enumerate(((R, 2.0), (3, 0.5))):
        rows, positions = segments.index(i, s.device), slice(*segments.starts[i : i + 2])
        reference = scale * s[positions, :rank].double() @ b[i].double().t()
        assert_close_to_fp64(out[rows], reference, reference.float().to(dtype), "s·S Bᵀ")


def test_in_the_dtype_of_x_the_adapter_is_cast():
    x, a = operands(BF16, "ordinary", (M, K), (R, K), wide=(1,))
    wide, cast, rounded = poisoned_empty(M, R, dtype=FP32), *(poisoned_empty(M, R, dtype=BF16) for _ in range(2))
    scratch = workspace(shrink_workspace(x, a))
    shrink(x, a, cast, scratch)
    shrink(x, a.bfloat16(), rounded, scratch)
    shrink(x, a, wide, scratch)
    assert torch.equal(cast, rounded)
    assert not torch.equal(cast, wide.bfloat16())
