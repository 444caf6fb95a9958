"""TRL's trainers on patched models. TRL is optional: without it these tests are skipped."""

from __future__ import annotations

import dataclasses
import importlib
import types
from typing import Any

import accelerate
import peft
import pytest
import torch
from problems import through_the_function
from training_runs import (
    Losses,
    adapters,
    arguments,
    assert_fused,
    assert_same_training,
    base_model,
    examples,
    trainable_model,
)

import fastlora
from fastlora.integrations import trl as trl_calls

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


def words(count: int, seed: int) -> str:
    tokens = torch.randint(3, 61, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{token}" for token in tokens)


def number_of_words(prompts: Any, completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


GENERATING: dict[str, Any] = {"num_generations": 2, "max_completion_length": 5, "temperature": 0.7, "beta": 0.0}
TRAINERS: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {  # settings, columns, other arguments
    "SFT": ({"max_length": 16}, ["text"], {}),
    "DPO": ({"max_length": 16, "use_weighting": True}, ["prompt", "chosen", "rejected"], {"ref_model": None}),
    "KTO": ({"max_length": 16}, ["prompt", "completion"], {"ref_model": None}),
    "GRPO": ({**GENERATING, "entropy_coef": 0.1}, ["prompt"], {"reward_funcs": number_of_words}),
    "RLOO": (GENERATING, ["prompt"], {"reward_funcs": number_of_words}),
}


def any_trainer(kind: str, model: Any, out: Any, losses: Losses, **more: Any) -> Any:
    settings, columns, others = TRAINERS[kind]
    rows = [{column: words(6, 10 * i + j) for j, column in enumerate(columns)} for i in range(12)]
    if kind == "KTO":
        rows = [{**row, "label": i % 2 == 0} for i, row in enumerate(rows)]
    others = {name: base_model("llama") if name == "ref_model" else value for name, value in others.items()}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments(out, getattr(trl, f"{kind}Config"), **({"bf16": False} | settings | more)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[losses],
        **others,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def with_a_head(targets: list[str], dropout: float = 0.0, **options: Any) -> Any:
    model = base_model("llama")
    torch.manual_seed(4)
    fastlora.patch(model, r=4, target_modules=targets, lora_dropout=dropout, init_lora_weights=False, **options)
    return model


def from_logits(model: Any, temperature: float = 1.0, outputs: Any = ("log_probs",), **_: Any) -> None:
    """TRL's `add_fused_lm_head`, from the logits of the model's own forward, in eager PyTorch."""
    own = type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own(self, *args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        z = own(self, *args, **kwargs).logits[:, :-1] / temperature
        mask, p = labels != -100, torch.distributions.Categorical(logits=z)
        scores = {
            "log_probs": p.log_prob(labels.clamp(min=0)),
            "entropy": p.entropy(),
            "is_top1": z.argmax(-1) == labels,
            "mean_logits": z.mean(-1).detach(),
            "log_sum_sq_probs": p.probs.square().sum(-1).log().detach(),
        }
        found = {name: score * mask for name, score in scores.items() if name in outputs}
        return trl.trainer.utils.FusedCausalLMOutput(**found, label_mask=mask)

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("fused_loss", [False, True])
def test_a_patched_head_trains_as_its_logits_do(tmp_path, monkeypatch, kind, fused_loss):
    head = not fused_loss or kind in ("SFT", "DPO")  # and frozen ones
    runs = []
    for way in ("patched", "from logits"):
        model = with_a_head(["q_proj", "lm_head"] if head else ["q_proj"], fused_loss=fused_loss)
        if way == "from logits":
            trl_calls.forget(model)
            module = importlib.import_module(f"trl.trainer.{kind.lower()}_trainer")
            monkeypatch.setattr(module, "add_fused_lm_head", from_logits)
        before = {name: parameter.detach().clone() for name, parameter in adapters(model).items()}
        losses = Losses()
        any_trainer(kind, model, tmp_path, losses).train()
        runs.append((losses.losses, adapters(model)))
    (got, ours), (want, theirs) = runs
    assert len(got) == 4
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5)
    assert sum("lm_head" in name for name in ours) == 2 * head
    for name, parameter in ours.items():
        moved = (theirs[name] - before[name]).norm()
        assert moved > 0 and (parameter - theirs[name]).norm() <= 1e-3 * moved, name


def of(family: str, **settings: Any) -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)


FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Llama": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_field_is_that_of_the_merged_head(family, precision):
    """TRL's own answer with the adapter in the weight, which its forward reads."""
    model = of(family, **FAMILIES[family]).eval()
    fastlora.patch(model, r=4, target_modules=["lm_head"], init_lora_weights=False, use_dora=family == "Llama")
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    trl.trainer.utils.add_fused_lm_head(model, temperature=0.7, outputs=fields)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # the Trainer's of earlier tests
    accelerate.Accelerator(mixed_precision=precision, cpu=True).prepare_model(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    ids = torch.randint(3, 61, (2, 11))
    labels = ids.masked_fill(torch.arange(11) < 4, -100)
    calls: list[dict[str, Any]] = [{"labels": labels, "num_items_in_batch": 9}, {"shift_labels": labels}]
    got = [model(ids, **call, fused_lm_head=True) for call in calls]
    assert model.lm_head.loss_trust is None and model(ids).logits.shape == (2, 11, 61)
    fastlora.merge(model)
    trl_calls.forget(model)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if precision == "no" else {"rtol": 3e-2, "atol": 3e-2}
    for one, call in zip(got, calls, strict=True):
        want = model(ids, **call, fused_lm_head=True)
        assert one.keys() == want.keys() and one.keys() >= {"loss", "label_mask", *fields}
        for name in one.keys() - {"is_top1"} if precision != "no" else one.keys():
            torch.testing.assert_close(one[name], want[name], msg=lambda text, name=name: f"{name}: {text}", **close)


def test_what_cannot_be_trained_raises(tmp_path, monkeypatch):
    """Each names the head. PEFT's adapter on the head is TRL's to refuse."""
    targets = ["q_proj", "lm_head"]
    model = peft.get_peft_model(base_model("llama"), peft.LoraConfig(target_modules=targets))
    fastlora.patch(model)
    for kind in ("DPO", "GRPO"):
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            any_trainer(kind, model, tmp_path, Losses())
    trainer = any_trainer("GRPO", with_a_head(targets), tmp_path, Losses(), cast_lm_head_to_fp32=True)
    with pytest.raises(RuntimeError, match=r"'lm_head' by.*GRPO's cast_lm_head_to_fp32.*leave 'lm_head' out"):
        trainer.train()
    model = with_a_head(targets)
    trainer = any_trainer("SFT", model, tmp_path, Losses())
    trl_calls.forget(model)  # as a TRL that calls otherwise
    with pytest.raises(RuntimeError, match=r"did not call its output head 'lm_head'.*leave 'lm_head' out"):
        trainer.train()
    output = trl.trainer.utils.FusedCausalLMOutput
    other = dataclasses.make_dataclass("Other", [("novelty", Any, None)], bases=(output,))
    for forward, why in ((base_model("llama").forward, "keeps no temperature"), (None, "has other fields.*novelty")):
        model = with_a_head(targets)
        trainer = any_trainer("SFT", model, tmp_path, Losses())
        if forward is not None:
            model.forward = forward
        else:
            monkeypatch.setattr(trl.trainer.utils, "FusedCausalLMOutput", other)
        with pytest.raises(RuntimeError, match=f"'lm_head' by, and fastlora cannot answer the call: .*{why}"):
            trainer.train()
        assert not any(name.startswith("_fastlora_trl") for name in vars(model))


def test_unpatching_leaves_no_hook():
    model = with_a_head(["lm_head"])
    assert model._forward_hooks and model._forward_pre_hooks_with_kwargs
    fastlora.unpatch(model)
    assert not any(table for name, table in vars(model).items() if name.startswith("_forward_") and "hooks" in name)
