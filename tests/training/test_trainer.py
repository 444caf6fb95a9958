"""transformers' Trainer on patched models: the same training as PEFT's, checkpoints that resume to the bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from problems import through_the_function
from safetensors.torch import load_file
from training_runs import (
    adapters,
    assert_fused,
    assert_same_training,
    base_model,
    train,
    trainable_model,
)

import fastlora

the_function = pytest.fixture(autouse=True)(through_the_function)
PATCHED = pytest.mark.parametrize("way", ["PEFT patched", "patched"])


@pytest.fixture(scope="module")
def peft_s(tmp_path_factory):
    """(losses, model) of PEFT's eager training, each kind once."""
    out = tmp_path_factory.mktemp("peft")

    @cache
    def run(name: str) -> tuple[list[float], Any]:
        model = trainable_model(name, "PEFT")
        return train(model, name, out)[0], model

    return run


@pytest.mark.parametrize("name, way", [*((name, "patched") for name in ("t5", "minilm")), ("llama", "PEFT patched")])
def test_gradient_accumulation(peft_s, tmp_path, name, way):
    """Two micro-batches a step, gradients clipped."""
    model = trainable_model(name, way)
    losses, _ = train(model, name, tmp_path)
    assert_same_training(losses, model, *peft_s(name))
    if way == "PEFT patched":
        assert_fused(model)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name, way", [("t5", "patched"), ("llama", "PEFT patched")])
def test_gradient_checkpointing(peft_s, tmp_path, name, way, reentrant):
    model = trainable_model(name, way)
    kwargs = {"use_reentrant": reentrant}
    losses, _ = train(model, name, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert_same_training(losses, model, *peft_s(name))


@PATCHED
def test_bf16(peft_s, tmp_path, way):
    """bf16=True, which is autocast: at most twice as far from fp32's losses as PEFT's are."""
    exact = torch.tensor(peft_s("llama")[0])
    errors = []
    for one in (way, "PEFT"):
        model = trainable_model("llama", one)
        losses, _ = train(model, "llama", tmp_path, bf16=True)
        errors.append((torch.tensor(losses) - exact).norm().item())
        assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    assert 0 < errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name, way", [("qwen3", "patched"), ("t5", "patched"), ("llama", "PEFT patched")])
def test_resuming_from_a_checkpoint(tmp_path, name, way):
    """Stopped after two of four steps and resumed in a new model, started elsewhere: the same bits, with dropout."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = trainable_model(name, way, dropout=0.2)
    losses, _ = train(whole, name, tmp_path, **settings)
    resumed = trainable_model(name, way, dropout=0.2, seed=99)
    rest, _ = train(resumed, name, tmp_path, resume=tmp_path / "checkpoint-2", **settings)
    assert rest == losses[2:]
    theirs = adapters(whole)
    assert all(torch.equal(parameter, theirs[key]) for key, parameter in adapters(resumed).items())


def test_what_a_checkpoint_of_a_plain_patched_model_holds(tmp_path):
    """The whole model with the adapters beside its weights, for from_pretrained too; `save_adapter` writes less."""
    model = trainable_model("llama", "patched")
    train(model, "llama", tmp_path, save_strategy="steps", save_steps=4)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in adapters(model).items())
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-4", attn_implementation="eager"
    )
    base = base_model("llama").state_dict()
    assert all(torch.equal(value, base[name]) for name, value in again.state_dict().items())
    fastlora.patch(again, r=4, lora_alpha=6.0)
    again.load_state_dict(saved)
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    fastlora.save_adapter(model, tmp_path / "adapter")
    (small,), (large,) = (list((tmp_path / name).glob("*.safetensors")) for name in ("adapter", "checkpoint-4"))
    assert small.stat().st_size < large.stat().st_size


@PATCHED
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, way):
    """load_best_model_at_end puts the best evaluation's adapter back: the first one's, since this learning rate only
    does harm."""
    model = trainable_model("llama", way)
    settings: dict[str, Any] = {"learning_rate": 3.0, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    _, trainer = train(model, "llama", tmp_path, **settings)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first = trainable_model("llama", way)
    train(first, "llama", tmp_path / "first", learning_rate=3.0, max_steps=1)
    wanted = adapters(first)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in adapters(model).items())


@pytest.mark.slow
@PATCHED
def test_torch_compile_in_the_trainer(peft_s, tmp_path, way):
    model = trainable_model("llama", way)
    try:
        losses, _ = train(model, "llama", tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    finally:
        torch._dynamo.reset()
    assert_same_training(losses, model, *peft_s("llama"))
