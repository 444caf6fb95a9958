# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

"""The kernels for several adapters in one batch, against fp64 adapter by adapter."""

from typing import ClassVar

import contracts
import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout

from fastlora.kernels import segment_grads, segments
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.kernels.segment_factors import factors_of
from fastlora.kernels.segment_plan import BASE, Segments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([987654321012345])


class Batch:
    """A problem: ids of the sequences, one adapter for each of `ranks` (its number is its place)."""

    def __init__(self, ids, tokens, ranks, k=40, n=50, dtype=BF16, adapter_dtype=None, ps=None, layout="contiguous"):
        torch.manual_seed(len(ids) * tokens + sum(ranks))
        self.segments = Segments(ids, tokens)
        used = self.segments.adapters
        self.rows = len(ids) * tokens
        self.positions = self.segments.rows(torch.device("cpu")).long()
        self.x = with_layout(torch.randn(self.rows, k).to(dtype), layout)
        self.dy = with_layout(torch.randn(self.rows, n).to(dtype), layout)
        adapters = [
            (torch.randn(r, k) * k**-0.5, torch.randn(n, r) * r**-0.5, 0.5 + i, (ps or [0.0] * len(ranks))[i])
            for i, r in enumerate(ranks)
        ]
        self.lora_As = [adapters[i][0].to(adapter_dtype or dtype) for i in used]
        self.lora_Bs = [adapters[i][1].to(adapter_dtype or dtype) for i in used]
        self.scalings = [adapters[i][2] for i in used]
        self.ps = [adapters[i][3] for i in used]
        self.factors = factors_of(self.lora_As, self.lora_Bs, self.scalings, self.ps)
        self.seed = SEED if self.factors.any_dropout else None
        self.rank = self.factors.max_rank
        self.s = self.sorted_operand()
        self.ds = self.sorted_operand()

    def sorted_operand(self):
        """What S or dS may be: zero beyond each adapter's rank."""
        values = torch.zeros(self.segments.num_positions, self.rank, dtype=self.x.dtype)
        for _, span, a, _ in self.each():
            values[span, : a.shape[0]] = torch.randn(span.stop - span.start, a.shape[0]).to(self.x.dtype)
        return values

    def each(self):
        """(number, its positions, A, B) of every segment."""
        starts = self.segments.starts
        for i, (a, b) in enumerate(zip(self.lora_As, self.lora_Bs, strict=True)):
            yield i, slice(starts[i], starts[i + 1]), a, b

    def mask(self, i, columns):
        """mask · scale of segment i's rows, in fp64."""
        span = slice(self.segments.starts[i], self.segments.starts[i + 1])
        if self.ps[i] == 0.0:
            return torch.ones(span.stop - span.start, columns, dtype=torch.float64)
        keep = reference_keep_mask(SEED, span.stop, columns, self.ps[i])[span]
        return keep.double() * threshold_and_scale(self.ps[i])[1]


def workspace(size):
    return poisoned_empty(1, size, dtype=FP32)[0]


def check_shrink(batch, by_b=False):
    x = batch.dy if by_b else batch.x
    out = poisoned_empty(batch.segments.num_positions, batch.rank, dtype=x.dtype)
    size = segments.segment_shrink_workspace(x, batch.segments, batch.factors)
    seed = None if by_b else batch.seed
    segments.segment_shrink(x, batch.segments, batch.factors, out, workspace(size), by_b=by_b, seed=seed)
    for i, span, a, b in batch.each():
        w = b.t().to(x.dtype) if by_b else a.to(x.dtype)
        scale = batch.scalings[i] if by_b else 1.0
        mask = torch.ones(1, 1).double() if by_b else batch.mask(i, x.shape[1])
        rows = x[batch.positions[span]]
        eager = ((rows * (mask != 0)) @ w.t()) * (scale * mask.max().item())
        exact = scale * ((rows.double() * mask) @ w.double().t())
        assert_close_to_fp64(out[span, : a.shape[0]], exact, eager.to(x.dtype), f"segment {i}")
        assert (out[span, a.shape[0] :] == 0).all()
    return out


