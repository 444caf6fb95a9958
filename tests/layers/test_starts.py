"""Initialisations that need no data: against their definitions in float64, against PEFT's on the same weights, and back
out of the model, bit for bit."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from model_state import ModelState
from plain_models import LINEARS, Net, Tied
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import FusedLoraLinear
from fastlora.layers import starts

SHIFTING = ["pissa", "pissa_niter_16", "olora"]
N, K, R = 40, 30, 4


def weight_with_spectrum(
    n: int, m: int, decay: float = 0.7, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(n, m) with singular values decay^i: well apart, so that each triplet is determined up to its sign."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(n, min(n, m), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(m, min(n, m), generator=generator, dtype=torch.float64))[0]
    return (u * decay ** torch.arange(min(n, m)).double() @ v.t()).to(dtype)


def linear(n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(k, n)
    with torch.no_grad():
        made.weight.copy_(weight_with_spectrum(n, k))
    return made.to(dtype)


def product(layer: FusedLoraLinear, name: str = "default") -> Tensor:
    """s·B A in float64."""
    return (layer.scaling[name] * layer.lora_B[name].double() @ layer.lora_A[name].double()).detach()


def inputs() -> Tensor:
    return torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))


# Against the definitions.
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("n, m, r", [(40, 30, 4), (30, 40, 4), (30, 30, 30), (1, 9, 1), (96, 80, 2)])
def test_pissa_is_the_leading_part_by_svd(n, m, r, use_rslora):
    base = linear(n, m)
    layer = FusedLoraLinear.from_linear(base, r=r, lora_alpha=6, use_rslora=use_rslora, init_lora_weights="pissa")
    s = 6 / (math.sqrt(r) if use_rslora else r)
    u, sigma, vh = torch.linalg.svd(base.weight.double(), full_matrices=False)
    leading = (u[:, :r] * sigma[:r]) @ vh[:r]
    torch.testing.assert_close(product(layer), leading, rtol=0, atol=2e-6)
    torch.testing.assert_close(layer.weight.double(), base.weight.double() - leading, rtol=0, atol=2e-6)
    # A's rows and B's columns share the singular values equally.
    root = (sigma[:r] / s).sqrt()
    torch.testing.assert_close(layer.lora_A["default"].double().norm(dim=1), root, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(layer.lora_B["default"].double().norm(dim=0), root, rtol=1e-4, atol=2e-4)


def test_pissa_beyond_the_full_decomposition_s_reach():
    """200×180 at r = 4: found by Lanczos steps, and as good as LAPACK's; Gaussian, where the spectrum is flat, too."""
    torch.manual_seed(0)
    for weight in (weight_with_spectrum(200, 180, decay=0.9), torch.randn(200, 180)):
        a, b = starts.from_weight(weight, 4, 2.0, "pissa")
        u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        leading = (u[:, :4] * sigma[:4]) @ vh[:4]
        assert (2 * b.double() @ a.double() - leading).norm() < 1e-4 * leading.norm()
        whole = starts.from_weight(weight, 4, 2.0, "pissa", whole=True)
        torch.testing.assert_close(whole[1] @ whole[0], b @ a, rtol=0, atol=1e-4 * sigma[0].item())


def test_a_few_iterations_come_close():
    weight = weight_with_spectrum(200, 180, decay=0.95)
    sigma = torch.linalg.svdvals(weight.double())
    best = sigma[4:].norm().item()
    errors = []
    for iterations in (0, 1, 4):
        a, b = starts.from_weight(weight, 4, 1.0, f"pissa_niter_{iterations}")
        errors.append((weight.double() - b.double() @ a.double()).norm().item() / best)
    assert errors[0] > errors[1] > errors[2] >= 1 - 1e-6
    assert errors[2] < 1.001


