"""Whole transformers models, tiny and random, patched: the same numbers as without, and as with PEFT's eager LoRA."""

from __future__ import annotations

import copy
from typing import Any, cast

import peft
import pytest
import torch
from model_state import ModelState
from tiny_models import ARCHITECTURES, tiny_batch, tiny_model
from torch import Tensor, nn

import fastlora

GENERATIVE = ("llama", "qwen3", "gpt2", "t5")


def patched(architecture: str, hidden_dropout: float = 0.0, **settings: Any) -> nn.Module:
    """A tiny model with LoRA that does something: B is random, small enough for a trained adapter's size."""
    model = tiny_model(architecture, hidden_dropout=hidden_dropout)
    torch.manual_seed(2)
    fastlora.patch(model, **({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings))
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def in_peft(model: nn.Module, base: nn.Module, lora_dropout: float) -> nn.Module:
    """PEFT's model on a plain copy of the same base, with the same settings and the same A and B."""
    targets = [name for name, module in model.named_modules() if isinstance(module, fastlora.FusedLoraLinear)]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=lora_dropout, target_modules=targets)
    other = peft.get_peft_model(cast(Any, base), config)
    ours = adapter_parameters(model)
    theirs = {peft_name_to_ours(name): p for name, p in adapter_parameters(other).items()}
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(ours[name])
    return other


def peft_name_to_ours(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".weight")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_patch_computes_what_the_base_model_does(architecture):
    model, batch = tiny_model(architecture), tiny_batch(architecture)
    with torch.no_grad():
        expected = model(**batch)
        fastlora.patch(model)
        got = model(**batch)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=1e-6)
        fastlora.unpatch(model)
        assert torch.equal(model(**batch).logits, expected.logits)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_bf16_base_with_float32_adapters_trains_as_in_float32(architecture):
    """Against fp32 the bf16 model's first-step gradients are at most twice as wrong as those of PEFT's in bf16."""
    model = patched(architecture)
    base = tiny_model(architecture)
    exact = gradients_of(copy.deepcopy(model), architecture)
    theirs = gradients_of(in_peft(model, base, 0.0).to(torch.bfloat16), architecture)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for p in adapter_parameters(half).values():
        p.data = p.data.float()
    ours = gradients_of(half, architecture)
    assert {g.dtype for g in ours.values()} == {torch.float32}
    error = torch.stack([(ours[name] - g).norm() for name, g in exact.items()]).norm()
    their_error = torch.stack([(theirs[name].float() - g).norm() for name, g in exact.items()]).norm()
    assert error <= 2 * their_error


def gradients_of(model: nn.Module, architecture: str) -> dict[str, Tensor]:
    model.train()
    batch = tiny_batch(architecture)
    model.zero_grad()
    model(**batch).loss.backward()
    found = {peft_name_to_ours(name): p.grad for name, p in adapter_parameters(model).items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_nothing(architecture, reentrant):
    """With dropout on: the recomputation draws the same masks. (Only the order in which the gradients of a residual
    stream are summed differs.)"""
    model = patched(architecture, hidden_dropout=0.1, lora_dropout=0.2)
    torch.manual_seed(3)
    expected = gradients_of(model, architecture)
    cast(Any, model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        cast(Any, model).enable_input_require_grads()
    torch.manual_seed(3)
    got = gradients_of(model, architecture)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("architecture", GENERATIVE)
def test_generation_with_a_cache(architecture):
    model = patched(architecture)
    base, prompt = tiny_model(architecture), tiny_batch(architecture)["input_ids"]
    other = in_peft(model, tiny_model(architecture), 0.0)
    settings: Any = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    tokens = cast(Any, model).generate(prompt, use_cache=True, **settings)
    assert torch.equal(tokens, cast(Any, model).generate(prompt, use_cache=False, **settings))
    assert torch.equal(tokens, cast(Any, other).generate(input_ids=prompt, use_cache=True, **settings))
    plain = cast(Any, base).generate(prompt, **settings)
    assert not torch.equal(tokens, plain), "the adapter made no difference"
    with fastlora.disable_adapter(model):
        assert torch.equal(cast(Any, model).generate(prompt, **settings), plain)
    fastlora.merge(model)
    assert torch.equal(cast(Any, model).generate(prompt, **settings), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merging_gives_the_same_output_and_unmerging_the_same_bits(architecture, dtype):
    model = patched(architecture).to(dtype)
    batch = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tiny_batch(architecture).items()}
    before = ModelState(model)
    with torch.no_grad():
        expected = model(**batch).logits
        with fastlora.disable_adapter(model):
            plain = model(**batch).logits
        fastlora.merge(model)
        merged = model(**batch).logits
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        assert (merged - expected).norm() <= rounding * expected.norm()
        assert (expected - plain).norm() > 5 * (merged - expected).norm()
        fastlora.unmerge(model)
        before.assert_unchanged()
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "t5"])
def test_state_dict_carries_the_adapter_to_another_copy(architecture, tmp_path):
    model = patched(architecture)
    other = patched(architecture, init_lora_weights=True)
    batch = tiny_batch(architecture)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    plain = tiny_model(architecture).state_dict()
    assert plain.keys() <= model.state_dict().keys(), "a base weight changed its name"
    adapter = {key: value for key, value in model.state_dict().items() if key not in plain}
    assert adapter.keys() == adapter_parameters(model).keys()
    third = patched(architecture, init_lora_weights=True)
    missing, unexpected = third.load_state_dict(adapter, strict=False)
    assert not unexpected and plain.keys() == set(missing)
    with torch.no_grad():
        assert torch.equal(third(**batch).logits, model(**batch).logits)
