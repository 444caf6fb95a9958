"""What PEFT does to its models at run time, done to a patched one and to an unpatched copy: same outputs, same
gradients, and fused wherever it is plain LoRA."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from model_state import ModelState
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fastlora
from fastlora.integrations.peft.lora import FusedPeftLinear
from fastlora.integrations.peft.tuner import FusedLoraModel

WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    """Blocks in a list, as transformers have them, and a head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for layer in self.encoder["layers"]:  # type: ignore[union-attr]
            x = layer(x)
        return self.head(x)


def config(**settings) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], "init_lora_weights": False, **settings}
    )


def pair(base: nn.Module | None = None, **settings) -> tuple[Any, Any]:
    """A PEFT model, and a copy of it that is patched."""
    torch.manual_seed(0)
    plain = peft.get_peft_model(Tower() if base is None else base, config(**settings))  # type: ignore[arg-type]
    fused = copy.deepcopy(plain)
    fastlora.patch(fused)
    return plain, fused


def lora_layers(model) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


def do(models, change) -> None:
    for model in models:
        torch.manual_seed(5)
        change(model)


def check(plain, fused, x=None, tolerance=1e-6, fallback=False) -> None:
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3)) if x is None else x
    before = sum(layer.calls.fused for layer in lora_layers(fused))
    results = []
    for model in (plain, fused):
        model.zero_grad()
        torch.manual_seed(7)
        y = model(x)
        y = y if isinstance(y, torch.Tensor) else y.logits
        if y.requires_grad:
            y.square().sum().backward()
        results.append((y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (want, want_grads), (got, got_grads) = results
    assert want_grads.keys() == got_grads.keys()
    for name, expected, found in [("output", want, got)] + [(n, want_grads[n], got_grads[n]) for n in want_grads]:
        error = (expected - found).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"
    if not fallback:
        assert not any(layer.calls.fallback for layer in lora_layers(fused))
        assert sum(layer.calls.fused for layer in lora_layers(fused)) > before


# Adapters and layers that come after `patch`.
def test_adapters_that_bring_new_layers_are_picked_up():
    models = pair(target_modules=["up"])
    do(models, lambda model: model.add_adapter("wide", config(target_modules=["up", "down", "head"])))
    do(models, lambda model: model.base_model.set_adapter("wide"))
    fused = models[1]
    assert len(lora_layers(fused)) == 7
    assert all(type(layer) is FusedPeftLinear for layer in lora_layers(fused))
    check(*models)


def test_later_layers_follow_what_patch_was_asked_for():
    torch.manual_seed(0)
    model = peft.get_peft_model(Tower(), config(target_modules=["up"]))  # type: ignore[arg-type]
    fastlora.patch(model, exclude_modules=r".*\.1\..*", backend="torch")
    model.add_adapter("wide", config(target_modules=["up", "down"]))
    for name, layer in model.named_modules():
        if isinstance(layer, PeftLinear):
            assert (type(layer) is FusedPeftLinear) == (".1." not in name)
            assert getattr(layer, "backend", "torch") == "torch"


def test_the_tuner_is_swapped_back():
    plain, fused = pair()
    assert type(fused.base_model) is FusedLoraModel
    assert fused.get_model_status() == plain.get_model_status()
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        again.add_adapter("wide", config(target_modules=["head"]))
        assert type(again.base_model.model.head) is FusedPeftLinear
    fastlora.unpatch(fused)
    assert type(fused.base_model) is LoraModel
    assert fused.base_model.__dict__.keys() == plain.base_model.__dict__.keys()
    fused.add_adapter("wide", config(target_modules=["head"]))
    assert type(fused.base_model.model.head) is PeftLinear


def test_loading_an_adapter_into_a_patched_model(tmp_path):
    plain, fused = pair(target_modules=["up"])
    torch.manual_seed(9)
    peft.get_peft_model(Tower(), config(r=6, lora_alpha=3, target_modules=["down", "up"])).save_pretrained(tmp_path)  # type: ignore[arg-type]
    do((plain, fused), lambda model: model.load_adapter(tmp_path, "loaded", is_trainable=True))
    do((plain, fused), lambda model: model.set_adapter("loaded"))
    check(plain, fused)


# Which layers get which adapter.
@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"rank_pattern": {"layers.1.up": 7, "down": 2}, "alpha_pattern": {"layers.0.up": 1, "down": 5}}, 6),
        ({"exclude_modules": ["layers.1.up"]}, 5),
        ({"layers_to_transform": [0, 2]}, 4),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, 2),
        ({"target_modules": r".*\.[01]\.up"}, 2),
        ({"modules_to_save": ["head"]}, 6),
        ({"lora_bias": True}, 6),
        ({"bias": "all"}, 6),
        ({"bias": "lora_only"}, 6),
        ({"lora_dropout": 0.2, "use_rslora": True}, 6),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_a_configuration_selects(settings, number):
    models = pair(**settings)
    assert len(lora_layers(models[1])) == number
    check(*models)


