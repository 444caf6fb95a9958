"""PEFT's LoRA layer on our kernels, in place: `patch` swaps the class of an instance, `unpatch` swaps it back.

PEFT changes its layers at run time (merging, disabling, switching and deleting adapters, changing scales), so nothing
is remembered between calls: every forward reads PEFT's own attributes and takes the fused path, or leaves the call to
PEFT's forward and counts the reason. A class swap, unlike a bound `forward`, survives deepcopy and pickle, and keeps
identity, hooks and references.

Merging is exact: the deltas are accumulated in fp32 and rounded once, the bits from before the first merge are kept,
and unmerging puts them back. docs/peft.md lists what is fused, what is not, and the reasons' wording.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from . import functional, mixed_batches
from .layers import keep_off_the_fast_path
from .peft_starts import StartedLinear

BASE_CLASSES = (nn.Linear, Conv1D)
FACTORS = (nn.Linear, StartedLinear)
# PEFT's layers on quantised bases -> where their fused forms are.
QUANTISED_LAYERS = {
    "peft.tuners.lora.bnb.Linear4bit": ("peft_bnb", "FusedLinear4bit"),
    "peft.tuners.lora.bnb.Linear8bitLt": ("peft_bnb", "FusedLinear8bitLt"),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": ("peft_quantized", "FusedTorchaoLinear"),
}
PLAIN_TENSORS = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class CallCounts:
    """What became of a layer's calls: fused, left to PEFT's forward (by reason), or the base layer alone.

    The base layer alone runs where adapters are merged or disabled, or where none of the active ones is here.
    """

    fused: int = 0
    base: int = 0
    fallback: dict[str, int] = field(default_factory=dict)
    last_reason: str | None = None  # of the latest fallback


@dataclass
class _Undo:
    """What takes back the merges `merged_adapters[start:start + len(names)]`: the weights from before, on the host."""

    start: int
    names: list[str]
    weight: Tensor
    bias: Tensor | None
    fingerprint: tuple[int, int | None]  # of the merged weights: they are only replaced while they are still those


class FusedLayer:
    """What every swapped layer has beside PEFT's own: FusedPeftLinear, and those of peft_quantized.py."""

    backend: str
    calls: CallCounts


