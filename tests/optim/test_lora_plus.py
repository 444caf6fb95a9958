"""`fastlora.optim.lora_plus_param_groups`: who is in which group, and training beside PEFT's LoRA+ optimiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from plain_models import Net
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.utils.data import Dataset

import fastlora
from fastlora.integrations.peft.lora import FusedPeftLinear
from fastlora.optim import lora_plus_param_groups

LR, RATIO = 1e-3, 8.0
LINEAR = ["q_proj", "v_proj", "down_proj"]


def peft_model(architecture: str = "llama", **config: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **config}
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(architecture), peft.LoraConfig(**config))


def plain_model() -> Any:
    model = tiny_model("llama")
    fastlora.patch(model, r=4, lora_alpha=8, target_modules=LINEAR)
    return model


def named(model: nn.Module, **settings: Any) -> dict[str, set[str]]:
    """The names of the parameters of every group; asserts that the groups are complete and disjoint."""
    groups = lora_plus_param_groups(model, LR, RATIO, **settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def rates(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter."""
    return {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def train(models: Sequence[Any], optimizers: Sequence[torch.optim.Optimizer], steps: int = 5):
    """Yields the trainable parameters of all the models after every step."""
    batch = tiny_batch("llama")
    for _ in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        yield [[p.detach() for p in model.parameters() if p.requires_grad] for model in models]


# Who is in which group.
@pytest.mark.parametrize("way", ["patched", "PEFT", "PEFT patched"])
def test_a_and_b(way):
    model = plain_model() if way == "patched" else peft_model()
    if way == "PEFT patched":
        fastlora.patch(model)
    groups = named(model)
    assert set(groups) == {"lora_A", "lora_B"}
    assert len(groups["lora_A"]) == len(groups["lora_B"]) == 2 * len(LINEAR)
    for kind in groups:
        assert all(f".{kind}.default" in name for name in groups[kind])
    found = {group["name"]: group for group in lora_plus_param_groups(model, LR, RATIO)}
    assert {name: group["lr"] for name, group in found.items()} == {"lora_A": LR, "lora_B": RATIO * LR}
    assert not any("weight_decay" in group for group in found.values())  # left to the optimiser
    assert [group["lr"] for group in lora_plus_param_groups(model, LR)] == [LR, 16 * LR]


def test_embeddings_heads_biases_and_magnitudes():
    model = peft_model(
        "bert-classifier",
        target_modules=["query", "word_embeddings"],
        modules_to_save=["classifier", "bert.encoder.layer.0.output.LayerNorm"],
    )
    groups = named(model, weight_decay=0.1)
    assert {name: len(found) for name, found in groups.items()} == {
        "lora_A": 2,
        "lora_embedding": 2,
        "lora_B": 2,
        "other": 1,
        "other_no_decay": 3,
    }
    assert all(".word_embeddings.lora_embedding_" in name for name in groups["lora_embedding"])
    assert groups["other"] == {"base_model.model.classifier.modules_to_save.default.weight"}
    found = {
        group["name"]: (group["lr"], group["weight_decay"])
        for group in lora_plus_param_groups(model, LR, RATIO, weight_decay=0.1, embedding_lr=2e-6)
    }
    assert found == {
        "lora_A": (LR, 0.1),
        "lora_embedding": (2e-6, 0.1),
        "lora_B": (RATIO * LR, 0.1),
        "other": (LR, 0.1),
        "other_no_decay": (LR, 0.0),
    }
    optimizer = torch.optim.AdamW(lora_plus_param_groups(model, LR), weight_decay=0.3)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert all(value == (0.0 if name.endswith("_no_decay") else 0.3) for name, value in decays.items())


def test_biases_of_b_learn_at_its_rate_and_do_not_decay():
    model = peft_model(target_modules=["q_proj"], lora_bias=True)
    groups = named(model)
    assert {name: len(found) for name, found in groups.items()} == {"lora_A": 2, "lora_B": 2, "lora_B_no_decay": 2}
    assert all(name.endswith("lora_B.default.bias") for name in groups["lora_B_no_decay"])
    last = lora_plus_param_groups(model, LR, RATIO, weight_decay=0.1)[-1]
    assert (last["name"], last["lr"], last["weight_decay"]) == ("lora_B_no_decay", RATIO * LR, 0.0)


def test_dora_magnitudes_learn_at_the_rate_of_a():
    groups = named(peft_model(use_dora=True))
    assert len(groups["other_no_decay"]) == 2 * len(LINEAR)
    assert all("lora_magnitude_vector" in name for name in groups["other_no_decay"])
    torch.manual_seed(0)
    convolution = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(3, 4, 3)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    assert {name: len(found) for name, found in named(convolution).items()} == {
        "lora_A": 1,
        "lora_B": 1,
        "other_no_decay": 1,
    }


def test_started_factors_of_lora_ga():
    """After LoRA-GA PEFT's factors are called `trained`."""
    model = peft_model()
    fastlora.patch(model)
    with fastlora.GradientSketch(model, r=4) as sketch:
        model(**tiny_batch("llama")).loss.backward()
    fastlora.init_lora_ga(model, sketch)
    groups = named(model)
    assert set(groups) == {"lora_A", "lora_B"}
    assert all(name.endswith("lora_B.default.trained") for name in groups["lora_B"])


@pytest.mark.parametrize("way", ["patched", "PEFT"])
def test_only_what_is_trainable_and_by_the_adapters_place(way):
    """Frozen A, frozen adapters, and adapters whose names look like something else."""
    if way == "patched":
        model: Any = Net()
        fastlora.patch(model, r=2, adapter_name="lora_B", target_modules=["up"])
        for block in model.blocks:
            block.up.add_adapter("bias", r=2, lora_alpha=2)
        assert {len(found) for found in named(model).values()} == {2}  # the new adapter is frozen until it is set
        fastlora.set_adapter(model, ["lora_B", "bias"])
    else:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["up"])
        model = peft.get_peft_model(Net(), config, adapter_name="lora_B")
        model.add_adapter("bias", config)
        assert {len(found) for found in named(model).values()} == {2}
        model.base_model.set_adapter(["lora_B", "bias"])
    groups = named(model)
    assert set(groups) == {"lora_A", "lora_B"}
    assert len(groups["lora_A"]) == len(groups["lora_B"]) == 4
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    assert named(model) == {"lora_B": groups["lora_B"]}


