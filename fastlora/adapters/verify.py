"""`verify_adapter`: whether a model computes what an adapter's file says, by PEFT's definition of the format.

Nothing of load.py and format.py is used: each delta is formed densely from the file, and compared with what the layer
makes of random inputs. W and ΔW, one weight's or one expert's:

    LoRA          ΔW = s·B A                       s = alpha/r, or alpha/√r with use_rslora
    embeddings    ΔW = s·(B A)ᵀ                    lora_embedding_A (r, V), lora_embedding_B (D, r)
    experts       ΔW_e = s·B[:, :, e] A[e]         lora_A (E·r, K) as (E, r, K), lora_B (N, r·E) as (N, r, E)
    DoRA          ΔW = m ∘ (W + s·B A)/‖W + s·B A‖ − W
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..introspect import sharding
from ..introspect.names import named_modules
from ..introspect.targets import lora_layers
from ..runtime.messages import by_reason
from .switch import disable_adapter, require_layers

_KEY = re.compile(r"(?:base_model\.model\.)?(?:(.+)\.)?lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?")
_UNREAD = ("lora_bias", "bias", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")


@dataclass
class AdapterCheck:
    """What `verify_adapter` found. compared: weights, each expert's; error: the largest relative error of a layer that
    agrees; mismatches: by name what is wrong. `print` it."""

    compared: int = 0
    error: float = 0.0
    mismatches: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was compared, and all of it agrees."""
        return self.compared > 0 and not self.mismatches

    def __str__(self) -> str:
        found = "1 mismatch" if len(self.mismatches) == 1 else f"{len(self.mismatches) or 'no'} mismatches"
        head = f"fastlora: {self.compared} weights compared, {found}"
        return "\n  ".join([f"{head}, largest relative error {self.error:.1e}", *by_reason(self.mismatches.items())])

    __repr__ = __str__


class _Part(NamedTuple):
    """A weight: the layer with its adapters, the file's tensors and scale."""

    layer: Any
    file: dict[str, Tensor]
    scaling: float


