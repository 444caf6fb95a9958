# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOperatorIssue=false

"""`lora_group` and grouped layers on the Triton kernels, interpreted: against fp64, and the group's self-check."""

import pytest
import torch
from numerics import assert_close_to_fp64
from problems import path
from torch import nn

import fastlora
from fastlora.functional import Adapter, GroupLayer, lora_group
from fastlora.kernels import dropout as kernels_dropout
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.layers import group as grouping
from fastlora.ops.group import group as group_op
from fastlora.ops.group import triton as group_triton
from fastlora.ops.lora import choice

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def groups_of_every_size():
    with path("function"):
        yield
    choice.reset()


def draw(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


@pytest.mark.parametrize("backend", ["cublas", "triton"])
@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.5)], ids=["no dropout", "dropout"])
def test_outputs_and_gradients(backend, ps, monkeypatch):
    torch.manual_seed(0)
    m, k, sizes, ranks = 19, 40, (33, 8, 8), (4, 6, 3)
    x = draw(m, k, dtype=BF16).requires_grad_()
    layers = [
        GroupLayer(
            draw(n, k, dtype=BF16, scale=k**-0.5),
            [Adapter(draw(r, k, scale=k**-0.5).requires_grad_(), draw(n, r, scale=r**-0.5).requires_grad_(), 1.5, p)],
            draw(n, dtype=BF16),
        )
        for n, r, p in zip(sizes, ranks, ps)
    ]
    seeds = []
    new_seed = kernels_dropout.new_seed
    monkeypatch.setattr(group_triton, "new_seed", lambda device: seeds.append(new_seed(device)) or seeds[-1])
    outputs = lora_group(x, layers, backend=backend)
    leaves = [x, *(t for layer in layers for t in layer.adapters[0][:2])]
    dys = [draw(m, n, dtype=BF16) for n in sizes]
    got = torch.autograd.grad(outputs, leaves, dys)
    assert len(seeds) == sum(p > 0 for p in ps)

    drawn = iter(seeds)
    masks = [
        reference_keep_mask(next(drawn), m, k, p).double() * threshold_and_scale(p)[1] if p else torch.ones(m, k)
        for p in ps
    ]
    results = {}
    for dtype in (torch.float64, BF16):
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        ys = []
        for i, layer in enumerate(layers):
            a, b = copies[1 + 2 * i], copies[2 + 2 * i]
            s = (copies[0] * masks[i].to(dtype)) @ a.t()
            ys.append(copies[0] @ layer.weight.to(dtype).t() + layer.bias.to(dtype) + 1.5 * (s @ b.t()))
        results[dtype] = (*ys, *torch.autograd.grad(ys, copies, [dy.to(dtype) for dy in dys]))
    for name, value, exact, eager in zip(
        ["y"] * 3 + ["dX"] + ["dA", "dB"] * 3, (*outputs, *got), results[torch.float64], results[BF16]
    ):
        assert_close_to_fp64(value.detach(), exact.detach(), eager.detach().to(value.dtype), name)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_self_check_passes_and_sees_a_wrong_kernel(dropout, monkeypatch):
    check = lambda: group_op.self_check(group_triton, torch.device("cpu"), BF16, FP32, dropout)  # noqa: E731
    assert check() is None
    monkeypatch.setattr(group_triton.group, "group_expand", lambda *args, **kwargs: None)
    assert "dX differs" in check()


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 16), nn.Linear(32, 8)

    def forward(self, x):
        return torch.cat((self.q_proj(x), self.k_proj(x)), -1)


def test_a_patched_model_takes_the_kernels():
    torch.manual_seed(0)
    model = Projections()
    fastlora.patch(model, r=4, init_lora_weights=False, backend="cublas", group="auto")
    x = torch.randn(9, 32, requires_grad=True)
    grouped = model(x)
    got = torch.autograd.grad(grouped.sum(), x)
    grouping.dissolve_groups(model)
    torch.testing.assert_close(grouped, model(x))
    torch.testing.assert_close(got, torch.autograd.grad(model(x).sum(), x))
