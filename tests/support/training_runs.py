"""The same training three times, from the same adapter on the same batches: PEFT's eager LoRA, PEFT's patched, and a
plain model patched."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from study.data.encoder import DEFAULT_MODEL, MINILM_PACKAGE, find_model
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft.lora import FusedPeftLinear

WAYS = ("PEFT", "PEFT patched", "patched")
R, ALPHA = 4, 6.0
# Adam turns a gradient that is rounding noise into a whole step, which a pretrained model at 1e-2 makes much of.
LEARNING_RATE = {"minilm": 1e-3}


def base_model(name: str, hidden_dropout: float = 0.0) -> Any:
    if name != "minilm":
        return tiny_model(name, hidden_dropout=hidden_dropout)
    pytest.importorskip(MINILM_PACKAGE, reason="MiniLM's weights are not installed")
    source = find_model(DEFAULT_MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the head
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(source, local_files_only=True, num_labels=3, attn_implementation="eager").eval()


def trainable_model(name: str, way: str, *, dropout: float = 0.0, hidden_dropout: float = 0.0, seed: int = 2) -> Any:
    """The model with LoRA on every linear layer, A and B random from the seed and the same for each of WAYS."""
    model = base_model(name, hidden_dropout)
    if way == "patched":
        fastlora.patch(model, r=R, lora_alpha=ALPHA, lora_dropout=dropout, init_lora_weights=False)
    else:
        plain = base_model(name)
        targets = fastlora.patch(plain, r=R).patched
        config = peft.LoraConfig(r=R, lora_alpha=cast(Any, ALPHA), lora_dropout=dropout, target_modules=targets)
        model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapters(model).items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if way == "PEFT patched":
        assert not fastlora.patch(model, strict=True).left_alone
    return model


def assert_fused(model: nn.Module) -> None:
    """Every call of every LoRA layer in a patched PEFT model ran fused."""
    counts = [layer.calls for layer in model.modules() if isinstance(layer, FusedPeftLinear)]
    assert counts
    assert all(count.fused and not count.fallback for count in counts)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by the names that the plain patched model has for them."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def batches(name: str, count: int) -> list[dict[str, Tensor]]:
    """`count` different batches of two rows for `base_model(name)`."""
    example = tiny_batch("bert-classifier" if name == "minilm" else name)
    generator = torch.Generator().manual_seed(7)
    rows = []
    for _ in range(count):
        row = {key: value[:2].clone() for key, value in example.items()}
        for key, value in row.items():
            if key in ("input_ids", "labels") and value.dim() == 2:
                row[key] = torch.randint(3, 61, value.shape, generator=generator)
            elif value.is_floating_point():
                row[key] = torch.randn(value.shape, generator=generator)
        if name == "minilm":
            row["input_ids"] = torch.randint(1000, 3000, row["input_ids"].shape, generator=generator)
        rows.append(row)
    return rows


def examples(name: str, count: int) -> list[dict[str, Tensor]]:
    """The rows of `batches`, one by one, as a Trainer's data set."""
    return [
        {key: value[i] for key, value in batch.items()} for batch in batches(name, (count + 1) // 2) for i in range(2)
    ][:count]


class Losses(transformers.TrainerCallback):
    """Each step's loss as a Trainer logs it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def arguments(out: Path, kind: Any = transformers.TrainingArguments, **settings: Any) -> Any:
    """Four steps of two micro-batches of two on the CPU, every step's loss logged, nothing saved unless asked for."""
    defaults = {
        "output_dir": str(out),
        "max_steps": 4,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(**(defaults | settings))


def train(model: Any, name: str, out: Path, resume: Path | None = None, **settings: Any) -> tuple[list[float], Any]:
    """A transformers Trainer's losses, and the Trainer."""
    losses = Losses()
    settings = {"learning_rate": LEARNING_RATE.get(name, 1e-2)} | settings
    rows: Any = examples(name, 12)
    trainer = transformers.Trainer(
        model=model, args=arguments(out, **settings), train_dataset=rows, eval_dataset=rows, callbacks=[losses]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return losses.losses, trainer


def assert_same_training(got: list[float], model: nn.Module, want: list[float], other: nn.Module) -> None:
    """The same losses step by step, the same adapter at the end (in the norm: Adam makes a step of the rounding noise
    in a single element whose gradient is all but zero), and something was learned."""
    assert len(got) == len(want) > 1
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5)
    assert abs(got[-1] - got[0]) > 1e-3, "nothing was trained"
    ours, theirs = adapters(model), adapters(other)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        difference = (parameter - theirs[name]).norm()
        assert difference <= 1e-3 * theirs[name].norm(), f"{name}: differs by {difference}"
