"""TRL's SFTTrainer on patched models. TRL is optional: without it these tests are skipped."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from training_runs import (
    Losses,
    adapters,
    arguments,
    assert_fused,
    assert_same_training,
    base_model,
    examples,
    through_the_function,
    trainable_model,
)

import fastlora

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

the_function = pytest.fixture(autouse=True)(through_the_function)


def tokenizer() -> Any:
    """Words w3, w4, ... for the tokens of the tiny models."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 61)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def texts() -> Any:
    rows = [{"text": " ".join(f"w{token}" for token in row["input_ids"].tolist())} for row in examples("llama", 12)]
    return datasets.Dataset.from_list(rows)


def sft_trainer(model: Any, out: Any, losses: Losses, peft_config: Any = None, **settings: Any) -> Any:
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(out, trl.SFTConfig, **({"max_length": 16, "bf16": False} | settings)),
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=[losses],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(model: Any, out: Any, **settings: Any) -> list[float]:
    losses = Losses()
    sft_trainer(model, out, losses, **settings).train()
    return losses.losses


@pytest.mark.parametrize("way", ["PEFT patched", "patched"])
def test_the_same_as_peft(tmp_path, way):
    model, other = trainable_model("llama", way), trainable_model("llama", "PEFT")
    assert_same_training(train(model, tmp_path), model, train(other, tmp_path), other)


@pytest.mark.parametrize("settings", [{"packing": True}, {"gradient_checkpointing": True}], ids=str)
def test_settings_of_its_own(tmp_path, settings):
    model, other = trainable_model("llama", "patched"), trainable_model("llama", "PEFT")
    assert_same_training(train(model, tmp_path, **settings), model, train(other, tmp_path, **settings), other)


def test_patching_the_model_that_sft_trainer_made(tmp_path):
    """With `peft_config` SFTTrainer makes the PEFT model: patch `trainer.model`, before training."""
    runs = []
    for patch in (True, False):
        losses = Losses()
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        trainer = sft_trainer(base_model("llama"), tmp_path, losses, config)
        if patch:
            assert len(fastlora.patch(trainer.model).patched) == 14
        trainer.train()
        runs += [losses.losses, trainer.model]
        if patch:
            assert_fused(trainer.model)
    assert_same_training(*runs)


@pytest.mark.parametrize("way", ["PEFT patched", "patched"])
def test_resuming_from_a_checkpoint(tmp_path, way):
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = trainable_model("llama", way, dropout=0.2)
    losses = train(whole, tmp_path, **settings)
    resumed, rest = trainable_model("llama", way, dropout=0.2, seed=99), Losses()
    sft_trainer(resumed, tmp_path, rest, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.losses == losses[2:]
    theirs = adapters(whole)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in adapters(resumed).items())
