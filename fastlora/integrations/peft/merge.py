"""Merging for PEFT's layers: the bits from before the first merge are kept, and unmerging puts them back.

LoRA's and AdaLoRA's layers on plain weights (`ExactMerge`) accumulate deltas in fp32 and round once. Every other layer
merges as PEFT does, which puts new tensors in the place of the base layer's own: those are kept (`Kept`), a quantised
weight in its packed form. docs/details/peft.md says where this holds, and what is PEFT's subtraction.

What a base layer must be for our own merge, and for the fused path of lora.py, is the same thing, and is here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...introspect.fused import FusedPeftLayer

BASE_CLASSES = (nn.Linear, Conv1D)
PLAIN_TENSORS = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Undo:
    """What takes back the merges `merged_adapters[start:start + len(names)]`: the weights from before, on the host."""

    start: int
    names: list[str]
    weight: Tensor
    bias: Tensor | None
    fingerprint: tuple[int, int | None]  # of the merged weights: they are only replaced while they are still those


class ExactMerge(LoraLayer):
    """What comes before a PEFT layer's own class, so that its merges are taken back bit for bit."""

    undos: list[_Undo]  # oldest first
    fan_in_fan_out: bool

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """(A (r, in), B (out, r), the bias next to B or None, s): an adapter adds s·B A, and s times the bias."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters' deltas to the base weight, in fp32 and rounded once; `unmerge` gives the very same bits back.

        Arguments as in PEFT, except that a merge is always safe: raises ValueError, with nothing changed, where the
        merged weights would not be finite.
        """
        base = self.get_base_layer()
        if _why_not_merge(base) is not None:
            return merge_kept(self, super().merge, adapter_names)
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
            unmerge_kept(self, super().unmerge)
        tie_again(self)
        return None

    def take_back_merges(self) -> list[str]:
        """Takes back what this class merged, and says which adapters that were."""
        merged = list(self.merged_adapters)
        self._restore()
        return merged[len(self.merged_adapters) :]

    def _restore(self) -> None:
        """Takes back what this class merged, latest first, bit for bit."""
        base = self.get_base_layer()
        undos, self.undos = self.undos, []
        while undos:
            undo = undos.pop()
            if self.merged_adapters[undo.start :] != undo.names or not _is_current(undo, base):
                break  # the weights were changed while merged: what is left is PEFT's subtraction
            if any(name in self.lora_variant for name in undo.names):
                self._subtract(undo.start)  # for what a variant keeps besides the weights
            del self.merged_adapters[undo.start :]
            _write(base, undo.weight, undo.bias)

    def _open_undo(self, base: nn.Module) -> _Undo:
        """The latest undo where it still describes the weights (merging one by one keeps one copy), else a new one."""
        if self.undos:
            undo = self.undos[-1]
            if self.merged_adapters[undo.start :] == undo.names and _is_current(undo, base):
                return undo
        weight, bias = parameters(base)
        bias_copy = bias.detach().to("cpu", copy=True) if bias is not None else None
        return _Undo(len(self.merged_adapters), [], weight.detach().to("cpu", copy=True), bias_copy, (0, None))

    def _merged(self, names: Sequence[str], base: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The weights with the adapters in, in the weights' dtype. Changes nothing."""
        weight, bias = parameters(base)
        device, wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            total = weight.detach().to(wide, copy=True)
            total_bias = bias.detach().to(wide, copy=True) if bias is not None else None
            for name in names:
                down, up, lora_bias, scaling = self.low_rank(name)
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
        weight, bias = parameters(base)
        before = (weight.detach().clone(), bias.detach().clone() if bias is not None else None)
        merged_before = list(self.merged_adapters)
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # PEFT replaces the weight, which is trained through later
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


class ExactMergeLinear(ExactMerge, PeftLinear):
    """PEFT's LoRA `Linear` whose merges are taken back bit for bit."""

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        (down, _), (up, bias) = parameters(self.lora_A[name]), parameters(self.lora_B[name])
        return down, up, bias, float(self.scaling[name])


class Kept:
    """A base layer as it is, for the layers that PEFT merges its own way: its Parameters, of which a quantised one
    keeps its packed tensors and a plain one a copy on the host, and bitsandbytes' notes on them."""

    def __init__(self, base: nn.Module, only: str | None = None) -> None:
        self.base = base
        self.parameters = {n: p for n, p in base._parameters.items() if p is not None and only in (None, n)}
        self.attributes = {name: dict(p.__dict__) for name, p in self.parameters.items()}
        self.data = {
            name: p.detach().to("cpu", copy=True) if type(p) is nn.Parameter else p.data
            for name, p in self.parameters.items()
        }
        self.notes = {name: copy.copy(value) for name, value in base.__dict__.items() if name == "state"}
        self.notes |= {name: value for name, value in base.__dict__.items() if name == "quant_state"}

    def restore(self) -> None:
        base = self.base
        for name, parameter in self.parameters.items():
            current = base._parameters.get(name)
            base.__dict__.pop(name, None)
            base._parameters[name] = parameter
            if type(parameter) is nn.Parameter:
                parameter.data.copy_(self.data[name])
                continue
            for attribute, value in self.attributes[name].items():
                setattr(parameter, attribute, value)
            parameter.data = self.data[name]
            if current is not None and current.device != parameter.device:  # the model was moved since
                base._parameters[name] = cast(nn.Parameter, parameter.to(current.device))
        for name, value in self.notes.items():
            object.__setattr__(base, name, value)


# On a layer while it is merged: a list of `Kept`, and the Parameter that other modules use.
KEPT, TIED = "_fastlora_kept", "_fastlora_tied"


def merge_kept(layer: Any, peft_merge: Callable[..., None], names: list[str] | None) -> None:
    """PEFT's own merge of a layer, all or nothing; `unmerge_kept` puts the bits back."""
    before, base = list(layer.merged_adapters), layer.get_base_layer()
    # MultiheadAttention's layer merges into its output projection too, which is a LoRA layer of its own.
    inner = [getattr(child, "base_layer", child) for child in base.children()]
    # Of several wrappers around one module each merges into a parameter of its own.
    kept = [Kept(part, getattr(layer, "parameter_name", None)) for part in (base, *inner)]
    first = layer.__dict__.get(KEPT) if before else kept  # merging on top of PEFT's own merge keeps nothing
    try:
        with torch.inference_mode(False), torch.no_grad():
            peft_merge(safe_merge=True, adapter_names=names)
            weight: Any = base._parameters.get("weight")
            # PEFT looks at torchao's weights before it adds the delta, not after.
            if type(weight).__module__.startswith("torchao.") and not torch.isfinite(weight.dequantize()).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(layer.merged_adapters)} seems to be "
                    "broken; nothing was changed"
                )
    except BaseException:
        for part in kept:
            part.restore()
        layer.merged_adapters[:] = before
        raise
    if layer.merged_adapters and first is not None:
        layer.__dict__[KEPT] = first


