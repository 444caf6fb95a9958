"""`set_adapter`, `disable_adapter` and `adapter_names` on PEFT models with more than LoRA layers, as PEFT does."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from model_state import ModelState
from torch import Tensor, nn

import fastlora
from fastlora.adapters import first_forward


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


TOKENS = torch.arange(9)
HEAD = {"modules_to_save": ["head"]}
BOTH = {**HEAD, "trainable_token_indices": {"embedding": [1, 4]}}


def config(**beside: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["body"], init_lora_weights=False, **beside)


def models(*configs: dict) -> tuple[Any, Any, nn.Module]:
    """A PEFT model with adapters "default", "b", ... of which everything is random; a patched copy; the base model."""
    torch.manual_seed(0)
    base = Classifier()
    plain: Any = peft.get_peft_model(copy.deepcopy(base), config(**configs[0]))  # type: ignore[arg-type]
    for name, beside in zip("bcd", configs[1:]):
        plain.add_adapter(name, config(**beside))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "modules_to_save" in name or "tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    fused = copy.deepcopy(plain)
    fastlora.patch(fused)
    first_forward.forget(fused)  # its hooks go with the first training forward
    return plain, fused, base


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("beside", [HEAD, BOTH], ids=["head", "head and tokens"])
@pytest.mark.parametrize("trainable", [True, False])
def test_set_adapter_as_peft(beside, trainable):
    plain, fused, _ = models(beside, beside, {})
    flags = trained(fused)
    for name in ("b", "c", "default", "b"):
        plain.set_adapter(name)
        fastlora.set_adapter(fused, name, trainable=trainable)
        torch.testing.assert_close(fused(TOKENS), plain(TOKENS))
        assert trained(fused) == (trained(plain) if trainable else flags)
        assert fused.active_adapter == plain.active_adapter == name
        assert fused.active_adapters == plain.active_adapters == [name]
        assert fused.base_model.active_adapter == name
        got, want = fused.get_model_status(), plain.get_model_status()
        assert (got.active_adapters, got.available_adapters) == (want.active_adapters, want.available_adapters)


def test_what_was_trainable_before_is_frozen():
    plain, fused, _ = models(HEAD, HEAD, HEAD)
    fastlora.set_adapter(fused, "b", trainable=False)
    fastlora.set_adapter(fused, "c")
    plain.set_adapter("c")
    assert trained(fused) == trained(plain)
    fused(TOKENS).sum().backward()
    assert {name for name, p in fused.named_parameters() if p.grad is not None} == trained(plain)


def test_several_adapters():
    plain, fused, _ = models(HEAD, {}, HEAD)
    plain.base_model.set_adapter(["b", "default"])
    fastlora.set_adapter(fused, ["b", "default"])
    torch.testing.assert_close(fused(TOKENS), plain(TOKENS))
    assert trained(fused) == trained(plain) and fused.active_adapters == ["b", "default"]
    before = ModelState(fused)
    with pytest.raises(
        ValueError, match=r"set_adapter: adapter_name: got \['default', 'c'\], and 'base_model.model.head'"
    ):
        fastlora.set_adapter(fused, ["default", "c"])
    before.assert_unchanged()


@pytest.mark.parametrize("beside", [HEAD, BOTH], ids=["head", "head and tokens"])
def test_disabled_it_is_the_base_model(beside):
    _, fused, base = models(beside, beside)
    for adapter in ("default", "b"):
        fused.set_adapter(adapter)
        before, expected = ModelState(fused), fused(TOKENS)
        with fastlora.disable_adapter(fused):
            with fastlora.disable_adapter(fused):
                assert torch.equal(fused(TOKENS), base(TOKENS))
            assert torch.equal(fused(TOKENS), base(TOKENS))
        before.assert_unchanged()
        assert torch.equal(fused(TOKENS), expected)


def test_merged_tokens_are_merged_again():
    _, fused, base = models(BOTH, BOTH)
    fused.merge_adapter(["b"])
    before, expected = ModelState(fused), fused(TOKENS)
    with pytest.raises(ValueError, match="set_adapter: adapters are merged into"):
        fastlora.set_adapter(fused, "b")
    with fastlora.disable_adapter(fused):
        assert torch.equal(fused(TOKENS), base(TOKENS))
    before.assert_same_tensors(fused)
    assert torch.equal(fused(TOKENS), expected)


def test_one_module_for_a_whole_batch():
    plain, fused, _ = models(HEAD, HEAD)
    names = ["default", "b", "__base__"] * 3
    with pytest.raises(ValueError, match=r"adapter_names: model: 'base_model.model.head' is another module in each"):
        with fastlora.adapter_names(fused, names):
            pass
    plain.eval()
    fused.eval()
    torch.testing.assert_close(fused(TOKENS, adapter_names=names), plain(TOKENS, adapter_names=names))