@pytest.mark.parametrize("n, m, r", [(40, 30, 4), (30, 40, 4), (12, 12, 12), (12, 9, 9), (9, 12, 9)])
def test_olora_is_the_leading_part_by_qr(n, m, r):
    base = linear(n, m)
    layer = FusedLoraLinear.from_linear(base, r=r, lora_alpha=6, init_lora_weights="olora")
    q, upper = torch.linalg.qr(base.weight.double())
    torch.testing.assert_close(layer.lora_B["default"].double(), q[:, :r], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.lora_A["default"].double(), upper[:r], rtol=0, atol=1e-6)
    residual = base.weight.double() - 6 / r * q[:, :r] @ upper[:r]
    torch.testing.assert_close(layer.weight.double(), residual, rtol=0, atol=1e-5)


def test_orthogonal_starts_at_zero_with_neither_factor_zero():
    layer = FusedLoraLinear(K, N, r=6, init_lora_weights="orthogonal")
    a, b = layer.lora_A["default"].double(), layer.lora_B["default"].double()
    assert (b @ a).norm() < 1e-6 * b.norm() * a.norm() and min(a.norm(), b.norm()) > 0.1
    assert torch.linalg.matrix_rank(a, rtol=1e-5) == torch.linalg.matrix_rank(b, rtol=1e-5) == 3


def test_the_weight_s_starts_do_not_depend_on_the_generator():
    for init in SHIFTING:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = starts.from_weight(weight_with_spectrum(200, 180), 4, 1.0, init)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        second = starts.from_weight(weight_with_spectrum(200, 180), 4, 1.0, init)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("init", SHIFTING)
def test_autocast_and_inference_mode_change_nothing(init):
    plain = FusedLoraLinear.from_linear(linear(), r=R, init_lora_weights=init)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = FusedLoraLinear.from_linear(linear(), r=R, init_lora_weights=init)
    base = linear()
    with torch.inference_mode():
        fastlora.patch(nn.Sequential(base), r=R, init_lora_weights=init)
    for layer in (cast, base):
        assert isinstance(layer, FusedLoraLinear)
        for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs) and not mine.is_inference()


# In a model.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [*SHIFTING, "orthogonal", "gaussian", "Gaussian", "OLoRA", True])
def test_the_first_output_is_the_base_models_and_unpatch_restores_its_bits(init, dtype):
    model = Net().to(dtype)
    before, state = model(inputs().to(dtype)).double(), ModelState(model)
    fastlora.patch(model, r=2, lora_alpha=3, target_modules=LINEARS, init_lora_weights=init)
    shifted = starts.shifts_weight(init)
    for name in LINEARS:
        layer = model.get_submodule(name)
        assert isinstance(layer, FusedLoraLinear)
        assert layer.lora_A["default"].dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
        assert layer.lora_A["default"].requires_grad and not layer.weight.requires_grad
        assert layer.weight.dtype == dtype and (layer.shifted_by == "default") == shifted
    error = (model(inputs().to(dtype)).double() - before).norm() / before.norm()
    eps = torch.finfo(dtype).eps
    assert error < 8 * eps + 1e-6 * (init == "orthogonal")
    fastlora.unpatch(model)
    state.assert_unchanged()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_other_adapters_and_starting_anew(init):
    torch.manual_seed(0)
    layer = FusedLoraLinear.from_linear(linear(), r=R)
    bits = layer.weight.detach().clone()
    x = torch.randn(3, K)
    before = layer(x).detach()
    with pytest.warns(
        UserWarning, match=r"adapter 'second' moves a part of the weight.*\['default'\] will run on what"
    ):
        layer.add_adapter("second", r=2, init_lora_weights=init)
    layer.set_adapter("second")
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="adapter 'second' has moved a part of the weight.*'third' will run on what"):
        layer.add_adapter("third")
    state = ModelState(layer)
    with pytest.raises(ValueError, match="adapter 'second' has shifted this weight already; delete it first"):
        layer.reset_adapter("default", "pissa")
    state.assert_unchanged()
    with torch.no_grad():
        layer.lora_B["third"].normal_()
    layer.set_adapter("third")
    layer.merge()
    for call in (lambda: layer.reset_adapter("second"), lambda: layer.delete_adapter("second")):
        with pytest.raises(ValueError, match=r"adapters \['third'\] are merged; call fastlora.unmerge"):
            call()
    layer.unmerge()
    layer.set_adapter("second")
    with torch.no_grad():
        layer.lora_A["second"].zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.reset_adapter("second", init)  # from the original weight, not from what is left of it
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)
    layer.reset_adapter("second")
    assert torch.equal(layer.weight, bits) and not layer.lora_A0 and layer.shifted_by is None
    layer.delete_adapter("second")
    assert torch.equal(layer.weight, bits)


