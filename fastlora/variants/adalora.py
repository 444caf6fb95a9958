"""`RankAllocator`: AdaLoRA's ranks, dealt out among the layers while they train (Zhang et al. 2023, arXiv 2303.10512).

    I = |w·∇w|      Ī ← β₁Ī + (1 − β₁)I      Ū ← β₂Ū + (1 − β₂)|I − Ī|      s = Ī·Ū        for every w of P, Λ, Q
    S_i = s(λ_i) + mean s(P_·i) + mean s(Q_i·)        for every triplet; the best b(t) of all layers' keep their λ

The averages are kernels/importance.py's business (ATen's on a CPU), the budget b(t) layers/schedule.py's. Scores, order
and masks stay on the device: nothing is read back but the final pattern, once, and where an optimiser skips steps by
itself (fused, under a GradScaler) whether it does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.peft import ranks as peft_ranks
from ..introspect import sharding, targets
from ..kernels.importance_plan import Averages, Factors, Layout
from ..layers.linear import FusedLoraLinear
from ..layers.schedule import Allocation, RankSchedule
from ..ops.importance import importance as importance_op
from ..optim import moments
from .factors import FACTORS, adalora_layers, factors_of

_WHERE = "RankAllocator"


class _Part:
    """The layers of one device, dtype and mesh: their Ī and Ū (float32, or float64), and their latest scores.

    Under `fully_shard` a process has rows of Λ and Q, which are whole triplets, and rows of P, a part of every triplet.
    Each of the two is a layer of its own to the kernels, with zeros, one a rank, for what it lacks. A mean over some
    rows of P counts by its share of them all, and one sum over the processes gives every score.
    """

    def __init__(
        self,
        layers: list[int],
        factors: list[tuple[Any, Any, Any]],
        schedule: RankSchedule,
        device: torch.device,
        dtype: torch.dtype,
        mesh: Any,
    ) -> None:
        self.layers, self.mesh = layers, mesh
        self.device, self.dtype = device, dtype
        kind = torch.promote_types(dtype, torch.float32)
        self.ranks = [q.shape[0] for q, _, _ in factors]
        self.total_rank = sum(self.ranks)
        self.at: dict[tuple[str, int], int] = {}  # where the layout has a factor of a layer
        sizes: list[tuple[int, int, int]] = []
        where: list[int] = []
        shares: list[float] = []
        for i, (q, p, e) in enumerate(factors):
            (r, k), n, own_n = q.shape, p.shape[0], sharding.local(p.detach()).shape[0]
            first = sum(self.ranks[:i])
            every = torch.arange(first, first + r)
            own = sharding.local(sharding.spread(every, e))
            split = ("qe", own, (len(own), k, 1), 1.0), ("p", every, (r, 1, own_n), own_n / n)
            for names, ranks, size, share in [("qpe", every, (r, k, n), 1.0)] if mesh is None else split:
                if 0 not in size:
                    self.at |= {(name, i): len(sizes) for name in names}
                    sizes.append(size)
                    where += ranks.tolist()
                    shares += [share] * len(ranks)
        self.layout = Layout(sizes)
        self.sensitivity, self.uncertainty = (
            torch.zeros(self.layout.numel, device=device, dtype=kind) for _ in range(2)
        )
        self.averages = Averages(self.layout, self.sensitivity, self.uncertainty, schedule.beta1, schedule.beta2)
        self.scores = torch.zeros(self.total_rank, device=device, dtype=kind)
        self.where = torch.tensor(where, dtype=torch.int64, device=device)
        self.shares = torch.tensor(shares, dtype=kind, device=device)
        self.zero = torch.zeros(max([r for r, _, _ in sizes], default=0), device=device, dtype=dtype)

    def views(self, name: str, i: int) -> list[Tensor]:
        """Ī and Ū of a layer's factor, as far as they are here; nothing where this process has no rows."""
        at = self.at.get((name, i))
        return [] if at is None else [self.layout.view(f, name, at) for f in (self.sensitivity, self.uncertainty)]

    def whole(self, name: str, i: int, size: tuple[int, int, int]) -> Tensor:
        """Ī and Ū (2, *shape) of a layer's factor, from all processes."""
        shape = Layout([size]).shape(name, 0)
        own = torch.stack(self.views(name, i) or [self.scores.new_zeros(0, shape[1])] * 2)
        return own if self.mesh is None else sharding.whole(sharding.of_parts(own, self.mesh, (2, *shape), dim=1))

    def placed(self, factors: Factors, padded: bool) -> Factors:
        """The factors, or their gradients, as the layout has them; zeros for those that it lacks, if `padded`."""
        if self.mesh is None:
            return factors
        placed: dict[str, list[Tensor | None]] = {name: [None] * len(self.layout.sizes) for name in Factors._fields}
        for (name, i), at in self.at.items():
            placed[name][at] = sharding.local(getattr(factors, name)[i])
        for name, at in itertools.product(Factors._fields, range(len(self.layout.sizes) if padded else 0)):
            if placed[name][at] is None:
                placed[name][at] = self.zero[: self.layout.sizes[at][0]].view(self.layout.shape(name, at))
        return Factors(**placed)

    def update(self, weights: Factors, rate: Tensor | None) -> None:
        """Ī, Ū and the scores after one step."""
        gradients = Factors(*([None if w is None else w.grad for w in tensors] for tensors in weights))
        weights, gradients = self.placed(weights, padded=True), self.placed(gradients, padded=False)
        scores = torch.zeros_like(self.scores)
        if self.layout.sizes:
            scores = importance_op.select(weights).update(self.averages, weights, gradients, rate)
        if self.mesh is not None:
            own = scores[: len(self.shares)] * self.shares  # of the layout's layers, or of none
            scores = torch.zeros_like(self.scores).index_add_(0, self.where, own)
            torch.distributed.all_reduce(scores, group=self.mesh.get_group())
        self.scores = scores


