"""Merging for PEFT's layers: the bits from before the first merge are kept, and unmerging puts them back.

Fused LoRA and AdaLoRA layers on plain weights (`ExactMerge`) accumulate deltas in fp32 and round once. Every other
layer merges as PEFT does, which puts new tensors in the place of the base layer's own. Before either, the base layer's
are kept (`Kept`), a quantised weight in its packed form. docs/details/peft.md says where this holds, and what is PEFT's
subtraction.

What a base layer must be for our own merge, and for the fused path of lora.py, is the same thing, and is here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...introspect.fused import FusedPeftLayer, class_name

BASE_CLASSES = (nn.Linear, Conv1D)
PLAIN_TENSORS = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kept:
    """A base layer as it is: its Parameters, of which a quantised one keeps its packed tensors and a plain one a copy
    on the host, and bitsandbytes' notes on them. `only`: of this Parameter."""

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
        """In place where the Parameter is plain: tied weights and views of it follow."""
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

    def fingerprint(self) -> tuple[int, ...] | None:
        """The sums of the present bits as integers, modulo 2^64: the same on every device and in any order. None where
        a Parameter is quantised, on the meta device, gone, or of another dtype: then the old ones are best."""
        now: list[Any] = [self.base._parameters.get(name) for name in self.parameters]
        dtypes = [data.dtype for data in self.data.values()]
        if any(type(p) is not nn.Parameter or p.is_meta for p in now) or [p.dtype for p in now] != dtypes:
            return None
        bits = (p.detach().view(_BITS[p.element_size()]) for p in now)
        return tuple(int(whole.sum(dtype=torch.int64)) for whole in bits)


@dataclass
class _Undo:
    """What takes back the merges `merged_adapters[start:start + len(names)]`: the weights from before."""

    start: int
    names: list[str]
    parts: list[Kept]
    fingerprints: list[tuple[int, ...] | None]  # of the merged weights: they are only replaced while still those

    def fits(self, layer: Any) -> bool:
        """Whether these are the layer's latest merges, and the weights are those that they left."""
        pairs = zip(self.fingerprints, [part.fingerprint() for part in self.parts], strict=True)
        return layer.merged_adapters[self.start :] == self.names and all(
            None in pair or pair[0] == pair[1] for pair in pairs
        )


# On a layer while it is merged: its `_Undo`s, oldest first, and the Parameter that other modules use.
KEPT, TIED = "_fastlora_kept", "_fastlora_tied"


def merge_kept(layer: Any, merge_layer: Callable[..., None], names: list[str] | None) -> None:
    """Runs a merge of a layer's, PEFT's own or another, all or nothing; `unmerge_kept` puts the bits back."""
    before, base = list(layer.merged_adapters), layer.get_base_layer()
    # MultiheadAttention's layer merges into its output projection too, which is a LoRA layer of its own.
    inner = [getattr(child, "base_layer", child) for child in base.children()]
    # Of several wrappers around one module each merges into a parameter of its own.
    kept = [Kept(part, getattr(layer, "parameter_name", None)) for part in (base, *inner)]
    kept = [part for part in kept if part.parameters]
    on_top = bool(undos := layer.__dict__.get(KEPT)) and undos[-1].fits(layer)  # merging one by one keeps one copy
    try:
        with torch.inference_mode(False), torch.no_grad():
            merge_layer(safe_merge=True, adapter_names=names)
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
    added = layer.merged_adapters[len(before) :]
    if not added or (before and not on_top and len(kept) > 1):
        return
    undos = layer.__dict__.setdefault(KEPT, [])  # DoRA's merge on top of another takes that back, and does it again
    if not (on_top and undos):
        undos.append(_Undo(len(before), [], kept, []))
    undos[-1].names += added
    undos[-1].fingerprints = [part.fingerprint() for part in undos[-1].parts]


def unmerge_kept(layer: Any, peft_unmerge: Callable[[], None]) -> None:
    """Takes back what `merge_kept` merged, bit for bit, and what PEFT merged before, or has been changed since, by
    PEFT's own unmerge."""
    merged = bool(layer.merged_adapters)
    _restore(layer, peft_unmerge)
    if layer.merged_adapters or not merged:
        peft_unmerge()
    tie_again(layer)


