"""What a merge leaves as it was: tied weights, configurations, packed bits, and a model that it fails in."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from quantised_models import quantise
from torch import nn

import fastlora

QUANTISED = ("bnb4", "bnb8", "torchao8")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 128)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def with_lora(model: Any, **settings: Any) -> Any:
    settings = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def quantised(kind: str, **settings: Any) -> Any:
    if kind == "torchao8":
        torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is optional")
        model = Net()
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        model = with_lora(model, **settings)
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.get_apply_tensor_subclass = torchao.Int8WeightOnlyConfig  # what transformers' loading sets
        return model
    return with_lora(quantise(Net(), int(kind[3]), torch.float32), **settings)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(8)[None]

FAMILIES = pytest.mark.parametrize("family", ["plain", "PEFT", "PEFT patched"])


def adapted(family: str, model: Any, targets: list[str]) -> Any:
    if family == "plain":
        fastlora.patch(model, r=4, target_modules=targets, init_lora_weights=False)
        return model
    model = with_lora(model, target_modules=targets)
    if family == "PEFT patched":
        fastlora.patch(model)
    return model


@FAMILIES
def test_a_tied_head_leaves_the_embedding_alone(family):
    base = llama()
    model = copy.deepcopy(base)
    model = adapted(family, model, ["lm_head", "q_proj"]).eval()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    before = embedding.weight.detach().clone()
    wanted = model(IDS).logits
    fastlora.merge(model)
    assert torch.equal(embedding.weight, before) and not torch.equal(head.weight, before)
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    config: Any = model.config
    assert not config.tie_word_embeddings
    model.get_base_model().tie_weights() if family != "plain" else model.tie_weights()
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    with fastlora.disable_adapter(model):
        assert torch.equal(model(IDS).logits, base(IDS).logits) and config.tie_word_embeddings
    assert not config.tie_word_embeddings
    fastlora.unmerge(model)
    assert config.tie_word_embeddings and head.weight is embedding.weight and torch.equal(head.weight, before)
    if family == "plain":
        fastlora.merge(model)
        fastlora.unpatch(model)
        assert config.tie_word_embeddings and head.weight is embedding.weight


@pytest.mark.parametrize("patched", [False, True])
def test_a_head_over_tied_trained_tokens_is_refused(patched):
    """PEFT's merge writes into the embedding too, and the tokens' rows cover what is merged."""
    tokens = {"embed_tokens": [1]}
    model = with_lora(llama(), target_modules=["q_proj", "lm_head"], trainable_token_indices=tokens).eval()
    if patched:
        fastlora.patch(model)
    wanted = model(IDS).logits
    with pytest.raises(ValueError, match=r"merge: '.*lm_head': PEFT has tied trained tokens"):
        fastlora.merge(model)
    assert torch.equal(model(IDS).logits, wanted)


@FAMILIES
def test_two_layers_on_one_weight(family):
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    model = adapted(family, model, ["0", "2"])
    inner = model if family == "plain" else model.base_model.model
    layers = [getattr(inner[i], "base_layer", inner[i]) for i in (0, 2)]
    weight = layers[0].weight
    before, x = weight.detach().clone(), torch.randn(5, 16)
    wanted = model(x)
    fastlora.merge(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert layers[0].weight is not layers[1].weight
    fastlora.unmerge(model)
    assert layers[0].weight is layers[1].weight is weight and torch.equal(weight, before)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_failed_merge_leaves_every_packed_bit(kind, patched):
    model = quantised(kind).eval()
    if patched:
        fastlora.patch(model)
    x = torch.randn(5, 128)
    with torch.no_grad(), fastlora.disable_adapter(model):
        base = model(x)
    layers = model.base_model.model
    with torch.no_grad():
        layers.down.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"merge: '.*down': NaNs detected"):
        fastlora.merge(model)
    assert not layers.up.merged_adapters and not layers.down.merged_adapters
    with torch.no_grad(), fastlora.disable_adapter(model):
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", QUANTISED)
def test_disabling_what_is_merged_never_wears_a_quantised_base(kind, patched):
    model = quantised(kind).eval()
    if patched:
        fastlora.patch(model)
    x = torch.randn(5, 128)
    with torch.no_grad():
        adapted = model(x)
        with fastlora.disable_adapter(model):
            base = model(x)
        fastlora.merge(model)
        merged = model(x)
        for _ in range(3):
            with fastlora.disable_adapter(model):
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), merged)
        fastlora.unmerge(model)
        assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("kind", QUANTISED)
def test_pefts_own_merging_of_fused_quantised_layers_is_exact_too(kind):
    model = quantised(kind).eval()
    fastlora.patch(model)
    x = torch.randn(5, 128)
    with torch.no_grad():
        adapted = model(x)
        model.merge_adapter()
        assert not torch.equal(model(x), adapted)
        model.unmerge_adapter()
        assert torch.equal(model(x), adapted)
    fastlora.merge(model)
    copied = copy.deepcopy(model)
    fastlora.unmerge(copied)
    with torch.no_grad():
        assert torch.equal(copied(x), adapted)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bnb4"])
def test_dora_merged_in_inference_mode_can_be_trained(kind, patched):
    model = with_lora(Net(), use_dora=True) if kind == "plain" else quantised(kind, use_dora=True)
    if patched:
        fastlora.patch(model)
    x = torch.randn(5, 128)
    wanted = model(x)
    with torch.inference_mode():
        fastlora.merge(model)
    model(x.requires_grad_()).sum().backward()  # through the merged weights
    fastlora.unmerge(model)
    y = model(x)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert model.base_model.model.up.lora_A["default"].weight.grad.norm() > 0


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(10, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.attention, self.up = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, ids):
        x = self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)
        return self.up(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("patched", [False, True])
def test_layers_that_pefts_own_code_merges_come_back_bit_for_bit(patched):
    model = with_lora(Others(), target_modules=["words", "conv", "attention", "up"]).eval()
    if patched:
        fastlora.patch(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model(ids)  # in which PEFT merges attention's adapters and subtracts them again: not to the bit
        before = {name: value.clone() for name, value in model.state_dict().items()}
        fastlora.merge(model)
        torch.testing.assert_close(model(ids), wanted, rtol=1e-2, atol=1e-3)
        fastlora.unmerge(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
