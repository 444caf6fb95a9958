"""`PeriodicReinit`: `reinit_lora_ga` within a training run, every so many steps or where alignment is lost."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..introspect import targets
from ..optim.moments import check_optimizer
from ..runtime.checks import check, check_integer, check_module
from .monitor import AlignmentMonitor
from .reinit import Options, ReinitReport, layers_to_restart, reinit_lora_ga
from .sketch import GradientSketch


class PeriodicReinit:
    """Re-initialises a patched model's adapters while it trains. The function is kept.

    How: docs/details/lora_ga_maths.md.

    The gradient comes from the training run's own backward passes: those of the last `window` steps before a
    re-initialisation are sketched, with the model's own dropout. No pass is added. Where torch.distributed is
    initialised, every process must do the same steps; the processes' sketches become one.

    Args:
        model: a model patched by `fastlora.patch` (inside DistributedDataParallel: the module in it).
        optimizer: what trains it; None where moments need no care.
        every: re-initialise after this many steps, counted from the start or the last time.
        monitor: an `AlignmentMonitor` of the same model. It is started, stepped and closed from here.
        threshold: where a record's overall alignment is below this, a window begins.
        min_gap: steps after a re-initialisation in which the threshold does nothing.
        window: how many steps' gradients are sketched, at most `every`.
        discount: β < 1 makes later steps of the window count more: Σ βᵀ⁻ᵗ G_t.
        width: of the sketch; by default max(6r, 32).
        target_modules, exclude_modules: which of the patched layers. A layer with fewer than 2r singular triplets is
            left out (`skipped` says so).
        smoothing, moments, split, scale, gamma, max_rank, adapter_name, seed: as in `reinit_lora_ga`. A layer without a
            gradient in the window stays as it is.
        on_reinit: called with each `ReinitReport`.

    Raises:
        ValueError: neither `every` nor a monitor with a threshold; an argument out of range; and what `reinit_lora_ga`
            raises.

    Examples:
        >>> monitor = fastlora.AlignmentMonitor(model, every=50)
        >>> with fastlora.PeriodicReinit(model, optimizer, monitor=monitor, threshold=0.5) as reinit:
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         optimizer.step(), optimizer.zero_grad()
        ...         reinit.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        every: int | None = None,
        monitor: AlignmentMonitor | None = None,
        threshold: float | None = None,
        min_gap: int = 100,
        window: int = 8,
        discount: float = 1.0,
        width: int | None = None,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        smoothing: float = 0.5,
        moments: str = "rotate",
        split: str = "ArB2r",
        scale: str = "keep",
        gamma: float = 16,
        max_rank: int | None = None,
        adapter_name: str = "default",
        seed: int = 0,
        on_reinit: Callable[[ReinitReport], object] | None = None,
    ) -> None:
        caller = "PeriodicReinit"
        self.options = Options(smoothing, moments, split, scale, gamma, max_rank, seed).checked(caller)
        for argument, value in (("every", every), ("window", window), ("min_gap", min_gap)):
            if value is not None or argument != "every":
                check_integer(caller, argument, value)
        if (monitor is None) != (threshold is None):
            raise ValueError(f"{caller}: monitor, threshold: got one without the other, want both or neither")
        if every is None and monitor is None:
            raise ValueError(f"{caller}: every: got None and no monitor, want a number of steps or a threshold")
        check(threshold is None or 0 < threshold <= 1, caller, "threshold", threshold, "a number in (0, 1]")
        if every is not None and every < window:
            raise ValueError(f"{caller}: every: got {every}, want at least the window's {window} steps")
        self.model, self.optimizer, self.adapter_name = model, optimizer, adapter_name
        self.every, self.monitor, self.threshold, self.min_gap = every, monitor, threshold, min_gap
        self.window, self.discount, self.width, self.on_reinit = window, discount, width, on_reinit
        self.skipped: dict[str, str] = {}
        self._names, self._r = self._layers(target_modules, exclude_modules)
        layers = layers_to_restart(caller, model, self._new_sketch(), adapter_name)
        if optimizer is not None:
            parameters = [
                p for layer in layers.values() for p in (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
            ]
            check_optimizer(optimizer, parameters, caller)
        self.reports: list[ReinitReport] = []
        self.steps = 0  # taken so far
        self.since = 0  # of them, since the last re-initialisation
        self._sketch: GradientSketch | None = None
        self._left = 0  # steps of the window still to come
        self._active = False

    def _layers(self, target_modules: Any, exclude_modules: Any) -> tuple[list[str], int]:
        """The layers to re-initialise, and their largest rank."""
        check_module("PeriodicReinit", self.model)
        names, ranks = [], [1]
        for name, layer in targets.sketchable(self.model, target_modules, exclude_modules):
            r, (n, m) = getattr(layer, "r", {}).get(self.adapter_name), targets.layer_sizes(layer)
            if r is None:
                continue
            if 2 * r > min(n, m):
                self.skipped[name] = f"{n}×{m} has fewer than 2r = {2 * r} singular triplets"
                continue
            names.append(name)
            ranks.append(r)
        if not names:
            raise ValueError(
                f"PeriodicReinit: model: no layer of this {type(self.model).__name__} has an adapter "
                f"{self.adapter_name!r} of a rank that can be re-initialised"
            )
        return names, max(ranks)

    def _new_sketch(self) -> GradientSketch:
        names = "|".join(re.escape(name) for name in self._names)
        return GradientSketch(
            self.model, names, self._r, self.width, self.options.seed,
            dropout=True, weighting="equal", discount=self.discount, freeze=False,
        )  # fmt: skip

    # Running.

    def start(self) -> PeriodicReinit:
        """Begins to count; what `with` does. For a training loop that only offers callbacks."""
        if self._active:
            raise RuntimeError("PeriodicReinit: active already")
        if self.monitor is not None:
            self.monitor.start()
        self._active = True
        self._open_window_where_due()
        return self

    def close(self) -> None:
        """Takes every hook away again. What is re-initialised stays so; an open window is lost."""
        self._active = False
        self._abandon_window()
        if self.monitor is not None:
            self.monitor.close()

    def __enter__(self) -> PeriodicReinit:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self) -> ReinitReport | None:
        """Ends an optimiser step, after `optimizer.step()`; the report, where this one re-initialised.

        Raises RuntimeError where it is not active, and what `reinit_lora_ga` raises: model and optimiser are then as
        they were, and the next window begins as if it had been done.
        """
        if not self._active:
            raise RuntimeError("PeriodicReinit: step: not active; call start(), or use `with reinit:`")
        record = self.monitor.step() if self.monitor is not None else None
        self.steps += 1
        self.since += 1
        report = None
        if self._sketch is not None:
            self._left -= 1
            if self._left == 0:
                report = self._reinitialise()
            else:
                self._sketch.step()
        elif record is not None and self.since >= self.min_gap and record.overall < (self.threshold or 0):
            self._open_window(self.window)
        self._open_window_where_due()
        return report

    def _open_window_where_due(self) -> None:
        if self._sketch is None and self.every is not None and self.since >= self.every - self.window:
            self._open_window(max(1, self.every - self.since))

    def _open_window(self, steps: int) -> None:
        sketch = self._new_sketch()
        sketch.__enter__()
        self._sketch, self._left = sketch, steps

    def _abandon_window(self) -> None:
        if self._sketch is not None:
            self._sketch.__exit__(RuntimeError, None, None)  # as after an error: processes do not wait for each other
            self._sketch = None

    def _reinitialise(self) -> ReinitReport | None:
        sketch, self._sketch = self._sketch, None
        assert sketch is not None
        self.since = 0
        sketch.__exit__(None, None, None)
        if not any(sketch.has_gradient(name) for name in sketch.names):
            warnings.warn(
                "fastlora.PeriodicReinit: no layer had a finite gradient in the window; nothing was re-initialised",
                UserWarning,
                stacklevel=3,
            )
            return None
        options = self.options
        report = reinit_lora_ga(
            self.model, sketch, self.optimizer, smoothing=options.smoothing, moments=options.moments,
            split=options.split, scale=options.scale, gamma=options.gamma, max_rank=options.max_rank,
            missing="skip", adapter_name=self.adapter_name, seed=options.seed,
        )  # fmt: skip
        self.reports.append(report)
        if self.on_reinit is not None:
            self.on_reinit(report)
        return report

    # Resuming.

    def state_dict(self) -> dict[str, int]:
        """Numbers only, to save with the model's and the optimiser's. An open window is not saved: loaded in the middle
        of one, it sketches the steps that are left of it."""
        state = {"steps": self.steps, "since": self.since}
        return state if self.monitor is None else {**state, "monitor_steps": self.monitor.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on counting where `state_dict` was taken. Raises RuntimeError while active."""
        if self._active:
            raise RuntimeError("PeriodicReinit: load_state_dict: active; load before start()")
        self.steps, self.since = int(state["steps"]), int(state["since"])
        if self.monitor is not None:
            self.monitor.steps = int(state.get("monitor_steps", self.steps))

    def __repr__(self) -> str:
        when = [f"every={self.every}"] if self.every is not None else []
        when += [f"threshold={self.threshold}"] if self.threshold is not None else []
        return (
            f"PeriodicReinit({len(self._names)} layers, {', '.join(when)}, {self.steps} steps, "
            f"{len(self.reports)} re-initialisations)"
        )
