"""PEFT's LoRA layers on quantised bases (QLoRA), in place: bitsandbytes' 4-bit and 8-bit layers, torchao's weights.

As in adopt.py the class of an instance is swapped, and every call reads PEFT's attributes as they are then. What
differs: the frozen weight is written out once a pass into a buffer that all layers use in turn, and only its packed
form is kept for the backward pass (ops/quant/linear.py). Inference is PEFT's own: without gradients, in evaluation
mode, the libraries' kernels multiply with the packed weight.

The layers of bitsandbytes are in bnb.py, which is imported only where a model has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor

from ...layers.fused import Terms
from ...ops import call
from ...ops.quant import weights
from ...ops.quant.linear import is_wider, quantised_dora_linear, quantised_lora_linear
from . import lora, merge
from .lora import PeftFusedLayer

INFERENCE = "evaluation mode without gradients: the packed weight is multiplied with"


class FusedQuantisedLayer(PeftFusedLayer):
    """A PEFT layer on a quantised base whose forward runs `quantised_lora_linear` wherever that computes the same.

    Never constructed: `adopt(layer)` turns a PEFT layer into one, `release(layer)` turns it back.
    """

    shares_input = False
    why_not_base = staticmethod(weights.why_not)

    @classmethod
    def plan_of(cls, layer: Any, x: Tensor | None) -> Plan | str:
        return read_plan(layer, x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():  # a graph has no place for a buffer that layers share
            return self.fall_back("torch.compile", x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        weight, (adapter,) = weights.snapshot(cast(Any, self).base_layer, plan.dtype), plan.adapters
        if adapter.magnitude is not None:
            magnitude, factors = adapter.magnitude, adapter[:3]
            return quantised_dora_linear(x, weight, plan.bias, *factors, magnitude, self.backend, plan.out_dtype)
        return quantised_lora_linear(x, weight, plan.bias, *adapter[:4], self.backend, plan.out_dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge, which quantises the sum; always safe, and the packed bits from before are kept."""
        merge.merge_kept(self, super().merge, adapter_names)  # type: ignore[misc]

    def unmerge(self) -> None:
        """Puts the packed bits from before the first merge back."""
        merge.unmerge_kept(self, super().unmerge)  # type: ignore[misc]

    @contextlib.contextmanager
    def terms_written_out(self, x: Tensor) -> Iterator[tuple[Tensor, Terms | str, str]]:
        plan = read_plan(self, x)
        if isinstance(plan, str):
            yield x, plan, self.backend
            return
        weight = weights.snapshot(cast(Any, self).base_layer, plan.dtype)
        backend = "torch" if is_wider(x, weight, call.autocast_enabled(x)) else self.backend
        with torch.autocast(x.device.type, enabled=False), weights.room_for(weight) as matrix:
            yield x.to(plan.dtype), Terms(matrix, plan.bias, plan.adapters), backend


class FusedTorchaoLinear(FusedQuantisedLayer, TorchaoLoraLinear):  # type: ignore[misc]
    """PEFT's layer on a torchao weight."""

    PLAIN = TorchaoLoraLinear


@dataclass
class Plan(Terms):
    """What a call runs: the adapters as one (or none), the bias in the dtype that it is computed in, and that of its
    output."""

    dtype: torch.dtype
    out_dtype: torch.dtype


def read_plan(layer: Any, x: Tensor | None) -> Plan | str:
    """What to run, read off PEFT's attributes now, or why the call is left to PEFT. Without x: as far as is known."""
    base = layer.base_layer
    if (why := weights.lost(base)) is not None:
        raise ValueError(f"{type(layer).__name__}.forward: {why}")
    if (reason := lora.why_not_called(base, weights.why_not)) is not None:
        return reason
    dtype = out_dtype = torch.float32
    if x is not None:
        # On a CPU bitsandbytes may pack a weight again for inference and note that in its state, which outlives the
        # copy that fully_shard has put together.
        if not (torch.is_grad_enabled() or layer.training or (weights.is_gathered(base) and not x.is_cuda)):
            return INFERENCE
        dtypes = _dtypes(base, x)
        if isinstance(dtypes, str):
            return dtypes
        dtype, out_dtype = dtypes
    bias = base._parameters.get("bias")
    plan = Plan(base._parameters["weight"], bias if bias is None else bias.to(dtype), [], dtype, out_dtype)
    if (reason := lora.add_adapters(plan, layer, x, dora=True)) is not None:
        return reason
    if any(adapter.magnitude is not None for adapter in plan.adapters):
        (adapter,) = plan.adapters
        if adapter.dropout_p > 0.0:
            return "DoRA with dropout, whose second product needs the weight twice"
    else:
        adapter = call.as_one_adapter(plan.adapters)
    if adapter is None and plan.adapters:
        return "several adapters, of which one drops something"
    if adapter is not None and x is not None and adapter.lora_A.device != x.device:
        return f"adapters on {adapter.lora_A.device}, input on {x.device}"
    plan.adapters = [] if adapter is None else [adapter]
    plan.bias = plan.bias if plan.bias is None else plan.bias.to(dtype)
    return plan


def _dtypes(base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype] | str:
    """The dtypes that the call is computed in and returned in, as the library would; or why it is left to PEFT."""
    if type(x) not in merge.PLAIN_TENSORS or x.is_nested:
        return f"input of class {type(x).__name__}"
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return "torch.func transforms or torch.jit.trace"
    if x.dim() < 1 or x.shape[-1] != base.in_features or x.device != base.weight.device:
        return f"input of shape {tuple(x.shape)} on {x.device}"
    kind, dtype, out_dtype = weights.kind_of(base), x.dtype, x.dtype
    autocast = torch.is_autocast_enabled(x.device.type)
    low_rank_dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if kind == weights.FOUR_BIT:
        if not base.compute_type_is_set:  # the first input decides, in bitsandbytes' words
            base.set_compute_type(x)
            base.compute_type_is_set = True
        dtype = base.compute_dtype or x.dtype
    elif kind == weights.EIGHT_BIT and autocast:
        # Autocast reaches into bitsandbytes' product on a CPU, and not on a GPU, whose output has its input's dtype.
        dtype = low_rank_dtype
        out_dtype = x.dtype if x.is_cuda else dtype
    elif kind != weights.EIGHT_BIT and base.weight.dtype != x.dtype:
        return f"{x.dtype} input into a {base.weight.dtype} base layer"
    if dtype not in weights.DTYPES or x.dtype not in weights.DTYPES:
        return f"{x.dtype} input"
    if autocast and low_rank_dtype != dtype:
        return f"{x.dtype} input, computed in {dtype} under autocast to {low_rank_dtype}"
    return dtype, out_dtype
