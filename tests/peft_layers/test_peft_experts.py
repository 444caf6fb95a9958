"""PEFT's `ParamWrapper`s that run fused: what PEFT does to them goes on working."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from mixtures import experts_in, mixture, peft_mixture, randomise, step, tokens
from torch import nn

import fastlora
from fastlora.integrations.peft.experts import FusedParamWrapper


def both(**settings: Any) -> tuple[Any, Any]:
    """An eager PEFT model and a patched copy."""
    eager = peft_mixture(mixture("qwen3_moe"), target_modules=["o_proj"], **settings)
    model = copy.deepcopy(eager)
    fastlora.patch(model)
    return eager, model


def wrappers(model: nn.Module) -> list[FusedParamWrapper]:
    return [module for module in model.modules() if isinstance(module, FusedParamWrapper)]


def test_pefts_own_operations():
    """Adapters added, switched, scaled, merged and deleted by PEFT's methods, on both models alike."""
    eager, model = both()
    x = tokens()
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=experts_in(mixture("qwen3_moe")))

    def same() -> None:
        with torch.no_grad():
            assert torch.allclose(model(x).logits, eager(x).logits, atol=1e-4)
        assert fastlora.fallbacks(model) == {}

    def on_both(do: Any) -> None:
        do(eager)
        do(model)
        same()

    same()
    on_both(lambda m: m.add_adapter("b", config))
    assert len(wrappers(model)) == 4, "the second adapter goes into the wrappers that there are"
    on_both(lambda m: (m.set_adapter("b"), randomise(m, seed=7)))
    on_both(lambda m: m.base_model.set_adapter(["default", "b"]))
    for m in (eager, model):
        fastlora.merge(m)
    same()
    for m in (eager, model):
        fastlora.unmerge(m)
    on_both(lambda m: m.base_model.set_adapter("default"))
    on_both(lambda m: m.delete_adapter("b"))
    with eager.disable_adapter(), model.disable_adapter():
        same()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).logits, model(x).logits) and len(wrappers(other)) == 4
    want = model(x).logits
    unloaded = model.merge_and_unload()
    assert not wrappers(unloaded) and torch.allclose(unloaded(x).logits, want, atol=1e-4)


def test_checkpointing_and_compiling():
    eager, model = both()
    x = tokens()
    want = step(eager, x)
    grads = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.allclose(step(model, x), want, atol=1e-4)
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model.base_model.model.model.layers[0].mlp, backend="aot_eager")
    h = torch.randn(2, 5, 24)
    assert torch.allclose(compiled(h), eager.base_model.model.model.layers[0].mlp(h), atol=1e-4)
    for name, p in model.named_parameters():
        assert name not in grads or torch.allclose(p.grad, grads[name], atol=1e-4)


@pytest.mark.parametrize("hooked", ["experts", "lora_A", "mlp.experts"])
def test_hooks_that_fusing_would_leave_out_send_the_call_to_peft(hooked):
    eager, model = both()
    x = tokens()
    outer = model.base_model.model.model.layers[0].mlp.experts
    module = {"experts": outer.get_base_layer(), "lora_A": outer.lora_A["default"], "mlp.experts": outer}[hooked]
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(model(x).logits, eager(x).logits, atol=1e-4)
    if hooked == "mlp.experts":  # on what is called itself
        assert seen == [1] and fastlora.fallbacks(model) == {}
    else:  # the outer wrapper says why, and the inner one sees the weight that it has parametrised
        outer_why, inner_why = fastlora.fallbacks(model).values()
        assert "hooks on" in outer_why and inner_why == "its module is parametrised"


def test_a_parameter_that_is_no_experts_stays_with_peft():
    model = peft_mixture(mixture("gpt_oss"), target_parameters=["mlp.router.weight", "experts.down_proj"])
    plain = copy.deepcopy(model)
    report = fastlora.patch(model)
    assert len(report.patched) == 2 and all("experts.down_proj" in name for name in report.patched)
    assert len(report.left_alone) == 2 and all("it has 2 dimensions" in why for why in report.left_alone.values())
    assert torch.allclose(model(tokens()).logits, plain(tokens()).logits, atol=1e-4)
