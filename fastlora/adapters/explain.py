"""`fastlora.explain(layer, x)`: which backend a layer's call takes, forward and backward, and why."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.peft.family import why_not_fused
from ..layers.embedding import FusedLoraEmbedding
from ..layers.fused import FusedLayer, Terms
from ..ops import call as ops_call
from ..ops.dora import aten as dora_aten
from ..ops.dora import dora as dora_op
from ..ops.lora import choice
from ..ops.lora import measure as lora_measure
from ..runtime import cache as tuning_cache
from ..runtime import env
from .switch import require_layers


@dataclass(frozen=True)
class Explanation:
    """What becomes of a call. `print` it, or read the fields.

    forward, backward: "cublas", "triton", "triton_s_inside" or "torch"; "eager" where plain PyTorch or PEFT runs, and
        "base" where the frozen layer runs alone.
    reason: why. call: the sizes and dtypes that it was chosen for.
    times: measured seconds, {"forward": {candidate: seconds}, "backward": ...}; empty where nothing was measured.
    candidates: of each "passed its self-check", "not checked yet", "needs no check", or why it cannot take the call.
    needed: what would change the choice, or let one be made.
    """

    layer: str
    forward: str
    backward: str
    reason: str
    call: str = ""
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    candidates: dict[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [self.layer + (f": {self.call}" if self.call else "")]
        for direction, name in (("forward", self.forward), ("backward", self.backward)):
            times = [f"{other} {1e6 * s:.1f} µs" for other, s in self.times.get(direction, {}).items()]
            known = ", ".join(times)
            lines.append(f"  {direction:<9} {name}{f' (measured: {known})' if times else ''}")
        lines.append(f"  because   {self.reason}")
        lines += [f"  {name:<16} {state}" for name, state in self.candidates.items()]
        lines += [f"  needed    {step}" for step in self.needed]
        return "\n".join(lines)


def explain(layer: nn.Module, x: Tensor, *, measure: bool = False) -> Explanation:
    """Which backend `layer(x)` takes now, and why. Nothing is computed, checked or measured, unless asked for.

    Args:
        layer: a `FusedLoraLinear`, a PEFT LoRA layer (patched or not), or any module.
        x: an input as the layer would get it, (..., K); autocast counts where this is called within it.
        measure: make the choice first, with self-checks and measurements, as a first call does; also where a first call
            would not measure (in a distributed run, in a profiler), but not during capture or compilation.

    Raises:
        ValueError: x is no floating-point tensor with the layer's in_features as its last dimension.

    Examples:
        >>> layer = FusedLoraLinear(64, 128)
        >>> explain(layer, torch.randn(4, 64)).forward
        'torch'
    """
    name = type(layer).__name__
    if not isinstance(layer, FusedLayer):
        reason, needed = why_not_fused(layer)
        if isinstance(size := getattr(layer, "in_features", None), int) and isinstance(reason, str):
            _check_input(size, x)
        return Explanation(name, "eager", "eager", reason, needed=needed)
    own: Any = layer
    if isinstance(layer, FusedLoraEmbedding):
        if own.disable_adapters or own.merged_adapters or not own.active_adapters:
            return _base(name, "its adapters are disabled, merged or not active")
        return Explanation(name, "torch", "torch", "an embedding: looked up and multiplied by ATen, on every device")
    _check_input(own.in_features, x)
    if own.disable_adapters or own.merged_adapters:
        return _base(name, f"its adapters are {'disabled' if own.disable_adapters else 'merged'}")
    if hasattr(layer, "num_experts"):
        grouped = "a weight of experts: its module runs it, by lora_grouped_linear, which chooses at each call"
        return Explanation(name, "grouped", "grouped", grouped)
    shards = layer.tensor_parallel
    with (
        contextlib.nullcontext(x) if shards is None else shards.part_of(x) as x,
        layer.terms_written_out(x) as (x, terms, backend),
    ):
        if isinstance(terms, str):
            page = "docs/details/peft.md" if layer.shares_input else "docs/details/qlora.md"
            return Explanation(name, "eager", "eager", f"left to PEFT's forward: {terms}", needed=(page,))
        if not terms.adapters:
            return _base(name, "its adapters are not active, or none of the active ones is in this layer")
        found = _fused(name, x, terms, backend, measure, composed=layer.shares_input)
        if backend == layer.backend:
            return found
        wide = "x is wider than the frozen layer computes in, and the low-rank path keeps its digits"
        return replace(found, reason=wide, needed=())


def fallbacks(model: nn.Module) -> dict[str, str]:
    """By name the LoRA layers whose latest call ran in PEFT's forward rather than fused, and why; empty where all ran
    fused, or the base layer alone (merged, disabled), or were not called yet. PEFT's layers that are not patched are
    among them.

    `layer.calls` has the counts; calls inside a compiled graph are not counted.

    Raises:
        ValueError: a model without LoRA layers.

    Examples:
        >>> loss.backward()
        >>> fastlora.fallbacks(model)
        {}
    """
    found: dict[str, str] = {}
    for name, layer in require_layers(model, "fallbacks"):
        reason = layer.calls.latest if isinstance(layer, FusedLayer) else why_not_fused(layer)[0]
        if reason is not None:
            found[name] = reason
    return found


def _check_input(in_features: int, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != in_features:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"explain: x: got {got}, want a floating-point tensor of shape (..., {in_features})")


def _base(name: str, reason: str) -> Explanation:
    return Explanation(name, "base", "base", f"the frozen layer runs alone: {reason}")


def _fused(name: str, x: Tensor, terms: Terms, backend: str, measure: bool, composed: bool) -> Explanation:
    """Of `multi_lora_linear`: adapters without dropout run as one, each of the others but the first eagerly."""
    weight, bias, adapters = terms.weight, terms.bias, terms.adapters
    with torch.no_grad():
        plain = [adapter for adapter in adapters if adapter.dropout_p == 0.0]
        adapter = ops_call.concatenate(plain) if plain else adapters[0]
        beside = len(adapters) - max(1, len(plain))
        if ops_call.autocast_enabled(x):
            x, weight, bias = ops_call.cast_for_autocast(x, weight, bias)
        lora_A, lora_B, dropout_p = adapter.lora_A, adapter.lora_B, adapter.dropout_p
        call = choice.Call(x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, dropout_p)
        sizes = str(lora_measure.key_of(call.x, weight, lora_A, dropout_p))
        if weight.numel() == 0 or not ops_call.takes_fused_path(x, weight, bias, lora_A, lora_B):
            reason = "a tensor subclass, a functorch transform or an empty weight: the reference runs"
            return Explanation(name, "eager", "eager", reason, sizes, needed=("plain tensors",))
        if measure:
            with choice.measuring("always"):
                choice.select(*call, backend)
        peek = choice.peek(call, backend)
        needed = _needed(peek, x, backend)
    reason = peek.choice.reason
    if composed and peek.choice.name == "torch" and x.device.type == "cpu" and x.numel() < ops_call.SMALL:
        reason += "; x is small: ATen's own autograd differentiates it"
    if any(one.magnitude is not None for one in adapters):
        kernels = dora_op.select(x, lora_A, backend) is not dora_aten
        reason += f"; DoRA's norms and scaling by {'Triton kernels' if kernels else 'ATen'}"
    if beside:
        reason += f"; {beside} of {len(adapters)} adapters have dropout of their own and run eagerly"
    times = {} if peek.entry is None else {way: dict(peek.entry[way]) for way in tuning_cache.DIRECTIONS}
    return Explanation(name, *peek.choice.passes, reason, sizes, times, peek.candidates, tuple(needed))


def _needed(peek: choice.Peek, x: Tensor, backend: str) -> list[str]:
    if not x.is_cuda:
        return ["an NVIDIA GPU (compute capability 8.0 or later) for the hand-written kernels"]
    needed = []
    if peek.not_measured is not None:
        needed.append(f"a measurement ({peek.not_measured}); explain(layer, x, measure=True) makes it now")
    if peek.provisional is not None:
        needed.append(f"a call outside of where this one is: {peek.provisional}")
    asked = env.backend() if backend == "auto" else backend
    if asked != "auto":
        needed.append(f'backend="auto" (now {asked!r}), if measured times are to decide')
    return needed