def check_expand(batch, by_a=False, accumulate=True, bias=None, layout="contiguous"):
    n = batch.x.shape[1] if by_a else batch.dy.shape[1]
    dtype = batch.x.dtype
    before = torch.randn(batch.rows, n).to(dtype)
    out = (
        with_layout(before.clone(), layout) if accumulate else poisoned_empty(batch.rows, n, dtype=dtype, layout=layout)
    )
    seed = batch.seed if by_a else None
    segments.segment_expand(
        batch.s, batch.segments, batch.factors, out, by_a=by_a, bias=bias, accumulate=accumulate, seed=seed
    )
    for i, span, a, b in batch.each():
        w, scale = (a.to(dtype), 1.0) if by_a else (b.t().to(dtype), batch.scalings[i])
        mask = batch.mask(i, n) if by_a else torch.ones(1, 1).double()
        rows, s = batch.positions[span], batch.s[span, : a.shape[0]]
        exact = scale * (s.double() @ w.double()) * mask
        eager = (s @ w) * (scale * mask.max().item()) * (mask != 0)
        if bias is not None:
            exact, eager = exact + bias.double(), eager + bias
        if accumulate:
            exact, eager = exact + before[rows].double(), eager + before[rows]
        assert_close_to_fp64(out[rows], exact, eager.to(dtype), f"segment {i}")
    others = torch.ones(batch.rows, dtype=torch.bool)
    others[batch.positions] = False
    assert torch.equal(out[others], before[others]) or (not accumulate and out[others].isnan().all())
    if layout != "contiguous":
        assert_surroundings_untouched(out)
    return out


def parts(flat, sizes):
    return [part.view(shape) for part, shape in zip(flat.split([r * c for r, c in sizes]), sizes, strict=True)]


def check_ds_db(batch):
    dtype, n = batch.x.dtype, batch.dy.shape[1]
    ds = poisoned_empty(batch.segments.num_positions, batch.rank, dtype=dtype)
    db = poisoned_empty(1, n * batch.factors.total_rank, dtype=batch.lora_Bs[0].dtype)[0]
    size = segment_grads.segment_ds_db_workspace(batch.dy, batch.segments, batch.factors)
    segment_grads.segment_ds_db(batch.dy, batch.segments, batch.factors, batch.s, ds, db, workspace(size))
    dbs = parts(db, [b.shape for b in batch.lora_Bs])
    for i, span, a, b in batch.each():
        r, scale, cast = a.shape[0], batch.scalings[i], b.to(dtype)
        dy, s = batch.dy[batch.positions[span]], batch.s[span, :r]
        assert_close_to_fp64(ds[span, :r], scale * (dy.double() @ cast.double()), scale * (dy @ cast), f"dS {i}")
        assert (ds[span, r:] == 0).all()
        exact, eager = scale * (dy.double().t() @ s.double()), (scale * (dy.t() @ s)).to(b.dtype)
        assert_close_to_fp64(dbs[i], exact, eager, f"dB {i}")
    return db


def check_weight_grad(batch):
    k = batch.x.shape[1]
    out = poisoned_empty(1, k * batch.factors.total_rank, dtype=batch.lora_As[0].dtype)[0]
    size = segment_grads.segment_weight_grad_workspace(batch.x, batch.segments, batch.factors)
    arguments = batch.x, batch.segments, batch.factors, batch.ds, out, workspace(size)
    segment_grads.segment_weight_grad(*arguments, seed=batch.seed)
    grads = parts(out, [a.shape for a in batch.lora_As])
    for i, span, a, _ in batch.each():
        mask, x, ds = batch.mask(i, k), batch.x[batch.positions[span]], batch.ds[span, : a.shape[0]]
        eager = (ds.t() @ (x * (mask != 0)) * mask.max().item()).to(a.dtype)
        assert_close_to_fp64(grads[i], ds.double().t() @ (x.double() * mask), eager, f"dA {i}")
    return out


