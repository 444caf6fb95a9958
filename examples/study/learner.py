"""A contestant on its way: the model prepared as its entry says, its optimisers, its steps, their peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastlora
from study import processes
from study.contestants import Contestant
from study.curves import share_of_peak

if TYPE_CHECKING:
    from study.tasks.task import Task


class Learner:
    """One model in training. Its starting point comes from the task, the entry and the seed alone."""

    def __init__(self, task: Task, entry: Contestant, lr: float, seed: int, steps: int):
        self.task, self.entry = task, entry
        self.model = prepared_model(task, entry, seed)
        self.adapted = task.adapted(self.model)
        self.wrapped = processes.wrapped(self.model, task.settings, task.device)  # what a step calls
        self.optimizers: list[torch.optim.Optimizer] = []
        if any(parameter.requires_grad for parameter in self.adapted.parameters()):
            self.optimizers.append(make_optimizer(task, entry, self.adapted, lr))
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
        """The numbers that optimisers, and AdaLoRA's averages, keep next to the parameters; counters are left out."""
        tensors = {(tensor.data_ptr(), tensor.numel()): tensor for tensor in self._state_tensors()}
        return sum(tensor.numel() for tensor in tensors.values() if tensor.numel() > 1)

    def step(self, shares: Sequence[tuple[float, Any]]) -> float:
        """One optimiser step on what `Task.shares` returned; returns the loss of the whole batch before it, without
        AdaLoRA's penalty.
        """
        set_training(self.model, True)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i, (share, batch) in enumerate(shares, 1):
            with processes.accumulating(self.wrapped, i == len(shares)):
                loss = self.task.loss(self.wrapped, batch)
                total += share * loss.item()
                if self.allocator is not None:
                    gamma = self.entry.numbers["orthogonality"]
                    loss = loss + fastlora.variants.orthogonality_penalty(self.adapted, gamma=gamma)
                (loss * (share * processes.WORLD)).backward()  # the wrappers average over the processes
        for optimizer, scheduler in zip(self.optimizers, self.schedulers):
            optimizer.step()
            scheduler.step()
        if self.allocator is not None:
            self.allocator.step()
        return processes.total(total)

    def peak_bytes(self, shares: Sequence[tuple[float, Any]]) -> int:
        """What this process owns (weights, adapters, optimiser state), and the most that one step adds to that."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # the profiler does not see old gradients go
        owned = tensor_bytes([*self.model.parameters(), *self.model.buffers(), *self._state_tensors()])
        return owned + peak_growth(lambda: self.step(shares), self.task.device)

    def notes(self) -> dict[str, Any]:
        """What shows that the method ran: facts of its own next to the numbers that all have."""
        notes: dict[str, Any] = {}
        rates = {group["name"]: group["initial_lr"] for group in self.optimizers[0].param_groups if "name" in group}
        if rates:
            notes["rates"] = rates
        if "captured" in self.entry.numbers:
            notes["ranks"] = {name: layer.r["default"] for name, layer in lora_layers(self.adapted).items()}
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
        adapted.requires_grad_(entry.library != "none")
        if entry.library == "none":  # the floor: gradients run through every layer and stay nowhere
            task.embeddings(adapted).register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return model
    settings = task.settings
    arguments: dict[str, Any] = {
        "r": round(settings.r * entry.rank_share),
        "lora_alpha": settings.lora_alpha * entry.rank_share,  # α/r is then what it is for the others
        "lora_dropout": settings.dropout,
        **task.targets,
        **entry.adapter,
    }
    torch.manual_seed(seed)
    if settings.base != "full":
        model = adapted = with_peft(adapted, arguments)
        if entry.library == "fastlora":
            fastlora.patch(adapted, strict=True, **entry.patch)
    elif entry.library == "peft":
        inject_peft(adapted, arguments)
    elif "captured" not in entry.numbers:  # else the gradients say with which ranks
        fastlora.patch(adapted, **{**arguments, "strict": True, **entry.patch})
    if entry.start:
        batches = task.gradient_batches(seed)

        def passes() -> None:
            task.backward_passes(model, batches)

        start_from_gradients(task, entry, adapted, passes, seed)
        model.zero_grad(set_to_none=True)
    return model


def inject_peft(adapted: nn.Module, arguments: Mapping[str, Any]) -> None:
    """PEFT's layers with float32 adapters, as `get_peft_model` makes them, in the module itself."""
    import peft

    chosen = {"target_modules": "all-linear", **arguments}
    peft.inject_adapter_in_model(peft.LoraConfig(**chosen), adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def with_peft(model: Any, arguments: Mapping[str, Any]) -> Any:
    """The model in PEFT's wrapper: the one way to adapters on a quantised base."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **arguments))


@torch.no_grad()
def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the adapter weights of `source`, PEFT's or fastlora's, so that both start from the same point.

    Raises RuntimeError where the two do not adapt the same layers in the same shapes: a comparison would mean nothing.
    """

    def factors(adapted: nn.Module) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{holder}": getattr(value, "weight", value)
            for name, layer in lora_layers(adapted).items()
            for holder in ("lora_A", "lora_B")
            for value in getattr(layer, holder).values()
        }

    ours, theirs = factors(source), factors(target)
    shapes = [{name: tuple(tensor.shape) for name, tensor in found.items()} for found in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"adapted layers differ: {shapes[0]} and {shapes[1]}")
    for name, tensor in ours.items():
        theirs[name].copy_(tensor)


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


