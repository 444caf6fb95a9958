# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

"""`functional.lora_mixed_batch` on the CPU: values against fp64, and each sequence as its adapter alone."""

import contracts
import pytest
import torch
from problems import path

from fastlora.functional import lora_mixed_batch, multi_lora_linear
from fastlora.kernels.segment_plan import BASE, Segments
from fastlora.ops.mixed import aten as mixed_aten

BF16, FP32 = torch.bfloat16, torch.float32
IDS = [1, 0, BASE, 1, 2, 0]


@pytest.fixture(autouse=True, params=["function", "composed"])
def every_path(request):
    with path(request.param):
        yield request.param


MIXED, CPU = contracts.MixedBatch(), contracts.ATEN[0]


def make(ids=IDS, tokens=5, dtype=FP32):
    """(x, weight, bias, adapters), of which the last takes no part."""
    size = {"ids": ids, "shape": (len(ids), tokens), "k": 33, "n": 20, "ranks": (4, 7, 2, 3)}
    case = MIXED.make(CPU, (dtype, dtype), **size)
    of = {name: t.requires_grad_(name in case.trained) for name, t in case.tensors.items()}
    return of["x"], of["weight"], of["bias"], MIXED.adapters(of, case)


def leaves_of(x, adapters):
    return [x, *(factor for adapter in adapters for factor in adapter[:2])]


def gradients(y, leaves):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, leaves, dy, allow_unused=True)


def assert_near(got, want):
    """To 2 % in norm: bfloat16 on two paths that round at different places."""
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert (one.double() - other.double()).norm() < 2e-2 * other.double().norm()


def one_by_one(x, weight, bias, adapters, ids):
    outputs = [
        multi_lora_linear(row, weight, [] if i == BASE else [adapters[i]], bias) for row, i in zip(x, ids, strict=True)
    ]
    return torch.stack(outputs)


def test_ids_in_a_tensor_and_without_sequences():
    x, weight, bias, adapters = make()
    want = lora_mixed_batch(x, weight, adapters, IDS, bias)
    assert torch.equal(lora_mixed_batch(x, weight, adapters, torch.tensor(IDS, dtype=torch.int32), bias), want)
    assert torch.equal(lora_mixed_batch(x, weight, adapters, Segments(IDS, 5), bias), want)
    assert lora_mixed_batch(x[:0], weight, adapters, [], bias).shape == (0, 5, 20)
    assert lora_mixed_batch(x[:, :0], weight, adapters, IDS, bias).shape == (6, 0, 20)
    two_d = lora_mixed_batch(x[:, 0], weight, adapters, IDS, bias)
    torch.testing.assert_close(two_d, want[:, 0])
    four_d = lora_mixed_batch(x[:, :4].reshape(6, 2, 2, 33), weight, adapters, IDS, bias)
    torch.testing.assert_close(four_d.flatten(1, 2), want[:, :4])


def test_frozen_adapters_beside_trained_ones():
    x, weight, bias, adapters = make()
    adapters[0].lora_A.requires_grad_(False)
    adapters[1].lora_B.requires_grad_(False)
    y = lora_mixed_batch(x, weight, adapters, IDS, bias)
    leaves = [adapters[0].lora_B, adapters[1].lora_A]
    torch.testing.assert_close(gradients(y, leaves), gradients(one_by_one(x, weight, bias, adapters, IDS), leaves))


def test_adapters_of_different_dtypes_get_gradients_of_their_own():
    x, weight, bias, adapters = make(dtype=BF16)
    for i, of in ((0, FP32), (2, torch.float16)):
        factors = [factor.detach().to(of).requires_grad_() for factor in adapters[i][:2]]
        adapters[i] = adapters[i]._replace(lora_A=factors[0], lora_B=factors[1])
    y = lora_mixed_batch(x, weight, adapters, IDS, bias)
    got = gradients(y, leaves_of(x, adapters)[1:7])
    assert [g.dtype for g in got] == [FP32, FP32, BF16, BF16, torch.float16, torch.float16]
    want = gradients(one_by_one(x, weight, bias, adapters, IDS), leaves_of(x, adapters)[1:7])
    assert_near(got, want)


def test_autocast():
    x, weight, bias, adapters = make()
    with torch.autocast("cpu", dtype=BF16):
        together, apart = lora_mixed_batch(x, weight, adapters, IDS, bias), one_by_one(x, weight, bias, adapters, IDS)
        assert together.dtype == BF16
        leaves = leaves_of(x, adapters)[:7]
        got, want = gradients(together, leaves), gradients(apart, leaves)
    assert_near([together, *got], [apart, *want])


def test_under_torch_func_and_compile(every_path):
    if every_path == "composed":
        pytest.skip("as without: neither is asked")
    x, weight, bias, adapters = make()
    loss = lambda x, run: run(x).square().sum()  # noqa: E731
    mixed = lambda x: lora_mixed_batch(x, weight, adapters, IDS, bias)  # noqa: E731
    apart = lambda x: one_by_one(x, weight, bias, adapters, IDS)  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x, mixed), torch.func.grad(loss)(x, apart))
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), apart(x))


def test_long_runs_are_not_copied(every_path):
    """One run, or runs of many rows: the rows of x are views."""
    if every_path == "composed":
        pytest.skip("small problems are gathered")
    x, weight, bias, adapters = make([0, 0, 1, 1, 0, 0], tokens=64)
    with torch.autograd.profiler.profile() as profile:
        lora_mixed_batch(x, weight, adapters, [0, 0, 1, 1, 0, 0], bias)
    names = {event.name for event in profile.function_events}
    assert "aten::index_select" not in names and "aten::index_copy_" not in names
    assert mixed_aten.MIN_RUN <= 128


def test_wrong_arguments():
    x, weight, bias, adapters = make()
    for ids in (IDS[1:], [0] * 7):
        with pytest.raises(ValueError, match=r"lora_mixed_batch: adapter_ids: got \d \(for 5 rows each\) for x"):
            lora_mixed_batch(x, weight, adapters, ids, bias)
    for wrong in (4, -2):
        with pytest.raises(ValueError, match="want numbers of the 4 adapters, or -1 for none"):
            lora_mixed_batch(x, weight, adapters, [wrong] * 6, bias)
    with pytest.raises(ValueError, match="want x"):
        lora_mixed_batch(x, weight, adapters, Segments(IDS, 4), bias)
    with pytest.raises(ValueError, match="lora_mixed_batch: shapes: got x"):
        lora_mixed_batch(x[..., 1:], weight, adapters, IDS, bias)
    with pytest.raises(ValueError, match="want one dtype"):
        lora_mixed_batch(x.to(BF16), weight, adapters, IDS, bias)
    with pytest.raises(ValueError, match="dropout_p"):
        lora_mixed_batch(x, weight, [a._replace(dropout_p=1.5) for a in adapters], IDS, bias)


class TestMixedBatch(contracts.MixedBatch):
    pass