def test_new_parameters_are_not_overwritten_by_old_bits():
    layer = FusedLoraLinear(K, N, r=R, init_lora_weights="pissa")
    old = layer.unshifted_weight("default").clone()
    layer.reset_parameters()
    assert layer.shifted_by is None and not torch.equal(layer.weight, old)
    assert not layer.lora_B["default"].any()


def test_from_linear_leaves_the_linear_layer_alone():
    base = linear()
    bits = base.weight.detach().clone()
    layer = FusedLoraLinear.from_linear(base, r=R, init_lora_weights="pissa")
    assert torch.equal(base.weight, bits) and layer.bias is base.bias
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-5)


# What cannot start.
def spoilt(model: Any, value: float) -> Any:
    with torch.no_grad():
        model.blocks[1].conv.weight[1, 1] = value
    return model


def with_a_zero_weight(model: Any) -> Any:
    nn.init.zeros_(model.blocks[1].conv.weight)
    return model


@pytest.mark.filterwarnings("ignore:fastlora. adapter 'second' moves a part of the weight")
@pytest.mark.parametrize("init", SHIFTING)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: spoilt(m, math.nan), r"patch: 'blocks.1.conv': .*weight: it has NaN or infinite entries"),
        (lambda m: spoilt(m, math.inf), r"patch: 'blocks.1.conv': .*weight: it has NaN or infinite entries"),
        (with_a_zero_weight, r"patch: 'blocks.1.conv': .*weight: it is zero everywhere"),
        (lambda m: m.to("meta"), r"patch: 'blocks.0.up': .*weight: it is on the meta device"),
    ],
    ids=["nan", "inf", "zero", "meta"],
)
def test_weights_that_give_no_start_leave_the_model_as_it_was(init, change, message):
    """The fifth layer fails, after four have been shifted."""
    model = change(Net())
    meta = next(model.parameters()).is_meta
    state = None if meta else ModelState(model)
    with pytest.raises(ValueError, match=message):
        fastlora.patch(model, r=2, init_lora_weights=init)
    if state is None:
        assert not fastlora.is_patched(model)
        return
    state.assert_unchanged()
    fastlora.patch(model, r=2)
    patched = ModelState(model)
    with pytest.raises(ValueError, match=message):
        fastlora.patch(model, r=2, adapter_name="second", init_lora_weights=init)
    patched.assert_unchanged()


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_around_the_shift_of_the_third_layer(monkeypatch, failure, when):
    model = Net()
    state = ModelState(model)
    set_initial_factors, calls = FusedLoraLinear.set_initial_factors, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3 and when == "before":
            raise failure
        set_initial_factors(self, *args, **kwargs)
        if len(calls) == 3:
            raise failure

    monkeypatch.setattr(FusedLoraLinear, "set_initial_factors", failing)
    with pytest.raises(failure):
        fastlora.patch(model, r=2, init_lora_weights="pissa")
    assert len(calls) == 3
    state.assert_unchanged()


def test_shared_weights_and_merged_adapters_are_refused():
    model = Tied()
    state = ModelState(model)
    with pytest.raises(
        ValueError, match=r"'pissa': 'output': its weight belongs to another module too \(tied weights\)"
    ):
        fastlora.patch(model, r=2, init_lora_weights="pissa")
    state.assert_unchanged()
    fastlora.patch(model, r=2, init_lora_weights="pissa", exclude_modules=["output"])
    merged = Net()
    fastlora.patch(merged, r=2, init_lora_weights=False)
    fastlora.merge(merged)
    state = ModelState(merged)
    with pytest.raises(ValueError, match=r"are merged; call fastlora\.unmerge"):
        fastlora.patch(merged, r=2, adapter_name="second", init_lora_weights="olora")
    state.assert_unchanged()