def test_tied_parameters_come_once():
    model: Any = Net()
    fastlora.patch(model, r=2, target_modules=["up"])
    first, second = (block.up for block in model.blocks)
    second.lora_A["default"] = first.lora_A["default"]
    assert named(model) == {
        "lora_A": {"blocks.0.up.lora_A.default"},
        "lora_B": {f"blocks.{i}.up.lora_B.default" for i in (0, 1)},
    }


def test_norms_of_any_shape_do_not_decay():
    model: Any = Net()
    fastlora.patch(model, r=2, target_modules=["up"])
    model.norm = nn.LayerNorm([2, 3])
    model.scale = nn.Parameter(torch.ones(3))
    model.expert_bias = nn.Parameter(torch.ones(2, 3))
    model.head.weight.requires_grad_(True)
    groups = named(model)
    assert groups["other"] == {"head.weight"}
    assert groups["other_no_decay"] == {"norm.weight", "norm.bias", "scale", "expert_bias"}


def test_errors():
    model = plain_model()
    for ratio in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"lora_plus_param_groups: ratio: got .*, want a positive number"):
            lora_plus_param_groups(model, LR, ratio)
    for name in ("lr", "embedding_lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name}: got -1.0, want a number that is not negative"):
            lora_plus_param_groups(model, **{"lr": LR, name: -1})
    with pytest.raises(ValueError, match="no LoRA's among them, want one after"):
        lora_plus_param_groups(Net(), LR)
    with pytest.raises(ValueError, match="without trainable parameters, want one after"):
        lora_plus_param_groups(model.requires_grad_(False), LR)