def test_target_parameters_stay_with_peft():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)
            self.proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.proj(torch.einsum("bti,eio->bto", x, self.weight))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, x):
            return self.experts(x)

    torch.manual_seed(0)
    settings = {"target_modules": ["proj"], "target_parameters": ["experts.weight"]}
    models = pair(Model(), **settings)
    assert any(isinstance(module, ParamWrapper) for module in models[1].modules())
    check(*models)


def test_tied_layers():
    torch.manual_seed(0)
    base: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        models = pair(base, target_modules=["q_proj", "lm_head"])
    check(*models, x=torch.randint(0, 37, (2, 5)))
    assert models[1].base_model.model.lm_head.weight is models[1].get_input_embeddings().weight


def test_one_module_at_two_places():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)
            self.again = self.up

        def forward(self, x):
            return self.again(torch.tanh(self.up(x)))

    check(*pair(Shared(), target_modules=["up"]), fallback=True)


# What PEFT changes on a model that is there.
@pytest.mark.parametrize("merged", [["default"], ["second"], ["default", "second"]], ids="+".join)
def test_merged_and_partly_merged(merged):
    models = pair()
    do(models, lambda model: model.add_adapter("second", config(r=3)))
    do(models, lambda model: model.base_model.set_adapter(["default", "second"]))
    do(models, lambda model: model.merge_adapter(merged))
    # Merged adapters run as the base layer, and those that are not merged do not run: PEFT's rule.
    check(*models, tolerance=1e-5, fallback=True)
    do(models, lambda model: model.unmerge_adapter())
    check(*models, tolerance=1e-5)


@pytest.mark.parametrize("names", [["b"], ["b", "default"]])
def test_disabled_and_merged_again(names):
    """What was merged is what is merged afterwards, whichever is active; unless another was chosen meanwhile."""
    _, fused = pair()
    fused.add_adapter("b", config())
    fused.add_adapter("c", config())
    fused.merge_adapter(names)
    state = ModelState(fused)
    with fastlora.disable_adapter(fused):
        assert not any(layer.merged_adapters for layer in lora_layers(fused))
    assert all(layer.merged_adapters == names for layer in lora_layers(fused))
    state.assert_same_tensors(fused)
    with fastlora.disable_adapter(fused):
        fastlora.set_adapter(fused, "c")
    assert all(layer.merged_adapters == ["c"] for layer in lora_layers(fused))


def test_a_refused_merge_changes_nothing():
    _, fused = pair()
    fused.add_adapter("b", config())
    fused.merge_adapter(["b"])
    state = ModelState(fused)
    with pytest.raises(
        ValueError, match=r"merge: '.*0.up': adapters \['b'\] are merged already; call fastlora.unmerge"
    ):
        fastlora.merge(fused)
    state.assert_unchanged()
    fastlora.unmerge(fused)
    last = lora_layers(fused)[-1]
    with torch.no_grad():
        last.lora_B["default"].weight[0, 0] = torch.inf
    last.merge(adapter_names=["b"])
    state = ModelState(fused)
    with pytest.raises(ValueError, match="are merged already"):
        fastlora.merge(fused)
    state.assert_unchanged()
    last.unmerge()
    state = ModelState(fused)
    with pytest.raises(ValueError, match=r"merge: .*NaNs detected"):
        fastlora.merge(fused)
    state.assert_unchanged()


def test_some_layers_merged():
    models = pair()
    do(models, lambda model: [layer.merge() for layer in lora_layers(model)[::2]])
    check(*models, tolerance=1e-5)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "dare_ties", "magnitude_prune"])
