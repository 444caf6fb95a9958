"""`GaLoreAdamW`: full-parameter training whose optimiser states live in the gradients' leading subspaces.

G (n, m) is the gradient of a weight, P (n, r) an orthonormal basis, renewed every T steps (Zhao et al. 2024, arXiv
2403.03507):

    R = PᵀG        N = m̂/(√v̂ + ε) of Adam on R        W ← W − lr·α·P N

In this package's files: projector.py has P and how it is found, adam.py Adam, gradients.py how gradients come during
a backward pass, distributed.py several processes, groups.py parameter groups.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ...introspect import sharding
from ...linalg.operators import LinearOperator, Rows, working_dtype
from . import adam, distributed
from . import gradients as galore_gradients
from .groups import GRADIENTS, check_group, check_saved
from .projector import BASES, NOT_FINITE, Changes, Projector, all_finite

_WHERE = "GaLoreAdamW"


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW that keeps its moments for R = PᵀG or GQ of rank r instead of the gradient G (n, m) of a weight.

    Groups with a `rank` are projected; the others are torch.optim.AdamW, to the bit in float32 and float64.

    Args:
        params: parameters or groups, as `galore_param_groups` makes them. Keys of a group: `rank` (r, for 2-D weights
            with both sides at least r), `update_proj_gap` (T), `scale` (α), `proj_type` (there), and all that follow
            down to `optim_bits`.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW, and with its defaults.
        correct_bias: False leaves out Adam's bias correction.
        refresh: "subspace", a warm-started subspace iteration on one step's gradient; "svd", that gradient's full SVD;
            "streamed", subspace iteration over the gradients of several steps, while they are trained on. The default
            is "subspace" with `gradients="plain"`, else "streamed". docs/galore.md compares them.
        refresh_iterations: multiplications with GGᵀ in a refresh.
        refresh_steps: the steps whose gradients a streamed refresh adds up for each of its 2·`refresh_iterations`
            products.
        staggered: the layers refresh on different steps, as evenly as it goes; False: all on the same.
        moments: on a refresh, with C = P_newᵀP_old: "rotate_first", m ← C m, and v stays with the directions in their
            order; "rotate", v ← (C∘C) v too; "keep", both stay, as in the paper.
        optim_bits: of the moments of tensors with 4096 elements or more: 32, or 8 (bitsandbytes' blockwise type).
        gradients: how the projected weights' gradients come. "plain": from `p.grad`, by `step`. "hook": each `p.grad`
            is projected and freed during the backward pass, and R added up over micro-batches. "factored":
            PᵀG = (dY P)ᵀX from a linear layer's X and dY, and no `p.grad` is ever made: `requires_grad` is False while
            the weights train, and `freeze` is what stops one.
        model: for "factored": the one that the weights are in.
        max_grad_norm: clips the norm over all R and the other parameters' gradients in `step`.
        seed: of the random columns that a basis begins with.

    A projected weight's state is kr + 2lr numbers (k the projected side's length, l the other's), in float32, or in
    float64 for float64 weights, whatever the weight's dtype. "streamed" takes lr + kr more while a layer refreshes, and
    does not train a layer in its first two steps, in which it has no basis.

    Raises:
        ValueError: a value out of range, in the arguments or a group; a group with a rank that holds something else
            than matrices with sides of at least that; 8 bits without bitsandbytes; settings that exclude each other.

    Examples:
        ```python
        groups = fastlora.optim.galore_param_groups(model, rank=128)
        optimizer = fastlora.optim.GaLoreAdamW(groups, lr=1e-3, gradients="factored", model=model, max_grad_norm=1.0)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ```

    Source: Zhao et al. 2024, GaLore, arXiv 2403.03507: R = PᵀG, W ← W − lr·α·P·Adam(R).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        correct_bias: bool = True,
        refresh: str | None = None,
        refresh_iterations: int = 2,
        refresh_steps: int = 4,
        staggered: bool = True,
        moments: str = "rotate_first",
        optim_bits: int = 32,
        gradients: str = "plain",
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        arithmetic: str = "torch",
    ) -> None:
        if gradients not in GRADIENTS:
            raise ValueError(f"{_WHERE}: gradients: got {gradients!r}, want one of {', '.join(map(repr, GRADIENTS))}")
        if gradients == "factored" and not isinstance(model, nn.Module):
            raise ValueError(
                f"{_WHERE}: model: got {type(model).__name__} with gradients='factored', want the torch.nn.Module that "
                "the weights are in"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{_WHERE}: max_grad_norm: got {max_grad_norm!r}, want a positive number or None")
        self.gradients, self.max_grad_norm, self.seed = gradients, max_grad_norm, int(seed)
        self.grad_norm: Tensor | None = None
        self._model = model
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "update_proj_gap": 200,
            "scale": 0.25,
            "proj_type": "std",
            "refresh": refresh or ("subspace" if gradients == "plain" else "streamed"),
            "refresh_iterations": refresh_iterations,
            "refresh_steps": refresh_steps,
            "staggered": staggered,
            "moments": moments,
            "optim_bits": optim_bits,
            "arithmetic": arithmetic,
        }
        try:
            super().__init__(params, defaults)
        except BaseException:
            self.release()  # a group before the one that was refused
            raise

    @classmethod
    def official(
        cls,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        gradients: str = "plain",
    ) -> GaLoreAdamW:
        """The authors' `galore_torch.GaLoreAdamW`, step by step: a full SVD of every layer on the same steps, moments
        that stay where they are, ε next to the uncorrected √v, decay after the step. With their defaults.

        `gradients="hook"` is their training layer by layer, for steps of one micro-batch.
        """
        return cls(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            correct_bias=correct_bias,
            refresh="svd",
            staggered=False,
            moments="keep",
            gradients=gradients,
            arithmetic="official",
        )

    # Groups and state.

    def _reset(self) -> None:
        """What does not outlive the process."""
        self._held: dict[Tensor, list[Tensor]] = {}  # R and a refresh's sums, over the micro-batches of this step
        self._groups: dict[Tensor, tuple[int, dict[str, Any]]] = {}
        self._undo: list[weakref.finalize] = []  # an optimiser that is gone lets go of the model
        self._tapped: set[Tensor] = set()  # frozen for autograd, but trained
        self._idle: set[Tensor] = set()  # of these, what `freeze` stopped
        self._reduced = self._warned = False
        self._process_group: Any = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises ValueError for a group that cannot be projected as it says."""
        super().add_param_group(param_group)
        try:
            check_group(param_group, self.gradients, self._reduced)
            galore_gradients.check_free(param_group["params"])
            if self.gradients != "plain" and param_group.get("rank"):
                self._take(param_group["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        self._groups = {}

    def _take(self, weights: list[Tensor]) -> None:
        """Has these weights' gradients shown during backward passes."""
        this = weakref.ref(self)

        def observe(weight: Tensor, op: LinearOperator) -> None:
            optimizer = this()
            if optimizer is not None:
                with galore_gradients.without_autocast([weight]):  # where backward is called inside it
                    optimizer._observe(weight, op)

        def keep(undo: Callable[[], None]) -> None:
            finalizer = weakref.finalize(self, undo)
            finalizer.atexit = False
            self._undo.append(finalizer)

        if self.gradients == "factored":
            assert self._model is not None
            undo, seen = galore_gradients.factored(self._model, weights, self._idle, observe)
            keep(undo)
            self._tapped.update(seen)
            weights = [weight for weight in weights if weight not in self._tapped]
        keep(galore_gradients.hook(weights, observe))

    def release(self) -> None:
        """Takes the hooks out of the model, and lets autograd compute all gradients again: `gradients` is "plain"
        afterwards. What was taken since the last step is forgotten."""
        while self._undo:
            self._undo.pop()()
        self.gradients = "plain"
        self._held.clear()
        self._tapped.clear()
        self._idle.clear()

    def freeze(self, parameters: Iterable[Tensor]) -> None:
        """Stops training these, and forgets their gradients of this step. `requires_grad_(False)` alone says nothing in
        the mode "factored", where the weights are frozen for autograd while they train.

        Examples:
            ```python
            optimizer.freeze(model.layers[0].parameters())
            ```
        """
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
            self._held.pop(parameter, None)
            if parameter in self._tapped:
                self._idle.add(parameter)

    def unfreeze(self, parameters: Iterable[Tensor]) -> None:
        """Trains these again; their states are as they were."""
        for parameter in parameters:
            self._idle.discard(parameter)
            if parameter not in self._tapped:
                parameter.requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles, which have their own weights and no hooks."""
        trained = [*(self._tapped - self._idle)]
        return super().__getstate__() | {"max_grad_norm": self.max_grad_norm, "seed": self.seed, "_trained": trained}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for weight in self.__dict__.pop("_trained", ()):  # frozen copies of weights whose gradients were taken
            if galore_gradients.is_free(weight):
                weight.requires_grad_(True)
        if "gradients" not in self.__dict__:  # unpickled or copied
            self.gradients, self.grad_norm, self._model = "plain", None, None
            self._reset()
        self._held, self._groups = {}, {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but that states keep their dtypes: torch casts them to the parameter's. Whole moments of sharded
        weights are spread. Raises ValueError for groups that could not be trained here, and leaves all as it was."""
        final: list[dict[str, Any]] = []

        def look(_: Any, given: dict[str, Any]) -> None:
            final.append(given)
            check_saved(
                given["param_groups"], given["state"], self.param_groups, self.defaults, self.gradients, self._reduced
            )

        handle = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        numbers = (number for group in final[-1]["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(numbers, parameters):
            for key, value in final[-1]["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    split = key.startswith("exp_avg") and "basis_right" not in self.state[parameter]
                    value = value.to(parameter.device)
                    self.state[parameter][key] = sharding.spread(value, parameter) if split else value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what was projected since the last step is forgotten too."""
        super().zero_grad(set_to_none)
        self._held.clear()

    def _projected(self) -> dict[Tensor, tuple[int, dict[str, Any]]]:
        """Each projected weight's number and group."""
        if not self._groups:
            pairs = [(p, group) for group in self.param_groups if group.get("rank") for p in group["params"]]
            self._groups = {parameter: (index, group) for index, (parameter, group) in enumerate(pairs)}
        return self._groups

    # Gradients.

    @torch.no_grad()
    def _observe(self, weight: Tensor, op: LinearOperator) -> None:
        """Adds a micro-batch's gradient to what this step has of a weight; the first may refresh the basis."""
        index, group = self._projected()[weight]
        projector, state = Projector.of(weight, group), self.state[weight]
        seed = (self.seed * 1_000_003 + index) * 1_009
        if not state:
            state["step"] = 0
            projector.start(state, seed, group["refresh"] == "streamed")
        low, held = None, self._held.get(weight)
        if held is None and self._due(weight):
            low, changes = projector.refresh(state, op, group, seed + 2 + state["bases"])
            self._carry_over(weight, changes)
            if low is not None:
                self._schedule(weight)
        terms = [projector.project(state, op) if low is None else low, *projector.sums(state, op)]
        if held is None:
            self._held[weight] = terms
            return
        for total, term in zip(held, terms):
            total += term

    def _due(self, weight: Tensor) -> bool:
        """Whether the next gradient refreshes a basis at once."""
        group, state = self._projected()[weight][1], self.state[weight]
        return group["refresh"] != "streamed" and (not state or state["step"] >= state["refresh_at"])

    def _schedule(self, weight: Tensor) -> None:
        """Sets when the next refresh is due; after a layer's first, earlier for some layers than for others."""
        (index, group), state = self._projected()[weight], self.state[weight]
        gap = group["update_proj_gap"]
        early = index * gap // len(self._projected()) if group["staggered"] and not state["refresh_at"] else 0
        state["refresh_at"] = state["step"] + gap - early

    def _carry_over(self, weight: Tensor, changes: Changes) -> None:
        both = self._projected()[weight][1]["moments"] == "rotate"
        for change, dim in changes:
            adam.carry_over(self.state[weight], change, dim, both)

    def _collect(self) -> list[Tensor]:
        """The projected weights that have a gradient in this step; what there is of it is in `_held`."""
        weights = list(self._projected())
        for weight in weights:
            if weight.grad is not None and weight in self._held:
                raise galore_gradients.taken_twice(weight, self.gradients)
        if self._reduced:
            return self._collect_from_all(weights)
        for weight in weights:
            if weight.grad is not None:
                self._observe_own(weight, weight.grad)
        return [weight for weight in weights if weight in self._held]

    def _observe_own(self, weight: Any, gradient: Tensor) -> None:
        """A gradient that is whole, or of which each process has rows: R is split then as the weight is."""
        if not sharding.is_sharded(weight):
            self._observe(weight, Rows(gradient))
            return
        due = self._due(weight)
        self._observe(weight, (distributed.Gathered if due else distributed.Sharded)(gradient))
        if due:
            distributed.from_first(self._bases(weight), weight.device_mesh.get_group())
            if "basis_right" not in self.state[weight]:
                self._held[weight] = [sharding.spread(low, weight) for low in self._held[weight]]

    def _bases(self, weight: Tensor) -> list[Tensor]:
        return [self.state[weight][key] for key in BASES if key in self.state[weight]]

    def _collect_from_all(self, weights: list[Tensor]) -> list[Tensor]:
        """The same over all processes: R is the mean of theirs, and a basis is found from the mean gradient."""
        process_group = self._process_group
        flags = [weight.grad is not None or weight in self._held for weight in weights]
        used = distributed.used_somewhere(flags, weights[0].device, process_group)
        weights = [weight for weight, somewhere in zip(weights, used) if somewhere]
        mine, bases = [], []
        for weight in weights:
            due = self._due(weight)
            if weight not in self._held:
                nothing = distributed.Zero(weight)
                op = Rows(weight.grad) if weight.grad is not None else nothing
                self._observe(weight, distributed.Averaged(op, process_group) if due else op)
            if due:
                bases += self._bases(weight)
            else:
                mine += self._held[weight]
        distributed.average(mine, process_group)
        distributed.from_first(bases, process_group)
        return weights

    def reduce_across_ranks(self, model: nn.Module | None = None, process_group: Any = None) -> None:
        """Makes `step` average the projected gradients over the processes: R and the thin blocks of a refresh travel,
        never n×m numbers. Every process must call it, and then make the same steps.

        Call it before DistributedDataParallel wraps the model: DDP is told to leave the projected weights alone, and
        reduces the rest as ever. The weights are set to the first process's here, since DDP no longer does it.

        Args:
            model: what DDP is to wrap; None where nothing is.
            process_group: of torch.distributed; None is the default one.

        Raises:
            ValueError: torch.distributed is not initialised; the model is wrapped already; a refresh that needs a
                gradient as a whole, or a basis in the middle of a backward pass.

        Examples:
            ```python
            optimizer = fastlora.optim.GaLoreAdamW(groups, lr=1e-3, gradients="hook")
            optimizer.reduce_across_ranks(model)
            model = torch.nn.parallel.DistributedDataParallel(model)
            ```
        """
        where = f"{_WHERE}.reduce_across_ranks"
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError(f"{where}: process_group: torch.distributed is not initialised, want it to be")
        wrapped = None if model is None else sharding.wrapper(model)
        if wrapped is not None:
            raise ValueError(f"{where}: model: got one in {wrapped}, want the plain model, before it is wrapped")
        for group in self.param_groups:
            check_group(group, self.gradients, reduced=True)
        self._reduced, self._process_group = True, process_group
        weights = self._projected()
        if model is not None:
            distributed.leave_to_optimizer(model, weights)
        distributed.from_first((weight.detach() for weight in weights), process_group)

    # The step.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch's GradScaler, which then calls `step` whatever the gradients are, and gives it `found_inf`."""
        return self.gradients != "plain" or self._reduced

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step with the gradients since the last one; a parameter without any is left alone.

        In the modes "hook" and "factored" what was projected is used up: a second `step` without a backward pass
        between does nothing to the projected weights.

        Args:
            closure: computes the loss and the gradients again, and returns the loss.

        Raises:
            ValueError: a gradient is not finite where a basis is refreshed, is sparse, was taken in the backward pass
                and is in p.grad too, or was scaled by a GradScaler in another mode than "plain" or where `step` reduces
                the gradients. No weight has moved then.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        galore_gradients.check_unscaled(self.__dict__, self.gradients, self._reduced)
        if not self._warned and not self._reduced and self.gradients != "plain":
            self._warned = distributed.warn_of_others(self.gradients)
        taken = set(self._held)
        try:
            with galore_gradients.without_autocast(p for group in self.param_groups for p in group["params"]):
                self._step()
        finally:  # what was read from p.grad is there still
            self._held = {weight: terms for weight, terms in self._held.items() if weight in taken}
        return loss

    def _step(self) -> None:
        given = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        galore_gradients.check_dense(p.grad for p, _ in given)
        weights, rest = self._collect(), [(p, g) for p, g in given if not g.get("rank")]
        if self.max_grad_norm is not None:
            gradients = [*(self._held[weight] for weight in weights), *([p.grad] for p, _ in rest)]
            self.grad_norm = adam.clip_(self.max_grad_norm, gradients)
        if not all_finite([term for weight in weights if self._streams(weight) for term in self._held[weight]]):
            raise ValueError(NOT_FINITE)
        for parameter, group in rest:
            self._step_whole(parameter, group)
        for weight in weights:
            self._step_projected(weight)

    def _streams(self, weight: Tensor) -> bool:
        """Whether this step's gradient becomes a part of a streamed refresh."""
        group, state = self._projected()[weight][1], self.state[weight]
        return group["refresh"] == "streamed" and (state["halves"] or state["step"] + 1 >= state["refresh_at"])

    def _step_whole(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if parameter.is_complex():  # as torch: two real numbers
            parameter, gradient = torch.view_as_real(parameter), torch.view_as_real(gradient)
        if not state:
            state["step"] = 0
        adam.decay_(parameter, group, before=True)
        m, denominator, size = adam.moments_of(state, group, gradient.to(working_dtype(gradient.dtype)))
        parameter.addcdiv_(m, denominator, value=-size)
        adam.decay_(parameter, group, before=False)

    def _step_projected(self, weight: Tensor) -> None:
        group, state, (low, *sums) = self._projected()[weight][1], self.state[weight], self._held.pop(weight)
        projector, streamed = Projector.of(weight, group), group["refresh"] == "streamed"
        bases = state["bases"]
        if bases or not streamed:  # else the basis is random still
            adam.decay_(weight, group, before=True)
            m, denominator, size = adam.moments_of(state, group, low)
            projector.add_(weight, state, m / denominator, -size * group["scale"])
            adam.decay_(weight, group, before=False)
            if streamed and not state["halves"] and state["step"] >= state["refresh_at"]:
                projector.begin(state, group)
                self._schedule(weight)
        if streamed:
            self._carry_over(weight, projector.finish_step(state, group, low, sums))
            if state["bases"] > bases:
                if not bases:
                    self._schedule(weight)
                if self._reduced:
                    distributed.from_first(self._bases(weight), self._process_group)