# Beside PEFT's optimiser.
def peft_optimizer(model: Any, **settings: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, **settings)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_same_rates_as_peft(decay):
    """Embeddings and 2-D modules to save included; only 1-D parameters that are not B's are another matter."""
    model = peft_model(target_modules=[*LINEAR, "embed_tokens"], modules_to_save=["lm_head"])
    theirs = peft_optimizer(model, loraplus_weight_decay=decay)
    ours = torch.optim.AdamW(lora_plus_param_groups(model, LR, RATIO, weight_decay=decay))
    assert rates(ours) == rates(theirs)


def test_where_peft_differs():
    """PEFT trains every 1-D parameter at B's rate, and lets DoRA's magnitudes decay. As docs/answers.md says."""
    model = peft_model("bert-classifier", target_modules=["query"], modules_to_save=["classifier"], use_dora=True)
    theirs = rates(peft_optimizer(model, loraplus_weight_decay=0.1))
    ours = rates(torch.optim.AdamW(lora_plus_param_groups(model, LR, RATIO, weight_decay=0.1)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    differing = {names[key]: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    assert differing == {
        "base_model.model.classifier.modules_to_save.default.bias": ((LR, 0.0), (RATIO * LR, 0.0)),
        **{
            name: ((LR, 0.0), (RATIO * LR, 0.1))
            for name in names.values()
            if name.endswith("lora_magnitude_vector.default.weight")
        },
    }
    assert len(differing) == 3
    model = peft_model(modules_to_save=["model.norm"])  # an RMSNorm
    (norm,) = [p for name, p in model.named_parameters() if "model.norm.modules_to_save" in name]
    assert rates(peft_optimizer(model, loraplus_weight_decay=0.1))[id(norm)] == (RATIO * LR, 0.1)
    assert rates(torch.optim.AdamW(lora_plus_param_groups(model, LR, RATIO, weight_decay=0.1)))[id(norm)] == (LR, 0.0)


def test_trains_as_peft_does_step_by_step():
    model = peft_model(init_lora_weights=False)
    theirs, ours, patched = model, copy.deepcopy(model), copy.deepcopy(model)
    fastlora.patch(patched)
    optimizers = [peft_optimizer(theirs, loraplus_weight_decay=0.1)]
    optimizers += [
        torch.optim.AdamW(lora_plus_param_groups(one, LR, RATIO, weight_decay=0.1)) for one in (ours, patched)
    ]
    before = [p.detach().clone() for p in theirs.parameters() if p.requires_grad]
    for want, same, fused in train([theirs, ours, patched], optimizers):
        assert all(torch.equal(a, b) for a, b in zip(want, same, strict=True))
        for a, b in zip(want, fused, strict=True):
            # Adam makes a step of the rounding noise in an element whose gradient is all but zero.
            assert (a - b).norm() <= 1e-3 * a.norm()
    assert all(not torch.equal(a, b) for a, b in zip(before, want, strict=True))
    assert any(isinstance(layer, FusedPeftLinear) for layer in patched.modules())


# In optimisers, schedulers and the Trainer.
class Repeated(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return {name: value[index % 2] for name, value in tiny_batch("llama").items()}


def test_trainer_takes_the_optimiser(tmp_path):
    model = plain_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(lora_plus_param_groups(model, LR, RATIO))
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    settings |= {"max_steps": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear", "logging_steps": 1}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**settings), train_dataset=Repeated(), optimizers=(optimizer, None)
    )
    seen = []
    optimizer.register_step_post_hook(lambda used, *_: seen.append([group["lr"] for group in used.param_groups]))
    trainer.train()
    want = [[LR * (1 - step / 4), RATIO * LR * (1 - step / 4)] for step in range(4)]
    assert seen == [pytest.approx(pair) for pair in want]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([pair[0] for pair in want])  # the log has the first group's, A's
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.requires_grad)