def test_scales_that_leave_nothing_to_learn():
    for init, alpha in (("pissa", 0), ("pissa", -1), ("pissa_niter_2", -1), ("olora", 0)):
        with pytest.raises(ValueError, match=r"lora_alpha: got a scale of .*, want a positive one"):
            FusedLoraLinear(K, N, r=R, lora_alpha=alpha, init_lora_weights=init)


# Against PEFT.
def with_peft(base: nn.Module, init: str, **settings: Any) -> Any:
    config = peft.LoraConfig(init_lora_weights=init, **settings)  # type: ignore[arg-type]
    return peft.get_peft_model(base, config)  # type: ignore[arg-type]


def peft_conv() -> nn.Sequential:
    torch.manual_seed(0)
    conv = Conv1D(N, K)
    with torch.no_grad():
        conv.weight.copy_(weight_with_spectrum(K, N))
    return nn.Sequential(conv)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init, conv", [("pissa", False), ("pissa", True), ("olora", False)])
def test_factors_and_outputs_are_pefts(init, conv, use_rslora):
    torch.manual_seed(0)
    base = peft_conv() if conv else nn.Sequential(linear())
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    settings: dict[str, Any] = {"r": R, "lora_alpha": 6, "use_rslora": use_rslora}
    fastlora.patch(ours, init_lora_weights=init, **settings)
    peft_model = with_peft(theirs, init, target_modules=["0"], fan_in_fan_out=conv, **settings)
    mine: Any = ours[0]
    other: Any = peft_model.base_model.model[0]
    torch.testing.assert_close(mine.weight, other.base_layer.weight, rtol=0, atol=2e-6)
    a, b = mine.lora_A["default"].detach(), mine.lora_B["default"].detach()
    a2, b2 = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
    signs = (a * a2).sum(dim=1).sign()  # the signs of singular vectors are arbitrary
    torch.testing.assert_close(a, signs.unsqueeze(1) * a2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b, signs * b2, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, K)
    torch.testing.assert_close(ours(x), peft_model(x), rtol=1e-5, atol=1e-5)


def test_orthogonal_factors_are_pefts_with_the_same_seed():
    mine = FusedLoraLinear.from_linear(linear(), r=6)
    theirs: Any = with_peft(nn.Sequential(linear()), "orthogonal", r=6, target_modules=["0"]).base_model.model[0]
    torch.manual_seed(3)
    theirs.orthogonal_init("default")
    torch.manual_seed(3)
    mine.reset_adapter("default", "orthogonal")
    assert torch.equal(mine.lora_A["default"], theirs.lora_A["default"].weight)
    assert torch.equal(mine.lora_B["default"], theirs.lora_B["default"].weight)


