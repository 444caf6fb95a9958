"""`functional.dora_linear` and DoRA in a layer: against the paper's equations in fp64, and eager PyTorch in the same
dtype."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import contracts
import peft
import pytest
import torch
import torch.nn.functional as F
from problems import Problem, make_problem, path
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from bench.harness.memory import allocations_of
from fastlora import FusedLoraLinear
from fastlora.functional import Adapter, GroupLayer, dora_linear, lora_group, lora_mixed_batch, multi_lora_linear
from fastlora.ops import reference
from fastlora.ops.dora import aten as dora_aten
from fastlora.ops.dora import dora as dora_op

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")


def magnitude_of(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return (torch.rand(problem.weight.shape[0], generator=generator) + 0.5).to(problem.lora_A.dtype)


def run(
    problem: Problem,
    function: Callable[..., Tensor],
    trained: tuple[str, ...] = NAMES,
    magnitude: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """{"y": output, name: gradient}."""
    values: dict[str, Any] = {name: getattr(problem, name) for name in NAMES[:-1]}
    values["magnitude"] = magnitude_of(problem) if magnitude is None else magnitude.to(problem.lora_A.dtype)
    trained = tuple(name for name in trained if values[name] is not None)
    x, weight, bias, a, b, m = (
        None if value is None else value.detach().clone().requires_grad_(name in trained)
        for name, value in values.items()
    )
    y = function(x, weight, a, b, m, problem.scaling, bias, problem.dropout_p, **options)
    leaves: dict[str, Any] = dict(zip(NAMES, (x, weight, bias, a, b, m), strict=True))
    grads = torch.autograd.grad(y, [leaves[name] for name in trained], problem.dy) if trained else []
    return {"y": y.detach(), **dict(zip(trained, grads, strict=True))}


# The function.
def test_the_reference_is_the_papers_equation():
    """Equation 5 with V = W0, and its gradients (equation 11) with the norm held constant, written out by hand."""
    p = make_problem(6, 20, dtype=FP64)
    m, s = magnitude_of(p), p.scaling
    assert p.bias is not None
    v = p.weight + s * p.lora_B @ p.lora_A
    norm = v.norm(dim=1, keepdim=True)
    merged = m[:, None] * v / norm
    got = run(p, reference.dora_linear)
    torch.testing.assert_close(got["y"], p.x @ merged.t() + p.bias)
    gradient = p.dy.t() @ p.x  # of the merged weight
    through = m[:, None] / norm * gradient
    torch.testing.assert_close(got["weight"], through)
    torch.testing.assert_close(got["lora_A"], s * p.lora_B.t() @ through)
    torch.testing.assert_close(got["lora_B"], s * through @ p.lora_A.t())
    torch.testing.assert_close(got["magnitude"], (gradient * v / norm).sum(1))
    torch.testing.assert_close(got["x"], p.dy @ merged)
    torch.testing.assert_close(got["bias"], p.dy.sum(0))


def test_everything_dropped():
    p = make_problem(8, 20, dropout_p=1.0)
    torch.testing.assert_close(run(p, dora_linear, ())["y"], F.linear(p.x, p.weight, p.bias))


@pytest.mark.parametrize("size", [(7, 40), (700, 512)], ids=["composed", "fused"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_row_of_zeros_gives_the_bias_and_finite_gradients(size, dropout_p):
    """Of pruned or padded weights: 0/0 was NaN from the first step."""
    n, k = 20, size[1]
    weight, x = torch.randn(n, k), torch.randn(*size, requires_grad=True)
    weight[3] = weight[11] = 0
    a, b, bias = torch.randn(4, k, requires_grad=True), torch.randn(n, 4), torch.randn(n)
    b[3] = b[11] = 0
    b.requires_grad_()
    m = torch.linalg.vector_norm(weight + 0.5 * b.detach() @ a.detach(), dim=1)
    m[11] = 2.0  # a magnitude without a direction
    m.requires_grad_()
    y = fastlora.functional.dora_linear(x, weight, a, b, m, 0.5, bias, dropout_p)
    y.square().sum().backward()
    assert torch.equal(y[:, [3, 11]], bias[[3, 11]].expand(len(y), 2))
    for tensor in (x, a, b, m):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all() and tensor.grad.any()
    assert m.grad is not None and not m.grad[[3, 11]].any()
    if dropout_p == 0:
        rows = [i for i in range(n) if i not in (3, 11)]
        want = F.linear(x, weight + 0.5 * b @ a, bias)  # m is the norm
        assert torch.allclose(y[:, rows], want[:, rows], atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_layers_with_rows_of_zeros_train(kind):
    model: Any = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    with torch.no_grad():
        model[0].weight[::3] = 0
    want = model(torch.ones(3, 16))
    if kind == "peft":
        config = peft.LoraConfig(r=2, use_dora=True, target_modules=["0", "1"])
        model = peft.get_peft_model(model, config)
        fastlora.patch(model)
    else:
        fastlora.patch(model, r=2, use_dora=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    assert torch.allclose(model(torch.ones(3, 16)), want, atol=1e-5)
    for _ in range(3):
        model(torch.randn(5, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    y = model(torch.ones(3, 16))
    assert torch.isfinite(y).all() and not torch.equal(y, want)
    if kind == "plain":
        fastlora.merge(model)
        assert torch.allclose(model(torch.ones(3, 16)), y, atol=1e-5)


@pytest.mark.parametrize("rows", [5, 3000], ids=["at once", "in chunks"])
@pytest.mark.parametrize("value", [1e-30, 1e-22, 1e22, 1e30])
def test_norms_whose_squares_are_no_float32(value, rows):
    weight = torch.randn(rows, 130) * value
    a, b = torch.randn(4, 130), torch.zeros(rows, 4)
    got = dora_aten.weight_norm(weight, a, b, 1.0)
    assert torch.allclose(got.double() / value, weight.double().norm(dim=1) / value, rtol=1e-6)
    mixed = torch.tensor([[0.0] * 130, [value] + [0.0] * 129, [1.0] * 130])
    assert torch.allclose(
        dora_aten.weight_norm(mixed, a, b[:1].expand(3, 4), 1.0), torch.tensor([0.0, value, 130**0.5])
    )


def test_nothing_of_the_weights_size_is_made():
    """PEFT makes four such matrices a call."""
    k = n = 1024
    x, a, b = torch.randn(4, k), torch.randn(8, k, requires_grad=True), torch.randn(n, 8, requires_grad=True)
    weight, m = torch.randn(n, k), torch.ones(n, requires_grad=True)
    _, allocations = allocations_of(lambda: dora_linear(x, weight, a, b, m, 1.0).sum().backward())
    assert max(allocations.sizes) <= 4 * dora_aten.CHUNK < n * k * 4 / 3


def test_saved_for_the_backward_pass():
    """x, S and z: of PEFT's form the frozen output, the low-rank one and both their products with the scale."""

    def saved(function):
        p = make_problem(64, 80, n=90, r=4, bias=False)
        leaves = [t.requires_grad_() for t in (p.lora_A, p.lora_B, magnitude_of(p))]
        owned = {t.data_ptr() for t in (p.weight, *leaves)}
        found: dict[int, int] = {}

        def pack(t):
            if t.data_ptr() not in owned:
                found[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), path("function"):
            y = function(p.x, p.weight, *leaves, p.scaling)
        assert y.requires_grad
        return sum(found.values())

    small = 4 * (90 + 80)  # norms, scales
    assert saved(dora_linear) <= 64 * (80 + 4 + 90) + small < saved(reference.dora_linear) - 64 * 80


