# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import contracts
import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout
from torch import nn

import fastlora
from fastlora.kernels import configs, group
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.layers import group as grouping

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEEDS = [torch.tensor([seed]) for seed in (987654321012345, 17, 2**61, 5, 6, 7)]
PLAIN = ("contiguous", "contiguous", "contiguous")


def operands(m, k, ranks, dtype, adapter_dtypes, layouts):
    torch.manual_seed(m * k + sum(ranks))
    x = with_layout(torch.randn(m, k).to(dtype), layouts[0])
    adapter_dtypes = adapter_dtypes or [dtype] * len(ranks)
    lora_As = [
        with_layout((torch.randn(r, k) * k**-0.5).to(adapter), layouts[1])
        for r, adapter in zip(ranks, adapter_dtypes, strict=True)
    ]
    return x, lora_As


def dropout(ps, m, k, shared):
    """(arguments of the launchers, mask · scale of each member in fp64)."""
    seeds = [None if p == 0.0 else SEEDS[0 if shared else i] for i, p in enumerate(ps)]
    masks = [
        torch.ones(m, k, dtype=torch.float64)
        if seed is None
        else reference_keep_mask(seed, m, k, p).double() * threshold_and_scale(p)[1]
        for seed, p in zip(seeds, ps, strict=True)
    ]
    return {"seeds": seeds, "dropout_ps": ps}, masks


def check_shrink(m, k, ranks, dtype=BF16, adapter_dtypes=None, ps=None, layouts=PLAIN, shared=False):
    x, lora_As = operands(m, k, ranks, dtype, adapter_dtypes, layouts)
    given, masks = dropout(ps or [0.0] * len(ranks), m, k, shared)
    outs = [poisoned_empty(m, r, dtype=dtype, layout=layouts[2]) for r in ranks]
    workspace = poisoned_empty(1, group.shrink_workspace(x, lora_As), dtype=FP32)[0]
    group.group_shrink(x, lora_As, outs, workspace, shared_mask=shared, **given)
    for i, (a, mask, out) in enumerate(zip(lora_As, masks, outs, strict=True)):
        cast = a.to(dtype)
        eager = (x * (mask != 0)) @ cast.t() * mask.max().item()
        assert_close_to_fp64(out, (x.double() * mask) @ cast.double().t(), eager, f"S of member {i}")
        if layouts[2] != "contiguous":
            assert_surroundings_untouched(out)
    return outs


def check_weight_grad(m, k, ranks, dtype=BF16, adapter_dtypes=None, ps=None, layouts=PLAIN, shared=False):
    x, lora_As = operands(m, k, ranks, dtype, adapter_dtypes, layouts)
    given, masks = dropout(ps or [0.0] * len(ranks), m, k, shared)
    gs = [with_layout(torch.randn(m, r).to(dtype), layouts[1]) for r in ranks]
    outs = [poisoned_empty(*a.shape, dtype=a.dtype, layout=layouts[2]) for a in lora_As]
    workspace = poisoned_empty(1, group.weight_grad_workspace(x, ranks), dtype=FP32)[0]
    group.group_weight_grad(x, gs, [out.t() for out in outs], workspace, shared_mask=shared, **given)
    for i, (g, mask, out) in enumerate(zip(gs, masks, outs, strict=True)):
        eager = (g.t() @ (x * (mask != 0)) * mask.max().item()).to(out.dtype)
        assert_close_to_fp64(out, g.double().t() @ (x.double() * mask), eager, f"dA of member {i}")
        if layouts[2] != "contiguous":
            assert_surroundings_untouched(out)
    return outs