# Files.
def move(model: nn.Module) -> None:
    """As training would, away from the start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def two_linears(conv: bool = False) -> Any:
    first = peft_conv()[0] if conv else linear()
    return nn.Sequential(first, nn.Tanh(), linear(7, N))


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(5, K, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", SHIFTING)
def test_saved_as_a_plain_adapter_of_the_original_base(tmp_path, init, conv, use_rslora):
    base = two_linears(conv)
    ours = copy.deepcopy(base)
    settings: dict[str, Any] = {"r": R, "lora_alpha": 6, "use_rslora": use_rslora}
    fastlora.patch(ours, init_lora_weights=init, **settings)
    move(ours)
    fastlora.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2 * R and config["init_lora_weights"] is True
    assert config["lora_alpha"] == pytest.approx(6 * (math.sqrt(2) if use_rslora else 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on fan_in_fan_out
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)  # type: ignore[arg-type]
    again = copy.deepcopy(base)
    fastlora.load_adapter(again, tmp_path)
    assert (outputs(ours) - outputs(base)).norm() > 0.1 * outputs(base).norm()
    for model in (theirs, again):
        torch.testing.assert_close(outputs(model), outputs(ours), rtol=1e-5, atol=1e-5)


def saved_by_peft(folder: Path, base: nn.Module, init: str, **settings: Any) -> Any:
    """A moved PEFT model, and its start and itself on disk: `start`, `converted` and `plain` (not converted)."""
    model = with_peft(base, init, target_modules=["0", "2"], **settings)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it, so that the start loads as it is
    model.save_pretrained(folder / "start")
    model.peft_config["default"].init_lora_weights = init
    move(model)
    model.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(folder / "start"))
    return model


@pytest.mark.filterwarnings("ignore")  # PEFT's, on adapters that change the base weights
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_what_peft_converted_loads_as_any_adapter(tmp_path, init, use_rslora):
    base = two_linears()
    theirs = saved_by_peft(tmp_path, copy.deepcopy(base), init, r=R, lora_alpha=6, use_rslora=use_rslora)
    fastlora.load_adapter(base, tmp_path / "converted")
    assert base[0].r == {"default": 2 * R} and base[0].shifted_by is None
    torch.testing.assert_close(outputs(base), outputs(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init, conv", [("pissa", False), ("pissa", True), ("olora", False)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_did_not_convert_loads_as_peft_loads_it(tmp_path, init, conv, dtype, use_rslora):
    base = two_linears(conv).to(dtype)
    trained = saved_by_peft(tmp_path, copy.deepcopy(base), init, r=R, lora_alpha=6, use_rslora=use_rslora)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")  # type: ignore[arg-type]
    ours = copy.deepcopy(base)
    bits = ModelState(base)
    fastlora.load_adapter(ours, tmp_path / "plain")
    other: Any = theirs.base_model.model[0]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0].weight, other.base_layer.weight, rtol=2 * eps, atol=4e-6)
    assert torch.equal(ours[0].lora_A["default"], other.lora_A["default"].weight)

    def run(model):
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(4)).to(dtype)
        return model.eval()(x).detach().float()

    for model in (theirs, trained):
        torch.testing.assert_close(run(ours), run(model), rtol=0, atol=16 * eps * run(model).abs().max().item())
    fastlora.save_adapter(ours, tmp_path / "again")
    fastlora.unpatch(ours)
    bits.assert_same_tensors(ours)
    fastlora.load_adapter(ours, tmp_path / "again")
    assert ours[0].r == {"default": 2 * R}
    torch.testing.assert_close(run(ours), run(trained), rtol=0, atol=16 * eps * run(trained).abs().max().item())


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_weights_that_cannot_be_found_again_are_refused(tmp_path):
    base = two_linears()
    saved_by_peft(tmp_path / "a", copy.deepcopy(base), "pissa_niter_4", r=R)
    saved_by_peft(tmp_path / "b", copy.deepcopy(base), "pissa", r=R)
    state = ModelState(base)
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa_niter_4' \(it changed .* convert it with"):
        fastlora.load_adapter(base, tmp_path / "a" / "plain")
    state.assert_unchanged()
    config = json.loads((tmp_path / "b" / "plain" / "adapter_config.json").read_text())
    (tmp_path / "b" / "plain" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "olora"}))
    conv = two_linears(conv=True)
    state = ModelState(conv)
    with pytest.raises(ValueError, match="'0' is a Conv1D, of whose weight PEFT decomposes the transpose"):
        fastlora.load_adapter(conv, tmp_path / "b" / "plain")
    state.assert_unchanged()
    (tmp_path / "b" / "plain" / "adapter_config.json").write_text(json.dumps(config))
    with torch.no_grad():
        base[2].weight[0, 0] = math.nan
    state = ModelState(base)
    with pytest.raises(ValueError, match=r"load_adapter: '2': .*NaN or infinite"):
        fastlora.load_adapter(base, tmp_path / "b" / "plain")
    state.assert_unchanged()
    fastlora.patch(base, r=2, target_modules=["0"], init_lora_weights="pissa", adapter_name="first")
    state = ModelState(base)
    with pytest.raises(ValueError, match="adapter 'first' has shifted this weight already"):
        fastlora.load_adapter(base, tmp_path / "b" / "plain")
    state.assert_unchanged()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_state_dict_goes_on_where_training_stopped(init):
    base = two_linears()
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    for model in (first, second):
        fastlora.patch(model, r=R, init_lora_weights=init)
    move(first)
    second.load_state_dict(first.state_dict())
    assert torch.equal(outputs(first), outputs(second))
    plain = [layer.as_plain_adapter("default")[:2] for layer in (first[0], second[0])]
    assert all(torch.equal(mine, other) for mine, other in zip(*plain, strict=True))
    fastlora.unpatch(second)
    ModelState(base).assert_same_tensors(second)


def started(init: bool | str, base: nn.Module) -> Any:
    """A trained model with an adapter that started so; "exact" and "offset" are LoRA-GA's."""
    model: Any = copy.deepcopy(base)
    if init in ("exact", "offset"):
        with fastlora.GradientSketch(model, r=3) as sketch:
            model(torch.ones(1, K)).square().sum().backward()
        model.zero_grad()
        fastlora.init_lora_ga(model, sketch, base=init)
    else:
        fastlora.patch(model, r=3, init_lora_weights=init)
    move(model)
    return model