def test_autocast():
    p = make_problem(6, 20)
    m = magnitude_of(p)
    assert p.bias is not None
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(p.x, p.weight, p.lora_A, p.lora_B, m, p.scaling, p.bias)
    assert y.dtype == BF16
    cast = [t.to(BF16) for t in (p.x, p.weight, p.lora_A, p.lora_B)]
    # The norms are those of the weight itself, so that a fresh layer's output stays the base layer's.
    norm = (p.weight + p.scaling * p.lora_B @ p.lora_A).norm(dim=1)
    want = m / norm * (F.linear(cast[0], cast[1]) + p.scaling * F.linear(F.linear(cast[0], cast[2]), cast[3])) + p.bias
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)


def test_torch_func_takes_the_reference():
    p = make_problem(6, 20)
    m = magnitude_of(p)
    grad = torch.func.grad(lambda a: dora_linear(p.x, p.weight, a, p.lora_B, m, p.scaling).square().sum())(p.lora_A)
    a = p.lora_A.clone().requires_grad_()
    reference.dora_linear(p.x, p.weight, a, p.lora_B, m, p.scaling).square().sum().backward()
    torch.testing.assert_close(grad, a.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"magnitude": torch.ones(46)}, r"magnitude: got \(46,\) torch.float32 on cpu, want .* \(47,\) on cpu"),
        ({"magnitude": torch.ones(47, dtype=torch.int64)}, "want floating-point"),
        ({"lora_A": torch.ones(5, 21)}, "dora_linear: shapes"),
        ({"dropout_p": 1.5}, "probability in"),
    ],
)
def test_bad_input(change, message):
    p = make_problem(6, 20)
    arguments = {"x": p.x, "weight": p.weight, "lora_A": p.lora_A, "lora_B": p.lora_B, "scaling": 1.0}
    with pytest.raises(ValueError, match=message):
        dora_linear(**{**arguments, "magnitude": magnitude_of(p), **change})


