"""A contestant on its way: the model prepared as its entry says, its optimisers, its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

import fastlora
from study.adapting import set_training, start_from_gradients
from study.contestants import Contestant
from study.memory import peak_growth, tensor_bytes
from study.schedule import share_of_peak
from study.tasks.task import Task


class Learner:
    """One model in training. Its starting point comes from the task, the entry and the seed alone."""

    def __init__(self, task: Task, entry: Contestant, lr: float, seed: int, steps: int):
        self.task, self.entry = task, entry
        self.model = prepared_model(task, entry, seed)
        self.adapted = task.adapted(self.model)
        self.optimizers = [make_optimizer(task, entry, self.adapted, lr)]
        if head := task.head(self.model):
            self.optimizers.append(torch.optim.AdamW(head, lr=task.settings.head_lr or lr, weight_decay=0.0))
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak(step, steps))
            for optimizer in self.optimizers
        ]
        self.allocator: Any = None
        if entry.uses("use_adalora"):
            self.allocator = rank_allocator(entry, self.adapted, task.settings.r, steps)

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def optimizer_state(self) -> int:
        """The numbers that optimisers, and AdaLoRA's averages, keep beside the parameters; counters are left out."""
        tensors = {(tensor.data_ptr(), tensor.numel()): tensor for tensor in self._state_tensors()}
        return sum(tensor.numel() for tensor in tensors.values() if tensor.numel() > 1)

    def step(self, batch: Any) -> float:
        """One optimiser step; returns the task's loss before it, without AdaLoRA's penalty."""
        set_training(self.model, True)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, batch)
        if self.allocator is None:
            loss.backward()
        else:
            gamma = self.entry.numbers["orthogonality"]
            (loss + fastlora.variants.orthogonality_penalty(self.adapted, gamma=gamma)).backward()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers):
            optimizer.step()
            scheduler.step()
        if self.allocator is not None:
            self.allocator.step()
        return loss.item()

    def peak_bytes(self, batch: Any) -> int:
        """What it owns (weights, adapters, optimiser state), and the most that one step adds to that."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # the profiler does not see old gradients go
        owned = tensor_bytes([*self.model.parameters(), *self.model.buffers(), *self._state_tensors()])
        return owned + peak_growth(lambda: self.step(batch), self.task.device)

    def notes(self) -> dict[str, Any]:
        """What shows that the method ran: facts of its own beside the numbers that all have."""
        notes: dict[str, Any] = {}
        rates = {group["name"]: group["initial_lr"] for group in self.optimizers[0].param_groups if "name" in group}
        if rates:
            notes["rates"] = rates
        if self.entry.uses("use_dora"):
            notes["magnitudes"] = sum(m.numel() for m in parameters_named(self.adapted, "lora_magnitude_vector"))
        if self.allocator is not None:
            ranks, layers = self.allocator.ranks, lora_layers(self.adapted)
            cut = {name: layer.r["default"] - ranks[name] for name, layer in layers.items()}
            fewer = sum(cut[name] * (layer.in_features + layer.out_features + 1) for name, layer in layers.items())
            notes |= {"ranks": sum(ranks.values()), "trainable at the end": self.trainable - fewer}
        return notes

    def _state_tensors(self) -> Iterator[torch.Tensor]:
        for optimizer in self.optimizers:
            yield from tensors_in(optimizer.state)
        if self.allocator is not None:
            yield from tensors_in(self.allocator)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dictionaries, lists, tuples and objects that are no modules; but no parameters."""
    if isinstance(value, torch.Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        yield from tensors_in(vars(value))


def lora_layers(adapted: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}


def parameters_named(adapted: nn.Module, holder: str) -> Iterator[nn.Parameter]:
    """The adapters' parameters of one kind: lora_A, lora_B, lora_E, lora_magnitude_vector."""
    for layer in lora_layers(adapted).values():
        yield from getattr(layer, holder).values()


def prepared_model(task: Task, entry: Contestant, seed: int) -> nn.Module:
    """A fresh model in which what the entry trains requires a gradient, and the rest does not."""
    model = task.fresh_model(seed)
    adapted = task.adapted(model)
    if entry.adapter is None:
        adapted.requires_grad_(True)
        return model
    settings = task.settings
    arguments: dict[str, Any] = {
        "r": round(settings.r * entry.rank_share),
        "lora_alpha": settings.lora_alpha * entry.rank_share,  # α/r is then what it is for the others
        "lora_dropout": settings.dropout,
        "strict": True,
        **task.targets,
        **entry.adapter,
    }
    torch.manual_seed(seed)
    fastlora.patch(adapted, **arguments)
    if entry.start:
        batches = task.gradient_batches(seed)

        def passes() -> None:
            task.backward_passes(model, batches)

        gamma = entry.numbers["gamma"]
        start_from_gradients(entry.start, adapted, passes, settings.r, gamma, seed, task.targets)
        model.zero_grad(set_to_none=True)
    return model


def make_optimizer(task: Task, entry: Contestant, adapted: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimiser of everything but the task's head. No weight decay; SGD without momentum."""
    groups: list[dict[str, Any]]
    if entry.groups == "galore":
        groups = fastlora.optim.galore_param_groups(adapted, rank=task.settings.r, **entry.numbers, **task.targets)
        return fastlora.optim.GaLoreAdamW(groups, lr=lr, weight_decay=0.0)
    if entry.groups == "lora_plus":
        groups = fastlora.optim.lora_plus_param_groups(adapted, lr, **entry.numbers)
    else:
        groups = [{"params": [parameter for parameter in adapted.parameters() if parameter.requires_grad], "lr": lr}]
    if task.settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)


def rank_allocator(entry: Contestant, adapted: nn.Module, r: int, steps: int) -> Any:
    """AdaLoRA's, which brings the ranks down to r a layer on average."""
    numbers = entry.numbers
    return fastlora.variants.RankAllocator(
        adapted,
        target_r=r,
        total_steps=steps,
        t_init=round(numbers["initial"] * steps),
        t_final=round(numbers["final"] * steps),
        delta_t=max(1, round(numbers["interval"] * steps)),
    )
