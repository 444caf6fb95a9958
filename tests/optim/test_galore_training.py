"""GaLore on real text (bench/galore/training.py): it learns nearly what AdamW does, in every mode; the Trainer too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_batch, tiny_model
from torch.utils.data import Dataset

from bench.galore.training import RANK, WAYS, galore, train
from fastlora.optim import GaLoreAdamW, galore_param_groups

STEPS, RATE = 120, 0.02


@pytest.fixture(scope="module")
def bounds() -> tuple[float, float]:
    """Held-out losses of AdamW on everything, and on everything but the projected weights."""
    return train(WAYS["torch.optim.AdamW"], RATE, STEPS), train(WAYS["projected weights frozen"], RATE, STEPS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"refresh": "svd", "moments": "keep"},
        {"gradients": "hook"},
        {"gradients": "factored", "micro_batches": 4},
        {"optim_bits": 8, "gradients": "factored"},
        {"rank": 32, "proj_type": "reverse_std"},
        {"rank": 64, "proj_type": "full"},
    ],
    ids=str,
)
def test_it_learns_nearly_what_adamw_does(settings, bounds):
    """In a tenth to a half of the directions. The gap to full training is under a quarter of what they learn."""
    settings = dict(settings)
    full, without = bounds
    assert without > full + 0.8
    micro_batches, rank = settings.pop("micro_batches", 1), settings.pop("rank", RANK)
    proj_type = settings.pop("proj_type", "std")

    def build(model: torch.nn.Module, rate: float) -> GaLoreAdamW:
        groups = galore_param_groups(model, rank, update_proj_gap=20, scale=1.0, proj_type=proj_type)
        assert len(groups[0]["params"]) == 3
        return GaLoreAdamW(groups, rate, model=model, **settings)

    loss = train(build, RATE, STEPS, micro_batches=micro_batches)
    assert loss < full + 0.25 * (without - full)


def test_more_directions_learn_more():
    losses = [train(galore(rank), RATE, STEPS) for rank in (1, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True)


class Repeated(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return {name: value[index % 2] for name, value in tiny_batch("llama").items()}


@pytest.mark.parametrize("gradients", ["plain", "hook", "factored"])
def test_trainer_with_accumulation_and_checkpoints(gradients, tmp_path):
    """The same parameters in every mode, and from a run that goes on from a checkpoint, optimiser state included."""

    def run(folder: str, mode: str, resume: str | None = None) -> Any:
        model: Any = tiny_model("llama")
        groups = galore_param_groups(model, 8, update_proj_gap=3)
        optimizer = GaLoreAdamW(groups, lr=1e-2, gradients=mode, model=model, refresh="streamed", max_grad_norm=1.0)
        settings: dict[str, Any] = {"output_dir": str(tmp_path / folder), "report_to": "none", "use_cpu": True}
        settings |= {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        settings |= {"disable_tqdm": True, "save_steps": 4, "max_grad_norm": 0.0, "logging_steps": 1}
        trainer = transformers.Trainer(
            model, transformers.TrainingArguments(**settings), train_dataset=Repeated(), optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    def same(one: Any, other: Any) -> bool:
        pairs = zip(one.parameters(), other.parameters())
        return all((a - b).norm() <= 1e-3 * b.norm() for a, b in pairs)

    plain, taken = run("plain", "plain"), run("taken", gradients)
    assert same(taken, plain) and not same(plain, tiny_model("llama"))
    resumed = run("resumed", gradients, resume=str(tmp_path / "taken" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), taken.parameters()))