@pytest.mark.parametrize("there", [True, "exact", "offset", "pissa", "olora"])
@pytest.mark.parametrize("here", [True, "exact", "offset", "pissa", "olora"])
def test_a_state_dict_of_another_start_is_right_or_refused(there, here):
    """A weight says nothing of what was taken out of it."""
    base, shifting = two_linears(), ("offset", "pissa", "olora")
    source, model = started(there, base), started(here, base)
    for layer, other in ((model[0], source[0]), (model[2], source[2])):
        layer.scaling = dict(other.scaling)
    state = source.state_dict()
    if (there in shifting) != (here in shifting):
        with pytest.raises(ValueError, match=r"0.weight: the start of adapter 'default' .* taken out of the weight in"):
            model.load_state_dict(state, strict=False)
        return
    if (there, here) != (True, "exact"):  # keys are missing
        model.load_state_dict(state)
        torch.testing.assert_close(outputs(model), outputs(source), rtol=1e-5, atol=1e-5)
        fastlora.unpatch(model)
        for weight, wanted in zip(model.parameters(), base.parameters(), strict=True):
            torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_of_another_base_brings_its_bits(dtype):
    """Those of the base that the state came from, as near as rounding allows, and not the layer's former ones: from
    another base model, and from what `from_pretrained` makes of a checkpoint, the weights as they are there."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 7)).to(dtype)
    source, from_pretrained = started("pissa", base), copy.deepcopy(base)
    from_pretrained.load_state_dict(source.state_dict(), strict=False)
    x, eps = torch.randn(3, K, dtype=dtype), torch.finfo(dtype).eps
    for other in (two_linears().to(dtype), from_pretrained):
        model = started("pissa", other)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(x), source(x))
        fastlora.unpatch(model)
        for weight, wanted in zip(model.parameters(), base.parameters(), strict=True):
            torch.testing.assert_close(weight, wanted, rtol=0, atol=eps * wanted.detach().abs().max().item())


def test_parts_of_a_state_dict():
    """Adapters alone, and the base's own weights with the trained factors."""
    base = two_linears()
    source = started("pissa", base)
    wanted, state = outputs(source), source.state_dict()
    assert [name for name in state if "shift" in name] == ["0.lora_shift.default", "2.lora_shift.default"]
    for part in (
        {name: value for name, value in state.items() if "lora_" in name},
        {
            **base.state_dict(),
            **{name: value for name, value in state.items() if "lora_A." in name or "lora_B." in name},
        },
    ):
        model = started("pissa", base)
        if "0.lora_A0.default" not in part:
            model.load_state_dict(base.state_dict(), strict=False)
            part = {name: value for name, value in part.items() if "lora_" in name}
        model.load_state_dict(part, strict="0.weight" in part)
        assert torch.equal(outputs(model), wanted)
        fastlora.unpatch(model)
        ModelState(base).assert_same_tensors(model)


