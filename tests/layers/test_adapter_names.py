# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportCallIssue=false

"""`fastlora.adapter_names`: a whole model's batch with an adapter for each sequence, beside each sequence alone and
beside PEFT's `adapter_names=`."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FusedLoraLinear
from fastlora.integrations.peft.lora import FusedPeftLinear
from fastlora.layers import batch

NAMES = ["a", "__base__", "b", "a"]


class Tower(nn.Module):
    def __init__(self, depth=3, width=12, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.reentrant = reentrant  # None: no checkpointing

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def tower(reentrant=None, dropout=0.0):
    """Adapters "a" and "b" of different ranks, both trainable; the last layer has "a" alone."""
    model = Tower(reentrant=reentrant)
    for rank, name, targets in ((2, "a", "all-linear"), (4, "b", ["layers.0.0", "layers.1.0"])):
        fastlora.patch(
            model, r=rank, target_modules=targets, adapter_name=name, init_lora_weights=False, lora_dropout=dropout
        )
    fastlora.set_adapter(model, ["a", "b"])
    return model


def adapters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def alone(model, x, names):
    """Each sequence in a forward of its own, with its adapter active."""
    outputs = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with fastlora.disable_adapter(model):
                outputs.append(model(row[None]))
        else:
            fastlora.set_adapter(model, name)
            outputs.append(model(row[None]))
            fastlora.set_adapter(model, ["a", "b"])
    return torch.cat(outputs)


def inputs(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def grads_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in adapters(model).items()}


def assert_same_gradients(got, want):
    assert {n for n, g in got.items() if g is None} == {n for n, g in want.items() if g is None}
    for name, grad in want.items():
        if grad is not None:
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)


def test_each_sequence_as_alone_in_eval_and_in_training():
    model, x = tower(), inputs(4, 5, 12)
    for layer in model.modules():
        if isinstance(layer, FusedLoraLinear):
            layer.set_adapter([name for name in ("a", "b") if name in layer.lora_A])
    want = alone(model, x, NAMES)
    want_grads = grads_of(model, want.square().sum())
    with fastlora.adapter_names(model, NAMES) as same:
        assert same is model
        got = model(x)
        torch.testing.assert_close(got, want)
    assert_same_gradients(grads_of(model, got.square().sum()), want_grads)
    assert model.layers[0][0].mixed_batch is None
    assert not torch.equal(model(x), got)


def test_an_adapter_without_a_sequence_gets_no_gradient():
    model, x = tower(), inputs(2, 5, 12)
    with fastlora.adapter_names(model, ["a", "__base__"]):
        got = grads_of(model, model(x).sum())
    assert all((grad is None) == (".b" in name) for name, grad in got.items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_after_the_block_is_over(reentrant, dropout):
    """Two forwards with different names, then both backward passes, in either order, outside of the blocks; and one
    forward without names beside them."""
    grads = []
    for kind in (None, reentrant):
        model = tower(kind, dropout)
        model.train()
        x = inputs(4, 5, 12)
        torch.manual_seed(7)
        losses = []
        for names in (NAMES, NAMES[::-1], None):
            if names is None:
                losses.append(model(x).pow(2).sum())
            else:
                with fastlora.adapter_names(model, names):
                    losses.append(model(x).pow(2).sum())
        assert model.layers[0][0].mixed_batch is None
        collected = []
        for order in (1, 0, 2):
            collected.append(grads_of(model, losses[order]))
        grads.append(collected)
    for plain, recomputed in zip(*grads, strict=True):
        assert_same_gradients(recomputed, plain)


def test_recomputed_within_another_block():
    """A backward pass within a block belongs to the block of its forward."""
    grads = []
    for kind in (None, False):
        model, x = tower(kind), inputs(4, 5, 12)
        with fastlora.adapter_names(model, NAMES):
            loss = model(x).square().sum()
        with fastlora.adapter_names(model, ["b", "b"]):
            grads.append(grads_of(model, loss))
    assert_same_gradients(*grads)


def test_blocks_nest_and_end_on_exceptions():
    model, x = tower(), inputs(4, 5, 12)
    with fastlora.adapter_names(model, ["a"] * 4):
        a = model(x)
        with fastlora.adapter_names(model, ["b"] * 4):
            b = model(x)
        with pytest.raises(KeyError), fastlora.adapter_names(model, ["b"] * 4):
            raise KeyError
        assert torch.equal(model(x), a) and not torch.equal(a, b)
    torch.testing.assert_close(a, alone(model, x, ["a"] * 4))
    torch.testing.assert_close(grads_of(model, b.sum()), grads_of(model, alone(model, x, ["b"] * 4).sum()))


def test_serving_remembers_nothing():
    model = tower()
    with torch.no_grad(), fastlora.adapter_names(model, NAMES):
        model(inputs(4, 5, 12))
    assert not any(layer in batch._blocks for layer in model.modules())


@pytest.mark.parametrize("family", ["plain", "PEFT"])
def test_copies_know_nothing_of_the_block(family):
    model, x = tower() if family == "plain" else peft_pair(Tower())[1], inputs(4, 5, 12)
    with fastlora.adapter_names(model, NAMES):
        model(x).sum().backward()
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    want = model(x)
    for kept in (False, True):
        with torch.no_grad(), fastlora.variants.kept_norms(model) if kept else fastlora.adapter_names(model, NAMES):
            model(x)
            copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for again in copies:
            assert torch.equal(again(x), want)
            assert not any({"mixed_batch", "kept_norms"} & module.__dict__.keys() for module in again.modules())
    fastlora.unpatch(model)
    assert not any("mixed_batch" in module.__dict__ for module in model.modules())


def test_disabled_and_merged():
    model, x = tower(), inputs(4, 5, 12)
    with fastlora.adapter_names(model, NAMES), fastlora.disable_adapter(model):
        torch.testing.assert_close(model(x), alone(model, x, ["__base__"] * 4))
    fastlora.merge(model)
    with fastlora.adapter_names(model, NAMES), pytest.raises(ValueError, match="are merged into the weight"):
        model(x)


def test_wrong_arguments():
    model, x = tower(), inputs(4, 5, 12)
    with pytest.raises(ValueError, match=r"adapter_names: names: got \['c'\], want some of \['a', 'b'\] or"):
        with fastlora.adapter_names(model, ["c", "a"]):
            pass
    with pytest.raises(ValueError, match="want a list with a name for each sequence"):
        with fastlora.adapter_names(model, "a"):
            pass
    with pytest.raises(ValueError, match="num_beams"), fastlora.adapter_names(model, NAMES, num_beams=0):
        pass
    with fastlora.adapter_names(model, ["a", "b"]), pytest.raises(ValueError, match="input of 4 sequences, want 2"):
        model(x)
    with pytest.raises(ValueError, match="has no LoRA layers"), fastlora.adapter_names(nn.Linear(2, 2), ["a"]):
        pass


def test_compiled():
    model, x = tower(), inputs(4, 5, 12)
    compiled = torch.compile(model, backend="aot_eager")
    with fastlora.adapter_names(model, NAMES):
        want = model(x)
        torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(compiled(x), model(x))


# PEFT's models.
def peft_pair(base, eval_mode=True, **config):
    """A PEFT model with adapters "a" and "b", and its patched copy."""
    config = {"target_modules": "all-linear", "init_lora_weights": False, "lora_alpha": 8, **config}
    torch.manual_seed(0)
    plain = peft.get_peft_model(base, peft.LoraConfig(r=4, **config), adapter_name="a")
    plain.add_adapter("b", peft.LoraConfig(r=3, **config))
    plain.train(not eval_mode)
    fused = copy.deepcopy(plain)
    fastlora.patch(fused)
    return plain, fused


def counts(model):
    return [layer.calls for layer in model.modules() if isinstance(layer, FusedPeftLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_peft_and_counted_as_fused(dtype):
    plain, fused = peft_pair(Tower().to(dtype), target_modules=["layers.0.0", "layers.1.0"])
    x = inputs(4, 5, 12).detach().to(dtype)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    want, got = (model(x, adapter_names=NAMES) for model in (plain, fused))
    torch.testing.assert_close(got, want, **tolerance)
    with fastlora.adapter_names(fused, NAMES):
        torch.testing.assert_close(fused(x), want, **tolerance)
    assert all(calls.fused == 2 and not calls.fallback for calls in counts(fused))


def test_peft_errors_stay():
    _, fused = peft_pair(Tower())
    x = inputs(4, 5, 12)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        fused(x, adapter_names=["a"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        fused(x, adapter_names=["c"] * 4)
    fused.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        fused(x, adapter_names=NAMES)


def test_peft_training_by_the_block():
    plain, fused = peft_pair(Tower(reentrant=False), eval_mode=False)
    fused.base_model.set_adapter(["a", "b"])
    plain.base_model.set_adapter(["a", "b"])
    x = inputs(4, 5, 12)
    want = []
    for row, name in zip(x, NAMES, strict=True):
        if name == "__base__":
            with plain.disable_adapter():
                want.append(plain(row[None]))
        else:
            plain.base_model.set_adapter(name)
            want.append(plain(row[None]))
    plain.base_model.set_adapter(["a", "b"])
    with fastlora.adapter_names(fused, NAMES):
        got = fused(x)
    torch.testing.assert_close(got, torch.cat(want))
    assert_same_gradients(grads_of(fused, got.square().sum()), gradients_by_peft(plain, x))


def gradients_by_peft(plain, x):
    """Gradients of the batch by PEFT's layers themselves, without checkpointing (PEFT forbids training only at the
    model)."""
    plain.get_base_model().reentrant = None
    plain.zero_grad()
    plain.eval()
    plain(x, adapter_names=NAMES).square().sum().backward()
    return {name: None if p.grad is None else p.grad for name, p in adapters(plain).items()}


def test_lora_bias_falls_back():
    plain, fused = peft_pair(Tower(), lora_bias=True)
    x = inputs(4, 5, 12)
    torch.testing.assert_close(fused(x, adapter_names=NAMES), plain(x, adapter_names=NAMES))
    assert all(list(calls.fallback) == ["lora_bias in a batch that mixes adapters"] for calls in counts(fused))


def test_layers_that_are_pefts_own_are_named():
    plain, _ = peft_pair(Tower())
    with pytest.raises(ValueError, match="LoRA layers are PEFT's own"), fastlora.adapter_names(plain, NAMES):
        pass


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_as_peft(architecture, num_beams):
    plain, fused = peft_pair(tiny_model(architecture), lora_alpha=16)
    tokens = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(2))
    names = ["b", "__base__", "a"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
    want = plain.generate(input_ids=tokens, adapter_names=names, **options)
    assert torch.equal(fused.generate(input_ids=tokens, adapter_names=names, **options), want)
    with fastlora.adapter_names(fused, names, num_beams=num_beams):
        assert torch.equal(fused.generate(input_ids=tokens, **options), want)
    alike = [torch.equal(plain.generate(input_ids=tokens, adapter_names=[name] * 3, **options), want) for name in "ab"]
    assert not any(alike)  # the names make a difference
    assert all(calls.fused > 0 and not calls.fallback for calls in counts(fused))