def set_training(model: nn.Module, training: bool) -> None:
    """Train or eval mode for the adapters; everything else stays in eval mode, in every method.

    A pretrained model's own dropout is off, that is: a run sees each text twice or so, too little to overfit, and
    without it two ways to compute LoRA compute the very same function of the batch.
    """
    model.eval()
    if training:
        for module in model.modules():
            if hasattr(module, "lora_A") or hasattr(module, "loss_trust"):  # the head of a fused loss
                module.train()


def start_from_gradients(
    task: Task, entry: Contestant, adapted: nn.Module, passes: Callable[[], object], seed: int
) -> dict[str, float]:
    """Sets the adapters of the module `adapted` from the gradient of `passes`, which runs backward passes of equal
    weight. The entry's start: "lora_ga", "sign" (`fastlora.sign_factors` by direct minimisation) or "sign_svd" (by the
    SVD of sign(G)). Its number "captured": patches the module too, each layer with the least rank, at most "most" times
    r, that holds this share of its gradient. Returns `init_lora_ga`'s relative sizes.
    """
    settings, numbers = task.settings, entry.numbers
    # The loss is a mean over equally many examples in each batch, and not every model is called with its labels.
    chosen = {**task.targets, "r": settings.r, "seed": seed, "weighting": "equal"}
    how: dict[str, Any] = {"gamma": numbers["gamma"], "seed": seed}
    if entry.start == "lora_ga":
        most = numbers.get("most", 0) * settings.r
        with fastlora.GradientSketch(adapted, **chosen, width=2 * most or settings.sketch_width) as found:
            passes()
        if "captured" in numbers:
            how |= {"lora_alpha": settings.lora_alpha, "lora_dropout": settings.dropout}
            how["ranks"] = fastlora.allocate_ranks(found, captured=numbers["captured"], max_rank=most)
    else:
        method = "svd" if entry.start == "sign_svd" else "direct"
        every_layer = sum(1 for _ in adapted.modules())  # their gradients fit side by side in models of this size
        found = fastlora.sign_factors(adapted, passes, method=method, layers_at_once=every_layer, **chosen)
    return fastlora.init_lora_ga(adapted, found, **how)


def peak_growth(step: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the allocator's live tensors exceed, at the highest point of `step()`, what was live before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    recorded: list[Any] = recording.profiler.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once however many views share it."""
    own: list[Any] = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own}
    return sum(storages.values())