def test_where_a_magnitude_has_no_meaning():
    p = make_problem(2, 3, 20)
    adapter = Adapter(p.lora_A, p.lora_B, 1.0, 0.0, magnitude_of(p))
    with pytest.raises(ValueError, match="magnitude"):
        lora_mixed_batch(p.x, p.weight, [adapter], [0, -1])
    layer = GroupLayer(p.weight, [adapter])
    with pytest.raises(ValueError, match="shared_mask: got True and an adapter with a magnitude"):
        lora_group(p.x, [layer, layer], shared_mask=True)
    alone = multi_lora_linear(p.x, p.weight, [adapter])
    assert all(torch.equal(y, alone) for y in lora_group(p.x, [layer, layer]))


def test_several_adapters_each_add_their_difference():
    """LoRA beside two DoRAs: the merged weights' differences from W0 add up, in any order."""
    p, q = make_problem(7, 20, dtype=FP64), make_problem(7, 20, r=3, dtype=FP64, seed=1)
    m = magnitude_of(p)
    adapters = [
        Adapter(p.lora_A, p.lora_B, 1.5, 0.0, m),
        Adapter(q.lora_A, q.lora_B, 0.5),
        Adapter(q.lora_A, q.lora_B, 2.0, 0.0, 2 * m),
    ]
    delta = adapters[1].scaling * q.lora_B @ q.lora_A
    for adapter in (adapters[0], adapters[2]):
        v = p.weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
        assert adapter.magnitude is not None
        delta += (adapter.magnitude / v.norm(dim=1))[:, None] * v - p.weight
    want = F.linear(p.x, p.weight + delta, p.bias)
    for order in (adapters, adapters[::-1]):
        torch.testing.assert_close(multi_lora_linear(p.x, p.weight, order, p.bias), want)


# The layer.
def layer_of(dtype: torch.dtype = FP32, **settings: Any) -> FusedLoraLinear:
    torch.manual_seed(0)
    layer = FusedLoraLinear.from_linear(nn.Linear(24, 30, dtype=dtype), r=4, use_dora=True, **settings)
    return layer


def randomise(layer: FusedLoraLinear, name: str = "default") -> FusedLoraLinear:
    with torch.no_grad():
        layer.lora_B[name].normal_()
        if name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].mul_(torch.rand(30) + 0.5)
    return layer


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_a_fresh_layer_gives_the_base_layers_output(dtype, init):
    base = nn.Linear(24, 30, dtype=dtype)
    x = torch.randn(5, 24, dtype=dtype)
    layer = FusedLoraLinear.from_linear(base, r=4, use_dora=True, init_lora_weights=init)
    # "orthogonal" is drawn in float32, as in PEFT: there B A is zero to its rounding in any dtype.
    rtol, atol = (1.3e-6, 1e-5) if init == "orthogonal" or dtype == FP32 else (1e-7, 1e-7)
    torch.testing.assert_close(layer(x), base(x), rtol=rtol, atol=atol)
    assert layer.use_dora == {"default": True}
    assert "DoRA" in repr(layer)


def test_a_bf16_layer_keeps_its_magnitudes_in_fp32():
    layer = layer_of(BF16)
    assert layer.lora_magnitude_vector["default"].dtype == FP32
    x = torch.randn(5, 24, dtype=BF16)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32, FP64])
def test_casting_a_model_leaves_the_magnitudes_in_fp32_at_least(dtype):
    layer, twin = randomise(layer_of()), randomise(layer_of())
    magnitude = layer.lora_magnitude_vector["default"]
    values = magnitude.detach().clone()
    wide = torch.promote_types(dtype, FP32)
    nn.Sequential(layer).to(dtype)
    assert layer.lora_magnitude_vector["default"] is magnitude and magnitude.requires_grad
    assert magnitude.dtype == wide and layer.lora_A["default"].dtype == layer.weight.dtype == dtype
    assert torch.equal(magnitude, values.to(wide))
    assert torch.equal(copy.deepcopy(layer).half().lora_magnitude_vector["default"], values)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.lora_magnitude_vector["default"], values)