class FusedPeftLinear(FusedLayer, PeftLinear):
    """PEFT's LoRA `Linear` whose forward runs `functional.multi_lora_linear` wherever that computes the same thing.

    Never constructed: `adopt(layer)` turns a PEFT layer into one, `release(layer)` turns it back. Everything PEFT does
    to its layers goes on working. `calls` counts what happened; `prediction(layer)` says what would happen now.
    """

    # Set by `adopt`, taken away by `release`.
    STATE = ("backend", "calls", "undos")
    undos: list[_Undo]  # oldest first
    mixed_batch: mixed_batches.MixedBatch | None = None  # set on the instance within `fastlora.adapter_names`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan: Plan | str | None
        if not self._disable_adapters:
            names = kwargs.get("adapter_names")
            batch = mixed_batches.current(self) if names is None else mixed_batches.of_names(tuple(names))
            if batch is not None:
                return self._mixed_forward(x, batch, args, kwargs)
        if args or kwargs:
            plan = why_not_arguments(args, kwargs)
        else:
            plan = None
        if plan is None:
            if self._disable_adapters or self.merged_adapters:
                return self._base_forward(x, **kwargs)
            plan = _plan(self, x)
        if isinstance(plan, str):
            self._count_fallback(plan)
            return super().forward(x, *args, **kwargs)
        if not plan.adapters:
            return self._base_forward(x, **kwargs)
        if not torch.compiler.is_compiling():
            self.calls.fused += 1
        return functional.multi_lora_linear(
            x, plan.weight, plan.adapters, plan.bias, training=True, backend=self.backend
        )

    def _mixed_forward(self, x: Tensor, batch: mixed_batches.MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """PEFT's `adapter_names`: every sequence with its own adapter."""
        given = {"adapter_names": batch.repeated(len(x)), **kwargs} if "adapter_names" not in kwargs else kwargs
        self._check_forward_args(x, *args, **given)  # PEFT's errors: lengths, merged adapters, DoRA
        names, segments = batch.segments(x, self.lora_A)
        others = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        plan = why_not_arguments(args, others) or _plan(self, x, names)
        if isinstance(plan, str):
            self._count_fallback(plan)
            return super().forward(x, *args, **given)
        if not torch.compiler.is_compiling():
            self.calls.fused += 1
        return functional.run_segments(x, plan.weight, plan.adapters, segments, plan.bias, self.backend)

    def _count_fallback(self, reason: str) -> None:
        if not torch.compiler.is_compiling():  # a changing count would be a new graph for every call
            counts = self.calls
            counts.fallback[reason] = counts.fallback.get(reason, 0) + 1
            counts.last_reason = reason

    def _base_forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's own forward where it comes down to the base layer; it unmerges first where adapters are disabled."""
        if not torch.compiler.is_compiling():
            self.calls.base += 1
        return super().forward(x, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters' deltas to the base weight, in fp32 and rounded once; `unmerge` gives the very same bits back.

        Arguments as in PEFT, except that a merge is always safe: raises ValueError, with nothing changed, where the
        merged weights would not be finite.
        """
        base = self.get_base_layer()
        if _why_not_merge(base) is not None:
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return None
        undo = self._open_undo(base)
        if any(name in self.lora_variant for name in names):
            self._merge_as_peft(names, base)
        else:
            weight, bias = self._merged(names, base)
            _write(base, weight, bias)
            self.merged_adapters.extend(names)
        undo.names.extend(names)
        undo.fingerprint = _fingerprint(base)
        if not self.undos or self.undos[-1] is not undo:
            self.undos.append(undo)
        return None

    def unmerge(self) -> None:
        """Takes back every merge: this class's bit for bit, what PEFT merged before it by PEFT's subtraction."""
        if not self.merged_adapters:
            self.undos.clear()
            return super().unmerge()  # PEFT's warning
        self._restore()
        if self.merged_adapters:
            super().unmerge()
        return None

    def _restore(self) -> None:
        """Takes back what this class merged, latest first, bit for bit."""
        base = self.get_base_layer()
        undos, self.undos = self.undos, []
        while undos:
            undo = undos.pop()
            if self.merged_adapters[undo.start :] != undo.names or not _is_current(undo, base):
                break  # the weights were changed while merged: what is left is PEFT's subtraction
            if any(name in self.lora_variant for name in undo.names):
                self._subtract(undo.start)  # for what a variant keeps beside the weights
            del self.merged_adapters[undo.start :]
            _write(base, undo.weight, undo.bias)

    def _open_undo(self, base: nn.Module) -> _Undo:
        """The latest undo where it still describes the weights (merging one by one keeps one copy), else a new one."""
        if self.undos:
            undo = self.undos[-1]
            if self.merged_adapters[undo.start :] == undo.names and _is_current(undo, base):
                return undo
        weight, bias = _parameters(base)
        bias_copy = bias.detach().to("cpu", copy=True) if bias is not None else None
        return _Undo(len(self.merged_adapters), [], weight.detach().to("cpu", copy=True), bias_copy, (0, None))

    def _merged(self, names: Sequence[str], base: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The weights with the adapters in, in the weights' dtype. Changes nothing."""
        weight, bias = _parameters(base)
        device, wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            total = weight.detach().to(wide, copy=True)
            total_bias = bias.detach().to(wide, copy=True) if bias is not None else None
            for name in names:
                scaling = float(self.scaling[name])
                (down, _), (up, lora_bias) = _parameters(self.lora_A[name]), _parameters(self.lora_B[name])
                lora_a, lora_b = down.to(device, wide), up.to(device, wide)
                if self.fan_in_fan_out:
                    total.addmm_(lora_a.t(), lora_b.t(), alpha=scaling)
                else:
                    total.addmm_(lora_b, lora_a, alpha=scaling)
                if lora_bias is not None:
                    if total_bias is None:
                        raise RuntimeError(
                            f"fastlora: merge: adapter {name!r} has lora_bias=True and the base layer has no bias "
                            "to merge it into"
                        )
                    total_bias.add_(lora_bias.to(device, wide), alpha=scaling)
            total = total.to(weight.dtype)
            if total_bias is not None and bias is not None:
                total_bias = total_bias.to(bias.dtype)
            finite = torch.isfinite(total).all() and (total_bias is None or torch.isfinite(total_bias).all())
        if not finite:
            raise ValueError(
                # PEFT's own words come first: scripts look for them.
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: scaled by "
                f"{[float(self.scaling[name]) for name in names]} it would make the {weight.dtype} base weights "
                "infinite or NaN, want finite weights; nothing was changed"
            )
        return total, total_bias

    def _merge_as_peft(self, names: list[str], base: nn.Module) -> None:
        """PEFT's own merge, for DoRA and other variants; all or nothing."""
        weight, bias = _parameters(base)
        before = (weight.detach().clone(), bias.detach().clone() if bias is not None else None)
        merged_before = list(self.merged_adapters)
        try:
            super().merge(safe_merge=True, adapter_names=names)
        except BaseException:
            _write(base, *before)
            self.merged_adapters[:] = merged_before
            raise

    def _subtract(self, start: int) -> None:
        """PEFT's unmerge of `merged_adapters[start:]` only; the list is left as it was."""
        everything = self.merged_adapters
        self.merged_adapters = everything[start:]
        try:
            super().unmerge()
        finally:
            self.merged_adapters = everything


def unsupported(layer: nn.Module) -> str | None:
    """None where `adopt` takes this layer, or why it is left to PEFT as it is (docs/peft.md)."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.unsupported(layer)
    if type(layer) not in (PeftLinear, FusedPeftLinear):
        name = f"{type(layer).__module__}.{type(layer).__name__}"
        return f"PEFT layer class {name}: only peft.tuners.lora.layer.Linear is fused"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    base = cast(PeftLinear, layer).base_layer
    if isinstance(base, BaseTunerLayer):
        return f"nested in another PEFT layer ({type(base).__name__})"
    return _why_not_base(base)


def prediction(layer: PeftLinear) -> str | None:
    """None where a call would be fused now, or why it would be left to PEFT's forward. Inputs may add reasons."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.prediction(layer)
    reason = unsupported(layer)
    if reason is not None or layer._disable_adapters or layer.merged_adapters:
        return reason
    plan = _plan(layer, None)
    return plan if isinstance(plan, str) else None


def adopt(layer: nn.Module, backend: str = "auto") -> FusedPeftLinear:
    """Makes a PEFT LoRA layer a `FusedPeftLinear`, in place. Raises ValueError with `unsupported`'s reason."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.adopt(layer, backend)
    reason = unsupported(layer)
    if reason is not None:
        raise ValueError(f"fastlora: adopt: layer: {reason}")
    if type(layer) is PeftLinear:
        layer.__class__ = FusedPeftLinear
        layer.calls, layer.undos = CallCounts(), []  # type: ignore[assignment]
        layer.lora_A.register_forward_pre_hook(keep_off_the_fast_path)
    fused = cast(FusedPeftLinear, layer)
    fused.backend = backend
    return fused


def release(layer: FusedPeftLinear) -> None:
    """Makes it PEFT's own layer again, as if it had never been adopted: what was merged is merged again by PEFT."""
    if (quantised := _quantised(layer)) is not None:
        return quantised.release(layer)
    merged = list(layer.merged_adapters)
    layer._restore()
    again = merged[len(layer.merged_adapters) :]
    for name in FusedPeftLinear.STATE:
        delattr(layer, name)
    hooks = layer.lora_A._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is keep_off_the_fast_path]:
        del hooks[key]
    cast(nn.Module, layer).__class__ = PeftLinear
    if again:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of merging on top of others
            layer.merge(adapter_names=again)


def class_name(thing: Any) -> str:
    """The full name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__name__}"


def _quantised(layer: nn.Module) -> Any:
    """peft_quantized.py, where the layer is one of its; it is imported only then."""
    if class_name(layer) not in QUANTISED_LAYERS and (
        not isinstance(layer, FusedLayer) or isinstance(layer, FusedPeftLinear)
    ):
        return None
    from . import peft_quantized

    return peft_quantized


@dataclass
class Plan:
    weight: Tensor
    bias: Tensor | None
    adapters: list[functional.Adapter]


def why_not_arguments(args: tuple, kwargs: dict[str, Any]) -> str | None:
    if args:
        return "positional arguments beside the input"
    for name, value in kwargs.items():
        if value is not None:
            return f"keyword argument {name}"
    return None


def _why_not_base(base: nn.Module) -> str | None:
    if type(base) not in BASE_CLASSES:
        name = f"{type(base).__module__}.{type(base).__name__}"
        return f"base layer class {name}: only torch.nn.Linear and transformers' Conv1D are fused"
    weight, _ = _parameters(base)
    if type(weight) not in PLAIN_TENSORS:
        return f"base weight of class {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"base weight of dtype {weight.dtype}"
    return None


def _why_not_merge(base: nn.Module) -> str | None:
    reason = _why_not_base(base)
    if reason is None:
        weight, _ = _parameters(base)
        if weight.dim() != 2 or weight.is_meta:
            reason = "base weight is sharded, offloaded or not materialised"
    return reason


def is_overridden(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: the fused path would leave that out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _plan(layer: PeftLinear, x: Tensor | None, mixed: Sequence[str] | None = None) -> Plan | str:
    """What to run, read off PEFT's attributes now, or why the call is left to PEFT. Without x: as far as is known.
    `mixed`: the adapters of a batch that mixes them, rather than the active ones."""
    modules = layer._modules
    base = modules["base_layer"]
    assert base is not None
    reason = _why_not_base(base)
    if reason is not None:
        return f"nested in another PEFT layer ({type(base).__name__})" if isinstance(base, BaseTunerLayer) else reason
    if is_overridden(base):
        return "hooks on the base layer, or its forward replaced"
    if nn_module._has_any_global_hook():
        return "global module hooks"
    weight, bias = _parameters(base)
    if weight.dim() != 2:
        return "base weight is sharded or offloaded"
    if x is not None:
        reason = _why_not_input(x, weight)
        if reason is not None:
            return reason
    plan = Plan(weight.t() if type(base) is Conv1D else weight, bias, [])
    reason = add_adapters(plan, layer, x, mixed)
    if reason is not None:
        return reason
    if plan.bias is not None and plan.bias.dtype != weight.dtype:
        plan.bias = plan.bias.to(weight.dtype)
    return plan


def add_adapters(plan: Plan, layer: Any, x: Tensor | None, mixed: Sequence[str] | None = None) -> str | None:
    """Adds a layer's active adapters (or these) to the plan, or says why the call is left to PEFT."""
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules  # type: ignore[union-attr]
    dropouts = modules["lora_dropout"]._modules  # type: ignore[union-attr]
    for name in layer.active_adapters if mixed is None else mixed:
        if name in lora_a:
            if mixed is not None and _parameters(lora_b[name])[1] is not None:  # type: ignore[arg-type]
                return "lora_bias in a batch that mixes adapters"
            if name in layer.lora_variant:
                return f"variant {type(layer.lora_variant[name]).__name__}"
            reason = _add_adapter(plan, layer, lora_a[name], lora_b[name], dropouts[name], layer.scaling[name], x)
            if reason is not None:
                return reason
    return None


def _add_adapter(
    plan: Plan, layer: Any, down: Any, up: Any, dropout: Any, scaling: Any, x: Tensor | None
) -> str | None:
    if type(down) not in FACTORS or type(up) not in FACTORS:
        return f"lora_A or lora_B is a {type(down).__name__}, {type(up).__name__}"
    if type(dropout) is nn.Identity:
        dropout_p = 0.0
    elif type(dropout) is nn.Dropout:
        dropout_p = dropout.p if dropout.training else 0.0
    else:
        return f"lora_dropout is a {type(dropout).__name__}"
    if is_overridden(down) or is_overridden(up) or is_overridden(dropout):
        return "hooks on lora_A, lora_B or lora_dropout, or their forward replaced"
    (lora_a, lora_a_bias), (lora_b, lora_b_bias) = _parameters(down), _parameters(up)
    if type(lora_a) not in PLAIN_TENSORS or type(lora_b) not in PLAIN_TENSORS:
        return f"adapter weights of class {type(lora_a).__name__}, {type(lora_b).__name__}"
    if lora_a.dim() != 2 or lora_b.dim() != 2:
        return "adapter weights are sharded or offloaded"
    if lora_a_bias is not None:
        return "lora_A has a bias"
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}"
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in DTYPES:
        return f"adapter dtypes {lora_a.dtype}, {lora_b.dtype}"
    if x is not None and lora_a.dtype != x.dtype and not layer.cast_input_dtype_enabled:
        return f"casting the input is disabled, and the adapter is {lora_a.dtype} for a {x.dtype} input"
    plan.adapters.append(functional.Adapter(lora_a, lora_b, float(scaling), dropout_p))
    if lora_b_bias is not None:  # lora_bias=True: s·(S Bᵀ + c) + b = s·S Bᵀ + (b + s·c)
        addition = lora_b_bias * scaling
        plan.bias = addition if plan.bias is None else plan.bias + addition
    return None


