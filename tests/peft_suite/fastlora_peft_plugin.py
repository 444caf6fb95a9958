"""A pytest plug-in for PEFT's own tests: every model that PEFT builds goes through `fastlora.patch`, and every call of
a LoRA layer is counted by what became of it.

run.py loads it twice over the same tests: with PEFT_SUITE_PATCH=0 it only records how each test ended.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import time
import types
from pathlib import Path
from typing import Any

from huggingface_hub.utils import _http as hub_http
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.integrations.peft import adopt as peft_adopt

WORST_FIRST = ("failed", "skipped", "passed")


class Counts:
    def __init__(self) -> None:
        self.fused = 0
        self.base = 0
        self.fallback: collections.Counter[str] = collections.Counter()
        self.not_patched: collections.Counter[str] = collections.Counter()
        self.other_layers: collections.Counter[str] = collections.Counter()
        self.plain_not_fused: collections.Counter[str] = collections.Counter()
        self.plain_fused = 0


counts = Counts()
outcomes: dict[str, str] = {}
current_test = ""


def pytest_configure(config: Any) -> None:
    del config
    # Nothing is fetched (run.py sets an address that refuses): without this each attempt waits for half a minute.
    hub_http.time = types.SimpleNamespace(sleep=lambda _: None, time=time.time)  # type: ignore[assignment]
    if os.environ["PEFT_SUITE_PATCH"] == "1":
        tuners_utils.BaseTuner.inject_adapter = _patching(tuners_utils.BaseTuner.inject_adapter)
        _count_calls()


def pytest_runtest_setup(item: Any) -> None:
    global current_test
    current_test = item.nodeid


def pytest_runtest_logreport(report: Any) -> None:
    """In the process that reports, xdist's or the only one: a test's setup, call and teardown become one outcome."""
    seen = (outcomes.get(report.nodeid, report.outcome), report.outcome)
    outcomes[report.nodeid] = next(outcome for outcome in WORST_FIRST if outcome in seen)
    if hasattr(report, "wasxfail") and report.when == "call":
        outcomes[report.nodeid] = f"xfail, {report.outcome}"


def pytest_sessionfinish(session: Any) -> None:
    folder = Path(os.environ["PEFT_SUITE_OUT"])
    (folder / f"counts-{os.getpid()}.json").write_text(json.dumps(vars(counts)))
    if not hasattr(session.config, "workerinput"):
        (folder / "outcomes.json").write_text(json.dumps(outcomes))


def _patching(inject: Any) -> Any:
    """PEFT's `inject_adapter`, through which every adapter of every model comes, with `fastlora.patch` after it."""

    @functools.wraps(inject)
    def inject_and_patch(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            # The tuner, where it is LoRA's own, so that adapters that come later are picked up by themselves.
            fastlora.patch(self if isinstance(self, LoraModel) else model)
        return result

    return inject_and_patch


def _count_calls() -> None:
    for peft_class, fused_class in peft_adopt.FUSED.items():
        _count_calls_of(peft_class, fused_class)
    for cls in _subclasses(LoraLayer):
        if "forward" in vars(cls) and not issubclass(cls, tuple(peft_adopt.FUSED)):
            cls.forward = _counted_as_other(cls, cls.forward)


def _count_calls_of(peft_class: Any, fused_class: Any) -> None:
    """Of LoRA's linear layer, or AdaLoRA's."""
    fused_forward, peft_forward = fused_class.forward, peft_class.forward

    @functools.wraps(fused_forward)
    def counted(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        before = (self.calls.fused, self.calls.base, dict(self.calls.fallback))
        plain = _is_plain(self, x, args, kwargs)
        try:
            return fused_forward(self, x, *args, **kwargs)
        finally:
            fused = self.calls.fused - before[0]
            counts.fused += fused
            counts.base += self.calls.base - before[1]
            counts.fallback.update({why: n - before[2].get(why, 0) for why, n in self.calls.fallback.items()})
            if plain and fused != 1:
                counts.plain_not_fused[f"{current_test}: {self.calls.last_reason}"] += 1
            counts.plain_fused += plain and fused == 1

    @functools.wraps(peft_forward)
    def not_adopted(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is peft_class:
            reason = peft_adopt.unsupported(self) or "no reason"
            counts.not_patched[reason] += 1
            if _is_plain(self, x, args, kwargs):
                counts.plain_not_fused[f"{current_test}: not patched, {reason}"] += 1
        return peft_forward(self, x, *args, **kwargs)

    fused_class.forward = counted
    peft_class.forward = not_adopted


def _counted_as_other(cls: type, forward: Any) -> Any:
    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(base for base in type(self).__mro__ if "forward" in vars(base)) is cls:  # not a call through super()
            counts.other_layers[f"{type(self).__module__}.{type(self).__name__}"] += 1
        return forward(self, *args, **kwargs)

    return counted


def _subclasses(cls: type) -> list[type]:
    return [found for direct in cls.__subclasses__() for found in (direct, *_subclasses(direct))]


def _is_plain(layer: Any, x: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether PEFT's attributes say that this call is plain LoRA or AdaLoRA, or DoRA alone, on a plain linear layer:
    judged here afresh, not by the code under test."""
    base = layer.base_layer
    if args or any(value is not None for value in kwargs.values()) or layer.disable_adapters or layer.merged:
        return False
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    variants = [type(layer.lora_variant[name]).__name__ for name in active if name in layer.lora_variant]
    known = not variants or (variants == ["DoraLinearVariant"] and len(active) == 1)
    if not active or not known or type(base) not in (nn.Linear, Conv1D):
        return False
    adapters = [layer.lora_dropout[name] for name in active]
    if isinstance(layer, PeftLinear):  # AdaLoRA's factors are no modules
        adapters += [module for name in active for module in (layer.lora_A[name], layer.lora_B[name])]
    elif not any(len(layer.lora_E[name]) for name in active):
        return False
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (base, *adapters))
    return not hooked and x.dtype == base.weight.dtype and base.weight.dim() == 2