@pytest.mark.parametrize("conv1d", [False, True])
def test_added_and_reset_beside_a_merged_adapter(conv1d):
    """The magnitudes are the norms of the weight that is there when nothing is merged."""
    linear = pytest.importorskip("transformers").pytorch_utils.Conv1D(30, 24) if conv1d else nn.Linear(24, 30)
    base: Any = nn.Sequential(linear)
    model, x = copy.deepcopy(base), torch.randn(5, 24)
    fastlora.patch(model, r=4, init_lora_weights=False)
    fastlora.patch(model, r=4, adapter_name="old", use_dora=True, init_lora_weights=False)
    fastlora.patch(model, r=4, adapter_name="reset", use_dora=True, init_lora_weights=False)
    layer = model[0]
    delta = layer.get_delta_weight("old")
    fastlora.merge(model)
    fastlora.patch(model, r=4, adapter_name="new", use_dora=True)
    layer.reset_adapter("reset")
    torch.testing.assert_close(layer.get_delta_weight("old"), delta)
    torch.testing.assert_close(layer.get_delta_weight("new"), torch.zeros_like(delta), rtol=0, atol=1e-6)
    fastlora.unmerge(model)
    for name in ("new", "reset"):
        fastlora.set_adapter(model, name)
        torch.testing.assert_close(model(x), base(x))
    fastlora.set_adapter(model, "old")
    fastlora.merge(model)
    torch.testing.assert_close(layer.get_delta_weight("old"), delta)


@pytest.mark.parametrize("dtype, tolerance", [(FP64, 1e-7), (BF16, 2e-2)])
def test_lora_and_dora_merge_together(dtype, tolerance):
    layer = randomise(layer_of(dtype))
    layer.add_adapter("plain", r=3)
    randomise(layer, "plain")
    layer.set_adapter(["default", "plain"])
    x, bits = torch.randn(5, 24, dtype=dtype), layer.weight.detach().clone()
    apart = layer(x)
    layer.merge()
    assert (layer(x) - apart).norm() <= tolerance * apart.norm()
    layer.unmerge()
    assert torch.equal(layer.weight, bits) and torch.equal(layer(x), apart)


def test_reset_measures_the_weight_anew():
    layer = layer_of()
    with torch.no_grad():
        layer.weight.mul_(3.0)
    layer.reset_adapter("default")
    torch.testing.assert_close(layer.lora_magnitude_vector["default"], layer.weight.norm(dim=1))


def test_patch():
    model = nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 3))
    x = torch.randn(5, 24)
    y = model(x)
    assert fastlora.patch(model, r=4, use_dora=True).patched == ["0", "2"]
    assert torch.equal(model(x), y)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{i}.{part}.default" for i in "02" for part in ("lora_A", "lora_B", "lora_magnitude_vector")}
    fastlora.patch(model, r=4, use_dora=True)  # does nothing
    with pytest.raises(
        ValueError, match="use_dora: got False, but '0' already has an adapter 'default' with use_dora=True"
    ):
        fastlora.patch(model, r=4)
    with pytest.raises(ValueError, match="magnitude"), fastlora.adapter_names(model, ["default"] * 5):
        model(x)
    fastlora.unpatch(model)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kinds", [{"use_dora": 1}, {"use_dora": True, "use_adalora": True}])
def test_kinds_that_do_not_exist(kinds):
    with pytest.raises(ValueError, match="use_dora"):
        fastlora.patch(nn.Sequential(nn.Linear(4, 4)), **kinds)


