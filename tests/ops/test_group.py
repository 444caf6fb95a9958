# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false, reportArgumentType=false, reportCallIssue=false

"""`functional.lora_group` on the CPU: values against fp64, and what a group may and may not change."""

import gc
import weakref
from dataclasses import replace

import contracts
import pytest
import torch
from problems import path, through_the_function

from fastlora.functional import Adapter, GroupLayer, lora_group, lora_linear, multi_lora_linear

BF16, FP32 = torch.bfloat16, torch.float32


the_function = pytest.fixture(autouse=True)(through_the_function)


GROUP, CPU = contracts.Group(), contracts.ATEN[0]


def make(*shape, ps=(0.0, 0.0, 0.0)):
    """x (*shape, 33), and layers of ranks 5, 2 and 8."""
    case = GROUP.make(CPU, shape=shape)
    of = {name: t.requires_grad_(name in case.trained) for name, t in case.tensors.items()}
    return of["x"], GROUP.members(of, replace(case, ps=ps))


def leaves_of(x, layers):
    return [x, *(t for layer in layers for adapter in layer.adapters for t in adapter[:2])]


def gradients(outputs, leaves, used=None, **options):
    used = range(len(outputs)) if used is None else used
    dys = [torch.randn(outputs[i].shape, generator=torch.Generator().manual_seed(i)).to(outputs[i].dtype) for i in used]
    return torch.autograd.grad([outputs[i] for i in used], leaves, dys, allow_unused=True, **options)


def one_by_one(x, layers):
    return tuple(multi_lora_linear(x, layer.weight, layer.adapters, layer.bias) for layer in layers)


@pytest.mark.parametrize("used", [(0,), (2,), (1, 2), ()])
def test_unused_outputs_get_none_and_cost_nothing(used):
    x, layers = make(19)
    leaves = leaves_of(x, layers)
    outputs = lora_group(x, layers)
    if not used:
        assert torch.autograd.grad((x * 1).sum(), x)
        return
    with torch.autograd.profiler.profile() as profile:
        got = gradients(outputs, leaves, used)
    expected = gradients(one_by_one(x, layers), leaves, used)
    assert [g is None for g in got] == [g is None for g in expected]
    torch.testing.assert_close([g for g in got if g is not None], [g for g in expected if g is not None])
    products = sum(event.name in ("aten::mm", "aten::addmm_") for event in profile.function_events)
    assert products == 3 * len(used) + 2  # dB, dS, dX of each; the low-rank part of dX, and dA


def test_members_differentiated_apart():
    x, layers = make(19)
    leaves = leaves_of(x, layers)
    for order in ((0, 1, 2), (2, 0, 1)):
        outputs, apart = lora_group(x, layers), one_by_one(x, layers)
        whole = gradients(apart, leaves, retain_graph=True)
        torch.testing.assert_close(gradients(outputs, leaves, retain_graph=True), whole)
        for i in order:
            got, want = (gradients(ys, leaves, (i,), retain_graph=True) for ys in (outputs, apart))
            torch.testing.assert_close([g for g in got if g is not None], [g for g in want if g is not None])


def test_outputs_can_be_written_and_x_must_not_be():
    x, layers = make(19)
    changed = x * 1
    outputs = lora_group(changed, layers)
    outputs[1].relu_()
    torch.testing.assert_close(outputs[1], one_by_one(x, layers)[1].relu())
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


def test_autocast():
    x, layers = make(2, 9)
    with torch.autocast("cpu", dtype=BF16):
        together, apart = lora_group(x, layers), one_by_one(x, layers)
        assert {y.dtype for y in together} == {BF16}
        leaves = leaves_of(x, layers)
        got, want = gradients(together, leaves), gradients(apart, leaves)
    assert [g.dtype for g in got] == [g.dtype for g in want]
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_layers_of_every_kind_in_one_group():
    """No adapter, two that run as one, two with dropout, one: each as it would be alone."""
    x, (q, k, v) = make(19)
    _, other = make(19)
    dropping = [a._replace(dropout_p=0.4) for a in (*k.adapters, *other[1].adapters)]
    layers = [
        q._replace(adapters=[]),
        q,
        GroupLayer(v.weight, [*v.adapters, *other[2].adapters]),
        k._replace(adapters=dropping),
    ]
    torch.manual_seed(0)
    together = lora_group(x, layers)
    torch.manual_seed(0)
    torch.testing.assert_close(together, one_by_one(x, layers))


@pytest.mark.parametrize("size", ["small", "large"])
def test_one_mask_for_all_by_request(size):
    k = 33
    layers = [GroupLayer(torch.zeros(k, k), [Adapter(torch.eye(k), torch.eye(k), 1.0, 0.5)]) for _ in range(3)]
    with path("composed" if size == "small" else "function"):
        ys = lora_group(torch.ones(50, k), layers, shared_mask=True)
        assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])
        assert 0.3 < (ys[0] == 0).float().mean() < 0.7
        own = lora_group(torch.ones(50, k), layers)
        assert not torch.equal(own[0], own[1])


def test_wrong_arguments():
    x, layers = make(19, ps=(0.1, 0.2, 0.1))
    with pytest.raises(ValueError, match=r"lora_group: shared_mask: got dropout probabilities \[0.1, 0.2\]"):
        lora_group(x, layers, shared_mask=True)
    with pytest.raises(ValueError, match="lora_group: shapes: got x"):
        lora_group(x[:, 1:], layers)
    with pytest.raises(ValueError, match="want one dtype"):
        lora_group(x.to(BF16), layers)
    assert lora_group(x, []) == ()


def test_under_torch_func_and_compile():
    x, layers = make(19)
    loss = lambda x, run: sum(y.square().sum() for y in run(x, layers))  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x, lora_group), torch.func.grad(loss)(x, one_by_one))
    compiled = torch.compile(lora_group, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, layers), one_by_one(x, layers))


def test_x_is_saved_once():
    x, layers = make(64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_group(x, layers)
    assert sum(t.shape == x.shape for t in saved) == 1
    rest = sum(t.numel() for t in saved if t.shape != x.shape and not any(t is la.weight for la in layers))
    assert rest == sum(64 * r for r in (5, 2, 8)) + sum(la.adapters[0].lora_B.numel() for la in layers)


def test_nothing_is_kept_alive():
    x, layers = make(19)
    hidden = x * 1
    alive = weakref.ref(hidden)
    outputs = lora_group(hidden, layers)
    del hidden
    torch.cat(outputs, dim=1).sum().backward()
    del outputs
    gc.collect()
    assert alive() is None


def test_small_x_runs_one_by_one():
    x, layers = make(19)
    with path("composed"):
        for y, layer in zip(lora_group(x, layers), layers, strict=True):
            ((a, b, scaling, *_),) = layer.adapters
            assert torch.equal(y, lora_linear(x, layer.weight, a, b, scaling, layer.bias))


class TestGroup(contracts.Group):
    @pytest.mark.parametrize("shared", [False, True])
    def test_one_mask_for_all_has_right_gradients(self, place, shared):
        case = replace(self.make(place), ps=(0.5,) * 3)
        torch.manual_seed(7)
        got = self.outcome(lambda of: self.op(of, case, shared_mask=shared), case.tensors, case.trained)
        torch.manual_seed(7)
        masks = self.masks(case, place)
        keeps = masks[:1] * 3 if shared else masks
        wide = {name: t.double() for name, t in case.tensors.items()}
        want = self.outcome(lambda of: self.specification(of, case, keeps), wide, case.trained)
        for name, value in got.items():
            torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-5)