def unmerge_kept(layer: Any, peft_unmerge: Callable[[], None]) -> None:
    """Takes back what `merge_kept` merged, bit for bit, or else by PEFT's own unmerge."""
    kept = layer.__dict__.pop(KEPT, None)
    if kept is None or not layer.merged_adapters:
        return peft_unmerge()
    if len(kept) > 1:
        peft_unmerge()  # for the notes of the layers within
    for name in layer.merged_adapters:
        getattr(layer, "_caches", {}).pop(f"{name}-weight_norm", None)  # DoRA's
    layer.merged_adapters.clear()
    for part in kept:
        part.restore()


def merge(layer: Any, names: list[str] | None, untie: bool) -> None:
    """Merges into one of PEFT's layers; with `untie` into a weight of its own, because other modules use this one."""
    base = layer.get_base_layer()
    if isinstance(base, AuxiliaryTrainingWrapper):  # PEFT's own merge writes into the embedding too
        raise ValueError(
            "PEFT has tied trained tokens (trainable_token_indices) under this LoRA layer, whose rows would cover what "
            "is merged; want it unmerged, or no LoRA on this layer"
        )
    weight = base._parameters.get("weight")
    untie = untie and type(weight) is nn.Parameter
    if untie:
        base.weight = own_copy(weight)
    try:
        if keeps_bits(layer):
            layer.merge(safe_merge=True, adapter_names=names)
        else:
            merge_kept(layer, layer.merge, names)
    except BaseException:
        if untie:
            base.weight = weight
        raise
    if untie:
        layer.__dict__[TIED] = (weight,)


def unmerge(layer: Any) -> None:
    """Takes back what `merge` did."""
    if keeps_bits(layer):
        layer.unmerge()
    else:
        unmerge_kept(layer, layer.unmerge)
        tie_again(layer)


def own_copy(weight: Tensor) -> nn.Parameter:
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def keeps_bits(layer: Any) -> bool:
    """Whether a layer's own `merge` and `unmerge` are exact: those that run fused."""
    return isinstance(layer, FusedPeftLayer)


def tie_again(layer: Any) -> None:
    """Gives a layer that is unmerged the weight back that it shares with others."""
    base, (tied,) = layer.get_base_layer(), layer.__dict__.pop(TIED, (None,))
    if tied is not None and (tied.device, tied.dtype) == (base.weight.device, base.weight.dtype):
        base.weight = tied


def why_not_base(base: nn.Module) -> str | None:
    if type(base) not in BASE_CLASSES:
        name = f"{type(base).__module__}.{type(base).__name__}"
        return f"base layer class {name}: only torch.nn.Linear and transformers' Conv1D are fused"
    weight, _ = parameters(base)
    if type(weight) not in PLAIN_TENSORS:
        return f"base weight of class {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"base weight of dtype {weight.dtype}"
    return None


def _why_not_merge(base: nn.Module) -> str | None:
    reason = why_not_base(base)
    if reason is None:
        weight, _ = parameters(base)
        if weight.dim() != 2 or weight.is_meta:
            reason = "base weight is sharded, offloaded or not materialised"
    return reason


def parameters(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias). Straight from the dict where they are there, which takes a third of the time of `base.weight`."""
    found = base._parameters
    weight = found.get("weight")
    if weight is None:  # DataParallel's replicas hold plain tensors as attributes, a `StartedLinear` puts it together
        return cast(Tensor, base.weight), cast("Tensor | None", base.bias)
    return weight, found.get("bias")


def _write(base: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """In place: tied weights and views of them follow."""
    old_weight, old_bias = parameters(base)
    old_weight.data.copy_(weight)
    if old_bias is not None and bias is not None:
        old_bias.data.copy_(bias)


def _fingerprint(base: nn.Module) -> tuple[int, int | None]:
    """The bits' sum as integers, modulo 2^64: the same on every device and in any order."""
    sums = [
        int(tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)) if tensor is not None else None
        for tensor in parameters(base)
    ]
    return cast("tuple[int, int | None]", tuple(sums))


def _is_current(undo: _Undo, base: nn.Module) -> bool:
    """Whether the weights are those the merge left. After a change of dtype the old weights, cast, are best."""
    return parameters(base)[0].dtype != undo.weight.dtype or _fingerprint(base) == undo.fingerprint
