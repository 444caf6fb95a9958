"""init_lora_ga on PEFT models, patched or not: beside the same start in a plain model, and through all that PEFT does
with its adapters afterwards."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import peft
import pytest
import torch
from model_state import ModelState
from plain_models import LINEARS, Block, Tied
from plain_models import Net as NetWithLists
from started_nets import BASES, SKETCHED, R, inputs, loss_of, sketch_of
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import fastlora
from fastlora.init.lora_ga import undo_lora_ga
from fastlora.integrations.peft.lora import FusedPeftLinear
from fastlora.integrations.peft.starts import StartedLinear

ALPHA = 6
either = pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
both = pytest.mark.parametrize("base", BASES)


class DirectBlock(Block):
    """Without the list, in which PEFT, which replaces modules, does not find the layers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.conv(self.norm(self.up(x))))


class Net(NetWithLists):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.__class__ = DirectBlock
            del block.listed


def plain_sketch(r: int = R) -> Any:
    """Of the model without PEFT, whose names are those of PEFT's inner model."""
    return sketch_of(Net(), r, exclude_modules=["head"])


def peft_net(patched: bool = False, net: Any = None, **config: Any) -> Any:
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": ["up", "conv", "down"], **config}
    torch.manual_seed(4)
    model: Any = peft.get_peft_model(Net() if net is None else net, peft.LoraConfig(**settings))
    if patched:
        fastlora.patch(model)
    return model