def _restore(layer: Any, peft_unmerge: Callable[[], None]) -> None:
    undos = layer.__dict__.pop(KEPT, [])
    while undos and undos[-1].fits(layer):
        undo = undos.pop()
        if len(undo.parts) > 1:
            peft_unmerge()  # for the notes of the layers within
        for name in undo.names:
            getattr(layer, "_caches", {}).pop(f"{name}-weight_norm", None)  # DoRA's
        del layer.merged_adapters[undo.start :]
        for part in undo.parts:
            part.restore()


def take_back(layer: Any) -> list[str]:
    """Of a fused layer that becomes PEFT's again: takes back what was merged into plain weights, and says which
    adapters that were. What PEFT has merged into quantised ones stays."""
    merged, undos = list(layer.merged_adapters), layer.__dict__.get(KEPT, [])
    if any(None in undo.fingerprints for undo in undos):
        del layer.__dict__[KEPT]
    else:
        _restore(layer, layer.unmerge)
    return merged[len(layer.merged_adapters) :]


class ExactMerge(LoraLayer):
    """What comes before a PEFT layer's own class, so that its merges are taken back bit for bit."""

    fan_in_fan_out: bool

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """(A (r, in), B (out, r), the bias next to B or None, s): an adapter adds s·B A, and s times the bias."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters' deltas to the base weight, in fp32 and rounded once; `unmerge` gives the very same bits back.

        Arguments as in PEFT, except that a merge is always safe: raises ValueError, with nothing changed, where the
        merged weights would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        own = _why_not_merge(self.get_base_layer()) is None and not any(name in self.lora_variant for name in names)
        if names:
            merge_kept(self, self._merge if own else super().merge, names)

    def unmerge(self) -> None:
        """Takes back every merge: this class's bit for bit, what PEFT merged before it by PEFT's subtraction."""
        unmerge_kept(self, super().unmerge)

    def _merge(self, safe_merge: bool, adapter_names: list[str]) -> None:
        weight, bias = parameters(self.get_base_layer())
        device, wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(device.type, enabled=False):
            total = weight.detach().to(wide, copy=True)
            total_bias = bias.detach().to(wide, copy=True) if bias is not None else None
            for name in adapter_names:
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
            merged = [(weight, total.to(weight.dtype))]
            if bias is not None and total_bias is not None:
                merged.append((bias, total_bias.to(bias.dtype)))
        if not all(torch.isfinite(values).all() for _, values in merged):
            raise ValueError(
                # PEFT's own words come first: scripts look for them.
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: "
                f"scaled by {[float(self.scaling[name]) for name in adapter_names]} it would make the {weight.dtype} "
                "base weights infinite or NaN, want finite weights; nothing was changed"
            )
        for parameter, values in merged:
            parameter.data.copy_(values)  # in place: tied weights and views of them follow
        self.merged_adapters.extend(adapter_names)


class ExactMergeLinear(ExactMerge, PeftLinear):
    """PEFT's LoRA `Linear` whose merges are taken back bit for bit."""

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        (down, _), (up, bias) = parameters(self.lora_A[name]), parameters(self.lora_B[name])
        return down, up, bias, float(self.scaling[name])


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
        if isinstance(layer, FusedPeftLayer):  # whose own merge is exact
            layer.merge(safe_merge=True, adapter_names=names)  # type: ignore[attr-defined]
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
    if isinstance(layer, FusedPeftLayer):
        layer.unmerge()  # type: ignore[attr-defined]
    else:
        unmerge_kept(layer, layer.unmerge)


def own_copy(weight: Tensor) -> nn.Parameter:
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def tie_again(layer: Any) -> None:
    """Gives a layer that is unmerged the weight back that it shares with others."""
    base, (tied,) = layer.get_base_layer(), layer.__dict__.pop(TIED, (None,))
    if tied is not None and (tied.device, tied.dtype) == (base.weight.device, base.weight.dtype):
        base.weight = tied


def why_not_base(base: nn.Module) -> str | None:
    if type(base) not in BASE_CLASSES:
        return f"base layer class {class_name(base)}: only torch.nn.Linear and transformers' Conv1D are fused"
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