def check_expand_dx(batch):
    return check_expand(batch, by_a=True)


CHECKS = pytest.mark.parametrize("check", [check_shrink, check_expand, check_expand_dx, check_ds_db, check_weight_grad])
MIXED = [1, 0, BASE, 1, 2, 0]


@CHECKS
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, None), (FP16, None), (FP32, None), (BF16, FP32)])
@pytest.mark.parametrize("ps", [None, [0.3, 0.0, 0.6]], ids=["no dropout", "dropout"])
def test_dtypes_and_a_dropout_for_each_adapter(check, dtype, adapter_dtype, ps):
    check(Batch(MIXED, 7, (5, 16, 3), dtype=dtype, adapter_dtype=adapter_dtype, ps=ps))


@CHECKS
@pytest.mark.parametrize(
    "ids, tokens, ranks, k, n",
    [
        ([0], 1, (1,), 1, 1),
        ([BASE, 0, BASE], 1, (4,), 17, 9),
        ([2, 2, 0, BASE], 1, (8, 8, 8), 100, 33),  # an adapter without rows
        ([0, 1], 37, (70, 8), 33, 70),  # beyond the rank of one pass, and of one block
        ([3, 1, 2, 0] * 2, 20, (8, 16, 8, 24), 64, 64),
        ([0, 0, 0], 30, (8,), 48, 130),
    ],
)
def test_shapes(check, ids, tokens, ranks, k, n):
    check(Batch(ids, tokens, ranks, k=k, n=n, ps=[0.2] * len(ranks)))


@CHECKS
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_strides(check, layout):
    check(Batch(MIXED, 5, (5, 16, 3), layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset"])
def test_expand_writes_and_adds(layout):
    batch = Batch([1, 0, 1], 9, (5, 8))
    bias = torch.randn(batch.dy.shape[1]).to(BF16)
    check_expand(batch, accumulate=False, bias=bias, layout=layout)
    check_expand(Batch(MIXED, 9, (5, 8, 4)), accumulate=False, layout=layout)


def test_ds_by_a_pass_of_its_own():
    check_shrink(Batch(MIXED, 7, (5, 16, 3)), by_b=True)


@CHECKS
def test_same_bits_every_time(check):
    problem = lambda: Batch(MIXED, 40, (5, 16, 3), ps=[0.3, 0.0, 0.6])  # noqa: E731
    assert torch.equal(check(problem()), check(problem()))


def test_a_row_does_not_depend_on_the_others():
    """S and y of a sequence are the same bits whoever shares the batch."""
    alone, among = Batch([0], 7, (5,), ps=[0.3]), Batch(MIXED, 7, (5, 16, 3), ps=[0.3, 0.0, 0.6])
    among.x[7:14] = alone.x
    among.lora_As[0].copy_(alone.lora_As[0])
    outs = []
    for batch in (alone, among):
        out = torch.zeros(batch.segments.num_positions, batch.rank, dtype=BF16)
        size = segments.segment_shrink_workspace(batch.x, batch.segments, batch.factors)
        segments.segment_shrink(batch.x, batch.segments, batch.factors, out, workspace(size))
        outs.append(out[:7, :5])
    assert torch.equal(*outs)


class TestExperts(contracts.Interpreted, contracts.Experts):
    shapes = ((0,), (11,))
    sizes: ClassVar = {
        "gathered": {"tokens": 5, "top_k": 2, "n": 18, "k": 17, "ranks": (3,)},
        "long": {"tokens": 30, "top_k": 1, "n": 5, "k": 6, "ranks": (17,), "strided": True, "gathered": False},
        "combined": {"tokens": 5, "top_k": 2, "n": 16, "k": 40, "ranks": (2, 3), "gathered": False, "combine": True},
        "both": {"tokens": 12, "top_k": 2, "n": 18, "k": 24, "ranks": (3, 2), "combine": True, "transposed": True},
    }


class TestMixedBatch(contracts.Interpreted, contracts.MixedBatch):
    shapes = contracts.MixedBatch.shapes