def test_weighted_adapters(combination):
    models = pair()
    do(models, lambda model: model.add_adapter("second", config()))
    more = {"density": 0.5} if combination in ("dare_ties", "magnitude_prune") else {}
    do(
        models,
        lambda model: model.add_weighted_adapter(
            ["default", "second"], [0.7, 0.4], "mix", combination_type=combination, **more
        ),
    )
    do(models, lambda model: model.set_adapter("mix"))
    # svd's signs may differ between two calls, its product does not
    check(*models, tolerance=1e-4 if combination == "svd" else 1e-6)


def test_hot_swapping(tmp_path):
    torch.manual_seed(11)
    peft.get_peft_model(Tower(), config(lora_alpha=20)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    models = pair()
    check(*models)
    do(models, lambda model: hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu"))
    check(*models)


def test_scales():
    """In float64: with a scale of 3 float32's roundings differ by a few more units between machines."""
    models = pair()
    do(models, lambda model: model.double())
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def every_layer(method, *arguments):
        do(models, lambda model: [getattr(layer, method)(*arguments) for layer in lora_layers(model)])
        check(*models, x, tolerance=1e-12)

    every_layer("set_scale", "default", 3.0)
    every_layer("scale_layer", 0.25)
    every_layer("unscale_layer", None)
    with peft.helpers.rescale_adapter_scale(models[0], 0.5), peft.helpers.rescale_adapter_scale(models[1], 0.5):
        check(*models, x, tolerance=1e-12)


def test_deleted_disabled_and_enabled():
    models = pair()
    do(models, lambda model: model.add_adapter("second", config(r=2)))
    do(models, lambda model: model.delete_adapter("default"))
    do(models, lambda model: model.set_adapter("second"))
    check(*models)
    x = torch.randn(4, WIDTH)
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert torch.equal(models[0](x), models[1](x))
    check(*models)


def test_rows_with_adapters_of_their_own():
    models = pair()
    do(models, lambda model: model.add_adapter("second", config(r=3)))
    do(models, lambda model: model.eval())
    x, names = torch.randn(4, 3, WIDTH), ["default", "__base__", "second", "default"]
    want, got = (model(x, adapter_names=names) for model in models)
    assert torch.allclose(want, got, atol=1e-6)


def test_adapter_dtypes_under_autocast():
    for settings in ({"autocast_adapter_dtype": True}, {"autocast_adapter_dtype": False}):
        torch.manual_seed(0)
        plain = peft.get_peft_model(Tower().bfloat16(), config(), **settings)  # type: ignore[arg-type]
        fused = copy.deepcopy(plain)
        fastlora.patch(fused)
        wanted = torch.float32 if settings["autocast_adapter_dtype"] else torch.bfloat16
        assert {layer.lora_A["default"].weight.dtype for layer in lora_layers(fused)} == {wanted}
        x = torch.randn(2, 3, WIDTH)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(plain, fused, x, tolerance=0.05)


def test_transformer_encoder_layers_do_not_skip_the_adapters():
    """In eval mode without gradients nn.TransformerEncoderLayer takes a path of its own, past its linear layers."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
    plain, fused = pair(encoder, target_modules=["linear1", "linear2"])
    x = torch.randn(2, 3, WIDTH)
    trained = fused.train()(x).detach()
    with torch.no_grad():
        assert torch.allclose(fused.eval()(x), trained, atol=1e-5)
        with fused.disable_adapter():
            assert not torch.allclose(fused(x), trained, atol=1e-3)
    assert len(lora_layers(plain)) == 2


def test_it_shows_itself_as_peft_s_layer():
    _, fused = pair()
    shown = repr(lora_layers(fused)[0])
    assert shown.startswith("lora.Linear(") and "fused by fastlora" in shown and "lora_A" in shown


def test_adapters_that_are_not_loaded_yet(tmp_path):
    """`low_cpu_mem_usage=True` makes adapters on the meta device; the layers can be adopted before they are filled."""
    torch.manual_seed(0)
    plain = peft.get_peft_model(Tower(), config(lora_bias=True))  # type: ignore[arg-type]
    plain.save_pretrained(tmp_path)
    base = copy.deepcopy(plain).unload()
    empty = peft.PeftModel(base, config(lora_bias=True), low_cpu_mem_usage=True)
    assert fastlora.patch(empty).patched
    empty.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
    x = torch.randn(3, WIDTH)
    assert torch.allclose(empty.eval()(x), plain.eval()(x), atol=1e-6)