def check_expand(m, n, ranks, dtype=BF16, adapter_dtypes=None, ps=None, layouts=PLAIN, accumulate=True):
    _, lora_As = operands(m, n, ranks, dtype, adapter_dtypes, layouts)
    given, masks = dropout(ps or [0.0] * len(ranks), m, n, False)
    ss = [with_layout(torch.randn(m, r).to(dtype), layouts[1]) for r in ranks]
    before = torch.randn(m, n).to(dtype)
    out = (
        with_layout(before.clone(), layouts[2]) if accumulate else poisoned_empty(m, n, dtype=dtype, layout=layouts[2])
    )
    group.group_expand(ss, [a.t() for a in lora_As], out, accumulate=accumulate, **given)
    exact = before.double() if accumulate else torch.zeros(m, n, dtype=torch.float64)
    eager = before.clone() if accumulate else torch.zeros(m, n, dtype=dtype)
    for s, a, mask in zip(ss, lora_As, masks, strict=True):
        cast = a.to(dtype)
        exact += (s.double() @ cast.double()) * mask
        eager += ((s @ cast) * mask.max().item()) * (mask != 0)
    assert_close_to_fp64(out, exact, eager, "dX")
    if layouts[2] != "contiguous":
        assert_surroundings_untouched(out)
    return out


CHECKS = pytest.mark.parametrize("check", [check_shrink, check_weight_grad, check_expand])


@CHECKS
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("ps", [None, [0.3, 0.0, 0.6]], ids=["no dropout", "dropout"])
def test_dtypes_and_a_mask_for_each_member(check, dtype, ps):
    check(37, 53, (5, 16, 3), dtype, ps=ps)


@CHECKS
@pytest.mark.parametrize("ranks", [(1,), (70, 2), (4, 4, 4, 4), (2, 3, 4, 5, 6)])
def test_ranks_and_numbers_of_members(check, ranks):
    check(18, 40, ranks)


@CHECKS
@pytest.mark.parametrize("m, k", [(1, 100), (1, 1), (64, 32), (16, 7)])
def test_shapes(check, m, k):
    check(m, k, (8, 3), ps=[0.2, 0.1])


@CHECKS
def test_adapters_of_different_dtypes(check):
    check(20, 34, (4, 6, 8), BF16, (FP32, BF16, FP16))


@CHECKS
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_strides(check, layout):
    check(21, 35, (6, 2), layouts=(layout, layout, layout), ps=[0.2, 0.0])


@pytest.mark.parametrize("check", [check_shrink, check_weight_grad])
def test_one_mask_for_all_by_request(check):
    check(21, 35, (6, 2), ps=[0.4, 0.4], shared=True)


def test_writing_without_accumulating():
    check_expand(21, 35, (6, 2, 1, 1, 3), accumulate=False)


def test_parts_of_k_and_of_the_rows():
    x, lora_As = torch.randn(3, 300), [torch.randn(4, 300), torch.randn(7, 300)]
    assert group.shrink_workspace(x, lora_As) == configs.INTERPRETER_SMS * 3 * 11
    check_shrink(3, 300, (4, 7), ps=[0.1, 0.2])
    assert group.weight_grad_workspace(torch.randn(200, 20), (4, 7)) > 0
    check_weight_grad(200, 20, (4, 7), ps=[0.1, 0.2])


def test_no_rows():
    out, grad, dx = torch.empty(0, 4), torch.full((8, 4), float("nan")), torch.empty(0, 8)
    group.group_shrink(torch.empty(0, 8), [torch.randn(4, 8)], [out])
    group.group_weight_grad(torch.empty(0, 8), [out], [grad])
    group.group_expand([out], [torch.randn(8, 4)], dx)
    assert not grad.any()


@CHECKS
def test_same_bits_on_every_run(check):
    first, second = (check(90, 70, (4, 9), ps=[0.1, 0.0]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


class TestGroup(contracts.Interpreted, contracts.Group):
    sizes = {"three": contracts.Group.sizes["three"]}  # noqa: RUF012


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 16), nn.Linear(32, 8)

    def forward(self, x):
        return torch.cat((self.q_proj(x), self.k_proj(x)), -1)


def test_a_patched_model_takes_the_kernels():
    model = Projections()
    fastlora.patch(model, r=4, init_lora_weights=False, backend="cublas", group="auto")
    x = torch.randn(9, 32, requires_grad=True)
    grouped = model(x)
    got = torch.autograd.grad(grouped.sum(), x)
    grouping.dissolve_groups(model)
    torch.testing.assert_close(grouped, model(x))
    torch.testing.assert_close(got, torch.autograd.grad(model(x).sum(), x))