class RankAllocator:
    """Deals AdaLoRA's ranks out among a model's layers, and masks the λ of the others, step by step.

    Either call `step()` once a step, between `optimizer.step()` and `zero_grad()`; or `follow(optimizer)` once, and
    nothing more. docs/details/adalora.md says how they differ. Masked are λ only: P and Q go on learning, and a triplet
    comes back where its score is among the best again. After step `total_steps - t_final` the pattern stays, and each
    further step keeps the masked λ at zero: without the allocator they train like any others. `shrink_to_ranks` cuts
    them off.

    Args:
        model: patched with `use_adalora=True`, or with PEFT's AdaLoRA layers, patched or not. Under
            DistributedDataParallel every process has the same gradients, and so the same masks. Under `fully_shard`
            the processes sum a number a triplet; `state_dict` is whole, and every process calls it.
        target_r: b_T is this many ranks for each layer, on average; at most what they have.
        total_steps: T, of the optimiser.
        t_init: steps in which all are kept.
        t_final: steps at the end, in which the pattern stays.
        delta_t: in between, masks are made at every step that is a multiple of it.
        beta1, beta2: of the averages Ī and Ū.
        adapter_name: which adapter.

    A layer without a gradient in a step counts as one whose gradient is zero. Scores that are equal: the earlier
    layer's, and of one layer the first, are kept, so that it is b(t) exactly.

    Raises:
        ValueError: no such adapter; a value out of range, a target_r above the average rank; parameters sharded over
            processes otherwise than by `fully_shard` (FSDP1, ZeRO-3).

    Examples:
        >>> allocator = fastlora.variants.RankAllocator(model, target_r=8, total_steps=1000, t_init=100, t_final=200)
        >>> for batch in batches:
        ...     (model(**batch).loss + fastlora.variants.orthogonality_penalty(model)).backward()
        ...     optimizer.step()
        ...     allocator.step()
        ...     optimizer.zero_grad()
        >>> allocator.ranks

    Source: Zhang et al. 2023, AdaLoRA, arXiv 2303.10512, equations 7 to 13.
    """

    def __init__(
        self,
        model: nn.Module,
        target_r: int,
        total_steps: int,
        t_init: int = 0,
        t_final: int = 0,
        delta_t: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        adapter_name: str = "default",
    ) -> None:
        self.schedule = RankSchedule(target_r, total_steps, t_init, t_final, delta_t, beta1, beta2).checked(_WHERE)
        self.adapter_name = adapter_name
        self._model = targets.unwrap(model, _WHERE)
        self._layers = adalora_layers(model, adapter_name, _WHERE, shards=True)
        self._names = list(self._layers)
        factors = [factors_of(layer, adapter_name) for layer in self._layers.values()]
        self._sizes = [(q.shape[0], q.shape[1], p.shape[0]) for q, p, _ in factors]
        self.initial_budget = sum(r for r, _, _ in self._sizes)
        self.target_budget = target_r * len(self._layers)
        if self.target_budget > self.initial_budget:
            raise ValueError(
                f"{_WHERE}: target_r: got {target_r}, want at most {self.initial_budget / len(self._layers):g}, the "
                "average rank that the layers begin with"
            )
        self.steps = 0  # taken so far
        self._parts: list[_Part] = []
        self._placement: list[tuple | None] = []
        self._kept: Tensor | None = None  # (b_0,) bool, in the parts' order: None before the first masks
        self._count = self.initial_budget  # of the ranks that are kept
        self._masks: list[list[Tensor]] = []  # by part and layer (r, 1), in λ's dtype
        self._final: dict[str, list[bool]] | None = None
        self._cut = False  # by shrink_to_ranks
        self._hooks: list[Any] = []
        self._sharded = sharding.has_shards(self._model)
        self._skipped = False  # the step that a followed optimiser is in
        self._place()
        self._record()

    # What it knows.

    def budget(self, t: int) -> int:
        """b(t): how many triplets are kept after step t."""
        return self.schedule.budget(t, self.initial_budget, self.target_budget)

    @property
    def is_final(self) -> bool:
        """Whether the pattern does not change any more."""
        return self._final is not None

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """Which of the ranks that a layer began with are kept now. Read from the device, until it is final."""
        if self._final is not None:
            return {name: list(kept) for name, kept in self._final.items()}
        if self._kept is None:
            return {name: [True] * r for name, (r, _, _) in zip(self._names, self._sizes, strict=True)}
        return {name: kept.tolist() for name, kept in self._by_layer(self._kept.cpu()).items()}

    @property
    def ranks(self) -> dict[str, int]:
        """How many ranks each layer keeps now."""
        return {name: sum(kept) for name, kept in self.rank_pattern.items()}

    @property
    def scores(self) -> dict[str, Tensor]:
        """S (r,) of each layer, of the latest step."""
        return {name: scores.clone() for name, scores in self._by_layer(self._flat_scores()).items()}

    def __repr__(self) -> str:
        schedule = self.schedule
        return (
            f"{_WHERE}({len(self._layers)} layers, step {self.steps} of {schedule.total_steps}, {self._count} of "
            f"{self.initial_budget} ranks, {self.target_budget} from step {schedule.last} on"
            f"{', following an optimiser' if self._hooks else ''})"
        )

    # Running.

    def step(self) -> None:
        """Ends a step: after `optimizer.step()`, before `zero_grad()`. The importance is that of the weights after the
        step, with the gradients that it was made with, as in the paper's code.

        Raises ValueError while an optimiser is followed, and where no factor has a gradient.
        """
        if self._hooks:
            raise ValueError(
                f"{_WHERE}.step: an optimiser is followed, whose steps are counted already; want one of the two: leave "
                "this call out, or call release() first"
            )
        self._observe()
        self._advance()

    def follow(self, optimizer: torch.optim.Optimizer) -> RankAllocator:
        """Hooks itself into `optimizer.step()`, so that `step` need not be called: before it the importance, of the
        weights that the gradients belong to (the paper's Algorithm 1), after it the masks. `release` ends it.

        In a loop of your own, in transformers' Trainer, under a GradScaler (steps that it skips do not count), with a
        closure. A copy of the allocator, or one that was pickled, follows nothing: call this again.

        Raises ValueError where an optimiser is followed already, or this one does not train every λ.
        """
        caller = f"{_WHERE}.follow"
        if self._hooks:
            raise ValueError(f"{caller}: an optimiser is followed already, want release() first")
        lambdas = [factors_of(layer, self.adapter_name)[2] for layer in self._layers.values()]
        moments.check_optimizer(optimizer, lambdas, caller)
        optimizer = moments.unwrapped(optimizer)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, e in zip(self._names, lambdas, strict=True) if id(e) not in trained]
        if missing:
            raise ValueError(
                f"{caller}: optimizer: this {type(optimizer).__name__} does not have the lora_E of {missing[0]!r} and "
                f"{len(missing) - 1} other layers, want one optimiser for all"
            )
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def release(self) -> None:
        """Takes the hooks away again. What is masked stays zero only until the next training step, unless `step` is
        called after it, or `shrink_to_ranks` before."""
        while self._hooks:
            self._hooks.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": []}  # they are of the optimiser that was followed

    def _before_step(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        # Both set by a GradScaler, where the optimiser itself unscales, and skips: only then is anything waited for.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf)
        if self._skipped:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser
        rate = None if scale is None else scale.detach().reshape(1).reciprocal()
        if closure is None:
            self._observe(rate)
            return None
        observed = functools.partial(_then, closure, lambda: self._observe(rate), [])
        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    def _after_step(self, *_: Any) -> None:
        if not self._skipped:
            self._advance()

    @torch.no_grad()
    def _observe(self, rate: Tensor | None = None) -> None:
        """The averages and scores of the present weights and gradients."""
        if self.steps >= self.schedule.last:
            return
        self._place()
        weights = [self._factors(part) for part in self._parts]
        if all(w is None or w.grad is None for of in weights for tensors in of for w in tensors):
            raise ValueError(
                f"{_WHERE}: no lora_A, lora_B or lora_E of the {len(self._layers)} layers has a gradient, want this "
                "after backward() and before zero_grad(), and the adapter trainable"
            )
        for part, of_weights in zip(self._parts, weights, strict=True):
            part.update(of_weights, None if rate is None else rate.to(part.sensitivity))

    @torch.no_grad()
    def _advance(self) -> None:
        """Counts the step, and masks."""
        self.steps += 1
        if self._cut:
            return
        if self.schedule.allocates(self.steps):
            budget, scores = self.budget(self.steps), self._flat_scores()
            best = scores.argsort(descending=True, stable=True)[:budget]
            self._keep(torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True), budget)
        if self.steps >= self.schedule.last or self.schedule.allocates(self.steps):
            self._mask()
        if self.steps == self.schedule.last:
            self._final = self.rank_pattern
            self._record()

    def _mask(self) -> None:
        self._place()
        for part, masks in zip(self._parts, self._masks, strict=True):
            torch._foreach_mul_([sharding.local(e) for e in self._factors(part).e], masks)

    def _keep(self, kept: Tensor, count: int) -> None:
        self._kept, self._count, self._masks = kept, count, []
        start = 0
        for part in self._parts:
            flat = kept[start : start + part.total_rank].to(part.device, part.dtype)
            masks = zip(flat.unsqueeze(1).split(part.ranks), self._factors(part).e, strict=True)
            self._masks.append([sharding.local(sharding.spread(mask, e)) for mask, e in masks])  # type: ignore[arg-type]
            start += part.total_rank

    def _record(self) -> None:
        """Has the layers, and PEFT's configuration, know the final pattern, for files; or that there is none yet."""
        final = self._final or {}
        for name, layer in self._layers.items():
            if isinstance(layer, FusedLoraLinear) and self.adapter_name in layer.r:  # it is not where none was left
                kept = tuple(final[name]) if name in final else None
                layer.allocation[self.adapter_name] = Allocation(self.schedule, kept)
        peft_ranks.mask(self._model, self.adapter_name, {self._layers[name]: kept for name, kept in final.items()})

    def was_cut(self) -> None:
        """By `shrink_to_ranks`: there is nothing left to mask."""
        self._cut = True

    # Where things are.

    def _place(self) -> None:
        """Puts the averages where the factors are now: a model may be moved or cast between two steps."""
        if self._sharded:
            sharding.reshard(self._model)
        there = [layer._modules["lora_E"]._parameters.get(self.adapter_name) for layer in self._layers.values()]
        placement = [None if e is None else (e.device, e.dtype, e.numel(), type(e)) for e in there]
        if placement == self._placement:
            return
        adalora_layers(self._model, self.adapter_name, _WHERE, shards=True)  # sharded otherwise since?
        for name, e, (r, _, _) in zip(self._names, there, self._sizes, strict=True):
            if e is None or e.numel() != r:
                raise ValueError(
                    f"{_WHERE}: model: the adapter of {name!r} had rank {r} and has {0 if e is None else e.numel()}; "
                    "want shrink_to_ranks(model, allocator), or an allocator made after the change"
                )
        state = self.state_dict() if self._parts else None
        self._sharded = sharding.has_shards(self._model)
        places: dict[tuple, list[int]] = {}
        for i, e in enumerate(there):
            if e is not None and e.numel():
                places.setdefault((e.device, e.dtype, getattr(e, "device_mesh", None)), []).append(i)
        self._placement = placement
        of_all = [factors_of(layer, self.adapter_name) for layer in self._layers.values()]
        self._parts = [
            _Part(layers, [of_all[i] for i in layers], self.schedule, *place) for place, layers in places.items()
        ]
        if state is not None:
            self._restore(state)

    def _factors(self, part: _Part) -> Factors:
        layers = list(self._layers.values())
        of_layers = [factors_of(layers[i], self.adapter_name) for i in part.layers]
        return Factors(*(list(tensors) for tensors in zip(*of_layers, strict=True)))

    def _flat_scores(self) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0].scores
        first = self._parts[0].scores
        return torch.cat([part.scores.to(first) for part in self._parts])

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor that has a number for each rank, in the parts' order, in the layers' order."""
        order = [i for part in self._parts for i in part.layers]
        pieces = dict(zip(order, flat.split([self._sizes[i][0] for i in order]), strict=True))
        return {name: pieces.get(i, flat[:0]) for i, name in enumerate(self._names)}

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, to save with the model's and the optimiser's: with it a run goes on bit for bit.

        "importance": by layer and factor Ī and Ū (2, *shape), until the pattern is final; "kept": by layer, or None.
        """
        importance: dict[str, dict[str, Tensor]] = {}
        for part in self._parts if self._final is None else ():
            for i, layer in enumerate(part.layers):
                importance[self._names[layer]] = {
                    FACTORS[name]: part.whole(name, i, self._sizes[layer]) for name in FACTORS
                }
        kept = None if self._kept is None else {name: k.clone() for name, k in self._by_layer(self._kept).items()}
        return {"steps": self.steps, "kept": kept, "importance": importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises ValueError, with nothing changed, for another model's, or one
        that is not all there."""
        self._check(state)
        self._restore(state)
        self._record()

    def _check(self, state: dict[str, Any]) -> None:
        missing = [key for key in ("steps", "kept", "importance") if key not in state]
        if missing or not isinstance(state["steps"], int):
            raise ValueError(
                f"{_WHERE}.load_state_dict: state: got {', '.join(map(str, state)) or 'nothing'}, "
                + (f"which lacks {', '.join(missing)}, " if missing else f"steps a {type(state['steps']).__name__}, ")
                + "want what RankAllocator.state_dict() gave"
            )
        kept, importance = state["kept"], state["importance"]
        sizes = dict(zip(self._names, self._sizes, strict=True))
        wrong = [name for name in (*importance, *(kept or ())) if name not in sizes]
        for name, (r, k, n) in sizes.items():
            wanted = {"lora_A": (2, r, k), "lora_B": (2, n, r), "lora_E": (2, r, 1)}
            found = importance.get(name)
            if found is not None and {key: tuple(getattr(f, "shape", ())) for key, f in found.items()} != wanted:
                wrong.append(name)
            if kept is not None and name in kept and tuple(kept[name].shape) != (r,):
                wrong.append(name)
        ranked = {name for name, (r, _, _) in sizes.items() if r}
        missing = (kept is not None and set(kept) != set(sizes)) or (importance and set(importance) < ranked)
        if wrong or missing:
            raise ValueError(
                f"{_WHERE}.load_state_dict: state: its layers, or their sizes, are not this model's "
                f"({', '.join(dict.fromkeys(wrong[:3])) or 'some are missing'}), want the state of an allocator of the "
                "same model"
            )

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for part in self._parts:
            part.sensitivity.zero_()
            part.uncertainty.zero_()
            for i, layer in enumerate(part.layers):
                for name, key in FACTORS.items():
                    found = state["importance"].get(self._names[layer])
                    if found and (views := part.views(name, i)):
                        like = factors_of(self._layers[self._names[layer]], self.adapter_name)["qpe".index(name)]
                        for view, values in zip(views, found[key], strict=True):
                            view.copy_(sharding.local(sharding.spread(values, like)))
        self.steps = int(state["steps"])
        kept = state["kept"]
        self._kept, self._count, self._masks, self._final = None, self.initial_budget, [], None
        if kept is not None:
            device = self._parts[0].device
            order = [self._names[i] for part in self._parts for i in part.layers]
            flat = torch.cat([kept[name].to(device) for name in order])
            self._keep(flat, int(flat.sum()))
            if self.steps >= self.schedule.last:
                self._final = self.rank_pattern


def _then(closure: Callable[[], Any], observe: Callable[[], None], seen: list[bool]) -> Any:
    """An optimiser's closure, with the first gradients that it makes in a step looked at."""
    loss = closure()
    if not seen:
        seen.append(True)
        observe()
    return loss