@pytest.mark.parametrize("init", ["pissa", "exact", "offset"])
def test_loading_an_ordinary_adapter_takes_the_start_back(tmp_path, init):
    base = two_linears()
    ordinary, model = started(False, base), started(init, base)
    fastlora.save_adapter(ordinary, tmp_path)
    fastlora.load_adapter(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(ordinary), rtol=1e-6, atol=1e-6)
    fastlora.unpatch(model)
    ModelState(base).assert_same_tensors(model)


@pytest.mark.parametrize("init", ["pissa", "exact", "offset"])
def test_merging_deepcopies_and_keeping_what_is_merged(init):
    base = two_linears()
    model = started(init, base)
    wanted = outputs(model)
    with fastlora.disable_adapter(model):
        assert torch.allclose(outputs(model), outputs(base), atol=1e-6) == (init == "exact")
    clone = copy.deepcopy(model)
    fastlora.merge(model)
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    fastlora.unmerge(model)
    assert torch.equal(outputs(model), wanted) and torch.equal(outputs(clone), wanted)
    for copied in (clone, again):
        fastlora.unpatch(copied)
        ModelState(base).assert_same_tensors(copied)
    fastlora.merge(model)
    fastlora.unpatch(model, keep_merged=True)
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_shift_is_not_lost_with_another_adapter_that_is_merged():
    model = two_linears()
    fastlora.patch(model, r=R, init_lora_weights="pissa")
    fastlora.patch(model, r=2, init_lora_weights=False, adapter_name="second")
    fastlora.set_adapter(model, "second")
    fastlora.merge(model)
    state = ModelState(model)
    with pytest.raises(
        ValueError, match=r"unpatch: keep_merged: \['second'\] are merged into weights that 'default' has"
    ):
        fastlora.unpatch(model, keep_merged=True)
    state.assert_unchanged()
    fastlora.unmerge(model)
    fastlora.set_adapter(model, ["default", "second"])
    wanted = outputs(model)
    fastlora.merge(model)
    fastlora.unpatch(model, keep_merged=True)
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_peft_model_gets_its_weights_back_where_the_file_does_not_fit(tmp_path, init):
    saved_by_peft(tmp_path, two_linears(), init, r=R)
    file = tmp_path / "plain" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["base_model.model.2.lora_A.weight"]
    safetensors.torch.save_file(tensors, file)
    model = peft.get_peft_model(two_linears(), peft.LoraConfig(r=2, target_modules=["0"]))
    state = ModelState(model)
    with pytest.raises(ValueError, match="does not fit this PeftModel: keys missing"):
        fastlora.load_adapter(model, tmp_path / "plain", adapter_name="second")
    state.assert_same_tensors(model)


def test_pissa_takes_the_plain_way_where_lanczos_would_not_pay(monkeypatch):
    """Not one Lanczos step for a flat spectrum at 1024 and r = 32, where failed attempts took up to six times PEFT's
    time; and no full decomposition of a large weight that a few steps decompose."""
    decompose, whole = starts.linalg.truncated_svd, torch.linalg.svd
    monkeypatch.setattr(starts.linalg, "truncated_svd", lambda *_, **__: pytest.fail("an attempt that cannot pay"))
    weight = torch.randn(1024, 1024)
    a, b = starts.from_weight(weight, 32, 2.0, "pissa")
    _, s, vh = whole(weight, full_matrices=False)
    assert torch.allclose(2.0 * b.norm(dim=0).square(), s[:32], rtol=1e-4)
    assert torch.allclose((a @ vh[:32].t()).diagonal().abs(), (s[:32] / 2.0).sqrt(), rtol=1e-2)
    monkeypatch.setattr(starts.linalg, "truncated_svd", decompose)
    monkeypatch.setattr(
        torch.linalg, "svd", lambda x, **options: pytest.fail("all") if min(x.shape) > 200 else whole(x, **options)
    )
    u, v = (torch.linalg.qr(torch.randn(2048, 12))[0] for _ in range(2))
    values = 0.8 ** torch.arange(12)
    a, b = starts.from_weight((u * values) @ v.t(), 4, 1.0, "pissa")
    assert torch.allclose(b @ a, (u[:, :4] * values[:4]) @ v[:, :4].t(), atol=1e-5)