@pytest.mark.parametrize("base", ["exact", "offset"])
def test_lora_ga_starts_dora_too(base):
    """At the start m/n is 1: the gradients of A and B are LoRA's, and so is the best start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 20)).double()
    x = torch.randn(8, 24, dtype=FP64)
    y = model(x).detach()
    fastlora.patch(model, r=2, use_dora=True)
    with fastlora.GradientSketch(model, r=2) as sketch:
        model(x).square().sum().backward()
    fastlora.init_lora_ga(model, sketch, base=base)
    torch.testing.assert_close(model(x), y)
    assert model[0].lora_B["default"].any()  # type: ignore[union-attr]
    fastlora.unpatch(model)
    assert torch.equal(model(x), y)


# Norms that are kept.
@pytest.fixture
def norms_made(monkeypatch) -> list[int]:
    made: list[int] = []
    original = dora_aten.weight_norm
    monkeypatch.setattr(dora_aten, "weight_norm", lambda *a: made.append(1) or original(*a))
    return made


def test_norms_are_made_at_every_call_and_kept_only_on_request(norms_made):
    model = nn.Sequential(randomise(layer_of()))
    x = torch.randn(5, 24)
    norms_made.clear()
    with torch.no_grad():
        model(x)
        model(x)
        assert len(norms_made) == 2
        with fastlora.variants.kept_norms(model):
            y = model(x)
            assert torch.equal(model(x), y)
            assert len(norms_made) == 3
            with torch.enable_grad():
                model(x)
            assert len(norms_made) == 4
            copied = copy.deepcopy(model)
        model(x)
    assert len(norms_made) == 5
    assert torch.equal(copied(x), y)


@pytest.mark.parametrize(
    "change", ["scale", "in place", "swapped", "swapped twice", "optimiser", "loaded", "dtype", "merged"]
)
def test_a_kept_norm_is_never_stale(change):
    layer = randomise(layer_of())
    model = nn.Sequential(layer)
    x = torch.randn(5, 24)
    weight, a = layer.weight, layer.lora_A["default"]

    def do() -> None:
        if change == "scale":
            layer.scaling["default"] = 3.0
        elif change == "in place":
            weight.mul_(2.0)
        elif change == "swapped":
            a.data = torch.randn_like(a)
        elif change == "swapped twice":  # the allocator may give the first one's memory to the last
            a.data = torch.randn_like(a)
            a.data = torch.randn_like(a)
        elif change == "optimiser":
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        elif change == "loaded":
            layer.load_state_dict({key: value * 1.5 for key, value in layer.state_dict().items()})
        elif change == "dtype":
            model.to(BF16)
            model.float()
        else:
            fastlora.merge(model)
            fastlora.unmerge(model)

    with torch.no_grad(), fastlora.variants.kept_norms(model):
        model(x)
        do()
        kept = model(x)
    with torch.no_grad():
        assert torch.equal(kept, model(x))


def test_kept_norms_of_what_is_no_model():
    with pytest.raises(ValueError, match="kept_norms: model: got int"), fastlora.variants.kept_norms(3):  # type: ignore[arg-type]
        pass


# torch.compile.
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled(dropout_p):
    torch._dynamo.reset()
    p = make_problem(3, 11, 33, dropout_p=dropout_p)
    with path("function"):
        torch.manual_seed(7)
        want = run(p, dora_linear)
        torch.manual_seed(7)
        got = run(p, torch.compile(dora_linear, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_norms_under_autocast(backend):
    torch._dynamo.reset()
    p = make_problem(1, 20)
    compiled = torch.compile(dora_op.weight_norm, backend=backend)
    with torch.autocast("cpu", dtype=BF16):
        got = compiled(p.weight, p.lora_A, p.lora_B, 1.5)
    want = (p.weight.double() + 1.5 * p.lora_B.double() @ p.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_a_changing_scale_is_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(dora_linear, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for scaling in (2.0, 0.75, 3.0, 1.25):
        p = make_problem(6, 20, scaling=scaling)
        torch.testing.assert_close(run(p, function, ())["y"], run(p, dora_linear, ())["y"])
        frames.append(counter.frame_count)
    assert frames[-1] == frames[1] <= 2


def test_the_op():
    p = make_problem(1, 20, dtype=BF16, adapter_dtype=FP32)
    arguments = (p.weight, p.lora_A, p.lora_B, 1.5, "auto")
    torch.library.opcheck(torch.ops.fastlora.dora_weight_norm.default, arguments)
    torch.library.opcheck(torch.ops.fastlora.dora_weight_norm_any_scale.default, arguments)
    assert math.isclose(
        torch.ops.fastlora.dora_weight_norm(*arguments)[0].item(),
        (p.weight.double() + 1.5 * p.lora_B.double() @ p.lora_A.double()).norm(dim=1)[0].item(),
        rel_tol=1e-5,
    )


class TestDora(contracts.Dora):
    def test_in_double(self, place):
        case = self.make(place, (FP64, FP64))
        got = self.run(case, place)
        want = self.outcome(lambda of: self.specification(of, case, [None]), case.tensors, case.trained)
        torch.testing.assert_close(got, want)