def _why_not_input(x: Tensor, weight: Tensor) -> str | None:
    if type(x) not in PLAIN_TENSORS:
        return f"input of class {type(x).__name__}"
    if torch.is_autocast_enabled(x.device.type):
        if x.dtype not in AUTOCAST_DTYPES or weight.dtype not in AUTOCAST_DTYPES:
            return f"{x.dtype} input and {weight.dtype} base weight under autocast"
    elif x.dtype != weight.dtype:
        return f"{x.dtype} input into a {weight.dtype} base layer"
    return None


def _parameters(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias). Straight from the dict where they are there, which takes a third of the time of `base.weight`."""
    found = base._parameters
    weight = found.get("weight")
    if weight is None:  # DataParallel's replicas hold plain tensors as attributes, a `StartedLinear` puts it together
        return cast(Tensor, base.weight), cast("Tensor | None", base.bias)
    return weight, found.get("bias")


def _write(base: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """In place: tied weights and views of them follow."""
    old_weight, old_bias = _parameters(base)
    old_weight.data.copy_(weight)
    if old_bias is not None and bias is not None:
        old_bias.data.copy_(bias)


def _fingerprint(base: nn.Module) -> tuple[int, int | None]:
    """The bits' sum as integers, modulo 2^64: the same on every device and in any order."""
    sums = [
        int(tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)) if tensor is not None else None
        for tensor in _parameters(base)
    ]
    return cast("tuple[int, int | None]", tuple(sums))


def _is_current(undo: _Undo, base: nn.Module) -> bool:
    """Whether the weights are those the merge left. After a change of dtype the old weights, cast, are best."""
    return _parameters(base)[0].dtype != undo.weight.dtype or _fingerprint(base) == undo.fingerprint