def started(patched: bool = False, base: str = "exact", config: Any = None, **options: Any) -> Any:
    model = peft_net(patched, **(config or {}))
    fastlora.init_lora_ga(model.base_model.model, plain_sketch(), base=base, **options)
    return model


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """Losses; weight decay too, which would move a frozen half that only had its gradient taken away."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def assert_close(got: Tensor, want: Tensor, atol: float = 1e-5) -> None:
    assert torch.allclose(got, want, atol=atol * max(1.0, want.abs().max().item()))


# The same as in a plain model.
@either
@both
@pytest.mark.parametrize("use_rslora", [False, True])
def test_as_a_plain_model_with_the_same_sketch(use_rslora, base, patched):
    sketch = plain_sketch()
    plain = Net()
    sizes = fastlora.init_lora_ga(plain, sketch, base=base, lora_alpha=ALPHA, use_rslora=use_rslora)
    model = peft_net(patched, use_rslora=use_rslora)
    inner = model.base_model.model
    weights = {name: inner.get_submodule(name).base_layer.weight.detach().clone() for name in SKETCHED}
    assert fastlora.init_lora_ga(inner, sketch, base=base) == sizes
    for name in SKETCHED:
        ours: Any = plain.get_submodule(name)
        layer = inner.get_submodule(name)
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        assert torch.equal(down.trained, ours.lora_A["default"]) and torch.equal(up.trained, ours.lora_B["default"])
        assert torch.equal(down.start, ours.lora_A0["default"]) and torch.equal(up.start, ours.lora_B0["default"])
        assert torch.equal(layer.base_layer.weight, ours.weight)
        assert torch.equal(layer.base_layer.weight, weights[name]) == (base == "exact")
    assert_close(model(inputs()), Net()(inputs()))
    assert_close(model(inputs()), plain(inputs()), 1e-6)
    assert isinstance(next(iter(layers_of(model).values())), FusedPeftLinear) == patched
    losses = train(model)
    assert losses == pytest.approx(train(plain), rel=1e-4)
    assert losses[-1] < losses[0]
    assert_close(model(inputs()), plain(inputs()), 1e-4)
    if patched:
        assert all(layer.calls.fused > 0 and not layer.calls.fallback for layer in layers_of(model).values())


@either
def test_the_sketch_of_a_peft_model(patched):
    model = peft_net(patched)
    sizes = fastlora.init_lora_ga(model, sketch_of(model))
    assert sizes == pytest.approx(
        {
            f"base_model.model.{name}": size
            for name, size in fastlora.init_lora_ga(Net(), plain_sketch(), lora_alpha=ALPHA).items()
        },
        rel=1e-3,
    )
    assert_close(model(inputs()), Net()(inputs()))


@either
def test_one_dropout_mask_for_both_halves(patched):
    model = started(patched, config={"lora_dropout": 0.5}).train()
    assert_close(model(inputs()), Net()(inputs()))
    train(model)
    assert not torch.allclose(model(inputs()), model(inputs()))


@either
def test_lora_bias_starts_at_zero(patched):
    model = peft_net(patched, lora_bias=True, target_modules=["up"])
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_B["default"].bias.fill_(1.0)
    fastlora.init_lora_ga(model, sketch_of(model))
    assert_close(model(inputs()), Net()(inputs()))
    assert all(layer.lora_B["default"].bias.requires_grad for layer in layers_of(model).values())


@either
@both
def test_ranks_and_alphas_of_their_own(tmp_path, base, patched):
    config = {"rank_pattern": {"conv": 1, "blocks.1.up": 3}, "alpha_pattern": {"down": 5}}
    model = peft_net(patched, **config)
    fastlora.init_lora_ga(model, sketch_of(model, r=3, target_modules=["up", "conv", "down"]), base=base)
    ranks = {name: len(layer.lora_A["default"].trained) for name, layer in layers_of(model).items()}
    assert sorted(ranks.values()) == [1, 1, 2, 2, 2, 3] and ranks["base_model.model.blocks.1.up"] == 3
    assert_close(model(inputs()), Net()(inputs()))
    assert_scales(model, {name: 5 / 2 if "down" in name else ALPHA / rank for name, rank in ranks.items()})
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)  # type: ignore[arg-type]
    assert_close(loaded(inputs()), model(inputs()))
    assert_scales(loaded, {name: 5 / 2 if "down" in name else ALPHA / rank for name, rank in ranks.items()})


def assert_scales(model: nn.Module, scales: dict[str, float]) -> None:
    assert {name: layer.scaling["default"] for name, layer in layers_of(model).items()} == pytest.approx(scales)


# What PEFT does with it.
@either
@both
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("save", ["peft", "fastlora"])
def test_the_saved_adapter_is_one_of_the_original_base(tmp_path, save, use_rslora, base, patched):
    model = started(patched, base, {"use_rslora": use_rslora})
    train(model)
    trained = model(inputs())
    if save == "peft":
        model.save_pretrained(tmp_path)
    else:
        fastlora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)  # type: ignore[arg-type]
    config: Any = loaded.peft_config["default"]
    assert config.r == 2 * R and config.lora_alpha == pytest.approx(ALPHA * (math.sqrt(2) if use_rslora else 2))
    assert_close(loaded(inputs()), trained)
    ours = Net()
    fastlora.load_adapter(ours, tmp_path)
    assert_close(ours(inputs()), trained)
    other = started(patched, base, {"use_rslora": use_rslora})  # as a Trainer does to go on from a checkpoint
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(other(inputs()), trained)
    assert all(isinstance(layer.lora_A["default"], StartedLinear) for layer in layers_of(other).values())
    assert train(other) == pytest.approx(train(model), rel=1e-2)


@either
@both
def test_merging_switching_and_disabling(base, patched):
    model = started(patched, base)
    train(model)
    trained, plain = model(inputs()), Net()(inputs())
    with model.disable_adapter():
        assert torch.allclose(model(inputs()), plain, atol=1e-6) == (base == "exact")
    model.merge_adapter()
    assert_close(model(inputs()), trained)
    model.unmerge_adapter()
    assert_close(model(inputs()), trained)
    trained = model(inputs())  # PEFT's own unmerging rounds
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    model.set_adapter("second")
    assert not torch.allclose(model(inputs()), trained, atol=1e-3)
    assert not any(layer.lora_A["default"].trained.requires_grad for layer in layers_of(model).values())
    model.set_adapter("default")
    assert torch.equal(model(inputs()), trained)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(name.endswith("default.trained") for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == R * sum(
        layer.in_features + layer.out_features for layer in layers_of(model).values()
    )
    assert model.get_model_status().requires_grad == {"default": True, "second": False}
    model.delete_adapter("second")
    for layer in layers_of(model).values():
        layer.set_scale("default", 1.0)  # PEFT's α/r: both are those of rank 2r, where both halves run
    assert torch.equal(model(inputs()), trained)
    merged = model.merge_and_unload()
    assert type(merged) is Net and not layers_of(merged)
    assert_close(merged(inputs()), trained)


@either
@both
def test_copies_pickles_and_state_dicts(base, patched):
    model = started(patched, base)
    train(model)
    trained = model(inputs())
    assert torch.equal(copy.deepcopy(model)(inputs()), trained)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs()), trained)
    other = started(patched, base)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs()), trained)
    key = "base_model.model.blocks.0.up.lora_A.default.weight"
    assert model.state_dict()[key].shape == (2 * R, 6)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*\(2, 6\), the shape in current model is \(4, 6\)"):
        other.load_state_dict({key: torch.zeros(R, 6)}, strict=False)
    without = {name: value for name, value in model.state_dict().items() if name != key}
    assert other.load_state_dict(without, strict=False).missing_keys == [key]
    changed = {key: model.state_dict()[key] + 1}
    if base == "offset":
        with pytest.raises(RuntimeError, match="another start than the one that this base weight was shifted by"):
            other.load_state_dict(changed, strict=False)
    else:
        other.load_state_dict(changed, strict=False)
        assert torch.equal(other.state_dict()[key], changed[key])


def test_the_users_configuration_object_stays():
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["up"])
    model: Any = peft.get_peft_model(Net(), config)  # type: ignore[arg-type]
    fastlora.init_lora_ga(model, sketch_of(model))
    assert config.r == R and model.peft_config["default"].r == model.base_model.model.peft_config["default"].r == 2 * R


@either
@both
def test_again_and_undone(base, patched):
    model = peft_net(patched)
    sketch = sketch_of(model)
    plain = Net()(inputs())
    fastlora.init_lora_ga(model, sketch, base="exact")
    fastlora.init_lora_ga(model, sketch, "A2rBr", base="offset")
    train(model)
    fastlora.init_lora_ga(model, sketch, base=base)
    assert_close(model(inputs()), plain)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2 * R, 2 * ALPHA)
    undo_lora_ga(model)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (R, ALPHA)
    for name, layer in layers_of(model).items():
        assert type(layer.lora_A["default"]) is type(layer.lora_B["default"]) is nn.Linear
        assert (layer.r["default"], layer.lora_alpha["default"]) == (R, ALPHA)
        original: Any = Net().get_submodule(name.removeprefix("base_model.model."))
        assert torch.equal(layer.base_layer.weight, original.weight)
    assert torch.equal(model(inputs()), plain)


@both
def test_undo_in_a_plain_model(base):
    model = Net()
    fastlora.init_lora_ga(model, plain_sketch(), base=base)
    undo_lora_ga(model)
    assert torch.equal(model(inputs()), Net()(inputs()))
    undo_lora_ga(model)  # nothing is left to undo


@either
def test_an_adapter_that_is_not_active(patched):
    model = peft_net(patched)
    model.add_adapter("second", peft.LoraConfig(r=R, lora_alpha=2, target_modules=["up", "conv", "down"]))
    train(model)
    plain, sketch = Net()(inputs()), sketch_of(model)
    before = model(inputs())
    fastlora.init_lora_ga(model, sketch, adapter_name="second")
    assert torch.equal(model(inputs()), before)
    model.set_adapter("second")
    assert_close(model(inputs()), plain)
    assert model.peft_config["default"].r == R and model.peft_config["second"].r == 2 * R
    fastlora.init_lora_ga(model, sketch, adapter_name="second", base="offset")
    with pytest.raises(ValueError, match="adapter 'second' has shifted the weight of"):
        fastlora.init_lora_ga(model, sketch, adapter_name="default", base="offset")


def test_modules_to_save_train_beside_it(tmp_path):
    model = started(config={"modules_to_save": ["head"]})
    head = model.base_model.model.head
    assert type(head).__name__ == "ModulesToSaveWrapper"
    train(model)
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)  # type: ignore[arg-type]
    assert_close(loaded(inputs()), model(inputs()))


def test_an_adapted_embedding_keeps_its_ordinary_start(tmp_path):
    batch: Any = tiny_batch("llama")
    before = (base := tiny_model("llama"))(**batch).logits
    config = peft.LoraConfig(r=R, target_modules=["embed_tokens", "q_proj"], alpha_pattern={"embed_tokens": 3})
    model: Any = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    with fastlora.GradientSketch(model, r=R) as sketch:
        model(**batch).loss.backward()
    fastlora.init_lora_ga(model, sketch)
    embedding = model.base_model.model.model.embed_tokens
    assert (embedding.r["default"], embedding.lora_alpha["default"]) == (R, 3)
    assert_close(model(**batch).logits, before)
    torch.nn.init.normal_(embedding.lora_embedding_A["default"])
    torch.nn.init.normal_(embedding.lora_embedding_B["default"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded: Any = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)  # type: ignore[arg-type]
    assert_close(loaded(**batch).logits, model(**batch).logits)


# What is refused, and that nothing is left half done.
def tied() -> Any:
    return peft_net(net=Tied(), target_modules=["output", "first"])


@pytest.mark.parametrize(
    "config, options, message",
    [
        ({"use_dora": True}, {}, "the adapter 'default' of 'blocks.0.up' is PEFT's DoraLinearVariant"),
        ({"r": 3}, {}, "the sketch has r=2, but the adapter 'default' of 'blocks.0.up' has r=3"),
        ({}, {"adapter_name": "other"}, r"adapter_name: got 'other', but 'blocks.0.up' has \['default'\]"),
        ({"target_modules": ["up"]}, {}, "'blocks.0.conv' was sketched and is not patched"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa', which changes the base weights"),
        ({"target_modules": ["up", "conv", "down", "head"]}, {"sketch": LINEARS}, "fewer than 2r = 4 singular"),
    ],
)
def test_refusals(config, options, message):
    names = options.pop("sketch", SKETCHED)
    if config.get("init_lora_weights") == "pissa":
        config = config | {"target_modules": ["up"]}
        names = ["blocks.0.up", "blocks.1.up"]
    sketch = sketch_of(Net(), target_modules=names)
    model = peft_net(**config)
    state, configuration = ModelState(model), model.peft_config["default"]
    with pytest.raises(ValueError, match=message):
        fastlora.init_lora_ga(model.base_model.model, sketch, **options)
    state.assert_unchanged()
    assert model.peft_config["default"] is configuration


def test_other_tuners_are_refused():
    config = peft.AdaLoraConfig(init_r=R, target_r=1, total_step=10, target_modules=["up", "conv", "down"])
    model: Any = peft.get_peft_model(Net(), config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'blocks\.0\.up' is a peft\.tuners\.adalora\.layer\.SVDLinear, want one of"):
        fastlora.init_lora_ga(model.base_model.model, plain_sketch())


@either
def test_merged_adapters_are_refused(patched):
    model = peft_net(patched, init_lora_weights=False)
    sketch = sketch_of(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged into .*unmerge_adapter\(\)"):
        fastlora.init_lora_ga(model, sketch)


def test_a_weight_with_other_users_cannot_be_shifted():
    model = tied()
    with fastlora.GradientSketch(model, target_modules=["output", "first"], r=R) as sketch:
        model(torch.arange(7)).square().mean().backward()
    state = ModelState(model)
    with pytest.raises(ValueError, match=r"output': its weight belongs to another module too .*want base=\"exact\""):
        fastlora.init_lora_ga(model, sketch, base="offset")
    state.assert_unchanged()
    fastlora.init_lora_ga(model, sketch, base="exact")
    assert torch.allclose(model(torch.arange(7)), copy.deepcopy(model).unload()(torch.arange(7)), atol=1e-5)


class OutOfMemory(RuntimeError):
    pass


@both
@pytest.mark.parametrize("before", ["fresh", "trained", "exact", "offset"])
@pytest.mark.parametrize("kind", ["plain", "peft", "patched"])
def test_nothing_is_half_done_when_memory_runs_out(monkeypatch, kind, before, base):
    """At each of the copies of A and B in turn, and in the middle of the layers."""
    sketch = plain_sketch()
    if kind == "plain":
        model: Any = Net()
        if before != "fresh":
            fastlora.patch(model, r=R, target_modules=SKETCHED, init_lora_weights=False)
    else:
        model = peft_net(kind == "patched").base_model.model
    if before in BASES:
        fastlora.init_lora_ga(model, sketch, "A2rBr", base=before)
    if before != "fresh":
        train(model)
        model.zero_grad()
    state, output = ModelState(model), model(inputs())
    configuration = getattr(model, "peft_config", {}).get("default")
    copy_ = Tensor.copy_
    for failing in (1, 2, 7):
        calls: list[None] = []

        def out_of_memory(self: Tensor, *args: Any, calls=calls, failing=failing, **kwargs: Any) -> Tensor:
            calls.append(None)
            if len(calls) == failing:
                raise OutOfMemory("CUDA out of memory")
            return copy_(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", out_of_memory)
            with pytest.raises(OutOfMemory):
                fastlora.init_lora_ga(model, sketch, base=base)
        assert len(calls) >= failing
        state.assert_unchanged()
        assert torch.equal(model(inputs()), output)
        assert getattr(model, "peft_config", {}).get("default") is configuration
    fastlora.init_lora_ga(model, sketch, base=base)
    assert_close(model(inputs()), Net()(inputs()))