@torch.no_grad()
def verify_adapter(model: nn.Module, directory: str | os.PathLike[str], *, strict: bool = False) -> AdapterCheck:
    """Whether the model, as it is now, computes what the adapter in this directory says: "will a server that follows
    PEFT's format compute what I trained?"

    Compares every layer's output on random inputs with that of dense deltas, which are formed from the file by code of
    its own, one weight or expert at a time. Where nothing is merged, adapters' scales are raised meanwhile to where the
    delta is as large as the base layer's output, so that half precision rounds nothing away. Linear layers, embeddings,
    experts, DoRA, rsLoRA, patterns of ranks and alphas, and tensors that are saved whole are compared; no AdaLoRA.

    Args:
        model: patched, or a PEFT model, with the adapter active or merged. It is left as it was.
        strict: raise ValueError where something does not agree.

    Raises:
        ValueError: no LoRA adapter there (`save_adapter(as_lora=True)` makes one of AdaLoRA's), or a sharded model.

    Example:
        >>> fastlora.save_adapter(model, "adapter")
        >>> fastlora.verify_adapter(model, "adapter").ok
        True
    """
    root, layers = Path(directory), require_layers(model, "verify_adapter")
    try:
        config = json.loads((root / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load((root / "adapter_model.safetensors").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"verify_adapter: directory: no adapter can be read in {str(root)!r}: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"verify_adapter: directory: got peft_type {config.get('peft_type')!r}, want 'LORA'")
    if unread := [key for key in _UNREAD if config.get(key) not in (None, False, "none", [])]:
        raise ValueError(f"verify_adapter: directory: its files use {', '.join(unread)}, which nothing here compares")
    if sharding.has_shards(model):
        raise ValueError("verify_adapter: model: its parameters are sharded over processes, want a model that is not")
    check, modes = AdapterCheck(), {module: module.training for module in model.modules()}
    merged = any(layer.merged_adapters for _, layer in layers)
    model.eval()
    try:
        with disable_adapter(model):  # the base's bits, also where adapters are merged
            jobs = _jobs(check, model, config, tensors)
            wanted = [_wanted(module, parts, merged) for _, module, parts in jobs]
        for (name, module, parts), (x, y, factors) in zip(jobs, wanted, strict=True):
            _compare(check, name, module, parts, x, y, factors)
    finally:
        for module, training in modes.items():
            module.training = training
    if strict and not check.ok:
        raise ValueError(f"verify_adapter: {check}")
    return check


def _jobs(
    check: AdapterCheck, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> list[tuple[str, Any, dict[str, _Part]]]:
    """(name, module, its weights by key) of all that the file has; a linear layer's key is empty."""
    modules: dict[str, Any] = {name.removeprefix("base_model.model."): module for name, module in named_modules(model)}
    files: dict[str, dict[str, Tensor]] = {}
    active = {name for _, layer in lora_layers(model) for name in layer.active_adapters}
    for key, tensor in tensors.items():
        if (match := _KEY.fullmatch(key)) is not None:
            files.setdefault(match[1] or "", {})[match[2]] = tensor
            continue
        name, _, parameter = key.removeprefix("base_model.model.").rpartition(".")
        module = modules.get(name)
        for inner in ("modules_to_save", *active, "base_layer"):  # PEFT's wrappers
            module = getattr(module, "_modules", {}).get(inner) or module
        there = getattr(module, parameter, None)
        if there is None or there.shape != tensor.shape or not torch.equal(there.cpu(), tensor.to(there.dtype)):
            check.mismatches[key] = "saved whole, and not the model's"
    targets = config.get("target_parameters") or ()
    found: dict[str, tuple[Any, dict[str, _Part]]] = {}
    for name, file in files.items():
        place, wrapper = re.sub(r"(\.base_layer)+$", "", name), modules.get(name)
        module = modules.get(place)
        experts = None if module is None else _base(module)
        keys = [
            key
            for key in getattr(experts, "_parameters", {})
            if any(f".{place}.{key}".endswith(f".{target}") for target in targets)
        ]
        depth = name.count(".base_layer", len(place))
        if module is None or depth >= max(1, len(keys)):
            check.mismatches[name] = "in the file, and not in the model"
            continue
        key = keys[len(keys) - 1 - depth] if keys else ""
        layer = getattr(experts, f"lora_{key}", wrapper) if keys else module
        full = f"{place}.{key}" if key else place
        r, alpha = (
            next((v for k, v in (config.get(p) or {}).items() if re.match(rf"(.*\.)?({k})$", full)), config[one])
            for p, one in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        found.setdefault(place, (module, {}))[1][key] = _Part(layer, file, scaling)
    known = {id(part.layer) for _, parts in found.values() for part in parts.values()}
    for name, layer in lora_layers(model):
        if id(layer) not in known and any(active in layer.r for active in layer.active_adapters):
            check.mismatches[name.removeprefix("base_model.model.")] = "adapted in the model, and not in the file"
    return [(name, module, parts) for name, (module, parts) in sorted(found.items())]


def _base(module: Any) -> Any:
    """The plain module in PEFT's wrappers."""
    while "base_layer" in module._modules:
        module = module.base_layer
    return module


def _wanted(module: Any, parts: dict[str, _Part], merged: bool) -> tuple[tuple[Tensor, ...], Tensor, dict[str, float]]:
    """(inputs, what the module is to make of them, by how much each weight's scale is raised for it). The adapters are
    disabled."""
    base = _base(module)
    generator = torch.Generator().manual_seed(0)
    if "" not in parts:
        return _wanted_of_experts(base, parts, generator, merged)
    ((_, file, scaling),) = parts.values()
    weight, a, b = base.weight, file["A"].double(), file["B"].double()
    if isinstance(base, nn.Embedding):
        x = torch.randint(base.num_embeddings, (8,), generator=generator).to(weight.device)
        low_rank = scaling * (b @ a[:, x.cpu()]).t()
    else:
        x = torch.randn(8, a.shape[1], generator=generator).to(weight.device)
        x = x.to(weight.dtype) if weight.is_floating_point() else x
        low_rank = scaling * x.cpu().double() @ (b @ a).t()
    y = module(x).cpu().double()
    shifted = getattr(module, "shifted_by", None)  # PiSSA's weight: the file is an adapter of the original one
    c = 1.0 if merged or shifted or "magnitude_vector" in file else _raise(y, low_rank)
    w = (weight.t() if getattr(module, "fan_in_fan_out", False) else weight).cpu().double()
    if shifted is not None:
        low_rank += x.cpu().double() @ (module.unshifted_weight(shifted).cpu().double() - w).t()
    if "magnitude_vector" in file:
        total = w + scaling * b @ a
        total *= (file["magnitude_vector"].double() / total.norm(dim=1)).unsqueeze(1)
        low_rank = x.cpu().double() @ (total - w).t()
    return (x,), y + c * low_rank, {"": c}


def _wanted_of_experts(
    base: Any, parts: dict[str, _Part], generator: torch.Generator, merged: bool
) -> tuple[tuple[Tensor, ...], Tensor, dict[str, float]]:
    """Each expert is given one token of its own."""
    factors = {}
    up, count = "gate_up_proj" if base.has_gate else "up_proj", base.num_experts

    def linear(key: str, rows: Tensor) -> Tensor:
        weight, bias = getattr(base, key), getattr(base, f"{key}_bias") if base.has_bias else None
        frozen, delta = [], []
        for e, row in enumerate(rows):
            w = (weight[e].t() if base.is_transposed else weight[e]).cpu().double()
            frozen.append(w @ row if bias is None else w @ row + bias[e].cpu().double())
            if key in parts:
                a = parts[key].file["A"].reshape(count, -1, len(row))[e].double()
                b = parts[key].file["B"].reshape(len(w), -1, count)[:, :, e].double()
                delta.append(parts[key].scaling * b @ (a @ row))
        y = torch.stack(frozen)
        if key in parts:
            factors[key] = 1.0 if merged else _raise(y, torch.stack(delta))
            y = y + factors[key] * torch.stack(delta)
        return y

    weight = getattr(base, up)
    x = torch.randn(count, weight.shape[1 if base.is_transposed else 2], generator=generator).to(weight)
    hidden = linear(up, x.cpu().double())
    y = linear("down_proj", base._apply_gate(hidden) if base.has_gate else base.act_fn(hidden))
    if getattr(base, "has_post_expert_norm", False):
        y = base.post_expert_norm(y.to(x)).cpu().double()
    index = torch.arange(count, device=x.device).unsqueeze(1)
    return (x, index, torch.ones_like(index, dtype=x.dtype)), y, factors


def _raise(y: Tensor, low_rank: Tensor) -> float:
    """By how much a delta's output is smaller than the base layer's."""
    return max(1.0, min(1e6, float(y.norm() / low_rank.norm()))) if low_rank.any() else 1.0


def _compare(
    check: AdapterCheck, name: str, module: Any, parts: dict[str, _Part], x: tuple, want: Tensor, factors: dict
) -> None:
    before = [(part.layer.scaling, dict(part.layer.scaling)) for part in parts.values()]
    try:
        for key, part in parts.items():
            for adapter in part.layer.active_adapters:
                if adapter in part.layer.scaling:
                    part.layer.scaling[adapter] *= factors[key]
        got = module(*x)
    finally:
        for scaling, values in before:
            scaling.update(values)
    rows = want.shape[0] if "" not in parts else 1
    check.compared += rows * len(parts)
    difference, size = got.cpu().double() - want, want.norm(dim=1).clamp_min(1e-30)
    errors = difference.norm(dim=1) / size
    error, eps = float(errors.max()), 16 * torch.finfo(got.dtype).eps
    if error <= max(eps, 1e-5):
        check.error = max(check.error, error)
        return
    wrong = [str(e) for e in (errors > max(eps, 1e-5)).nonzero().flatten().tolist()]
    where = f" of expert {', '.join(wrong[:8])}{', ...' if len(wrong) > 8 else ''}" if "" not in parts else ""
    check.mismatches[name] = f"the output{where} differs from the file's by {error:.1e} of its size"
