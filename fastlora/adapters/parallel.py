"""`parallel_plan`: the plan that cuts a plain model over processes, as one for the patched model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from ..introspect import sharding
from ..introspect.targets import is_conv1d, lora_layers
from ..layers.embedding import FusedLoraEmbedding
from ..layers.experts import ExpertWeight
from ..layers.fused import FusedLayer
from ..ops.call import PLAIN_TENSORS
from ..runtime.checks import check, check_module
from .save import modules_outside_adapters

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


def parallel_plan(model: nn.Module, plan: Mapping[str, Any] | None = None) -> dict[str, ParallelStyle]:
    """What `torch.distributed.tensor.parallel.parallelize_module` needs to cut a patched model (a PEFT model too) as
    `plan` cuts the plain one. Nothing is changed by this.

    Column-wise (`ColwiseParallel`): W0 (N, K) and lora_B (N, r) are cut by rows, lora_A (r, K) is whole. Row-wise
    (`RowwiseParallel`): W0 and lora_A are cut by columns, lora_B is whole. The layouts of the plan's styles hold.
    Calls run on the local shards, on the fused path, with the numbers of one process, to rounding.

    Args:
        model: after `patch` (and `init_lora_ga`, `load_adapter`), before anything wraps or shards it.
        plan: {name of a module of the plain model, with `*` as in `parallelize_module`: its style}. In place of torch's
            styles transformers' words may stand: "colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"
            and, of frozen modules, "replicated_with_grad_allreduce". None: a transformers model's own, `model.tp_plan`.

    Returns:
        {full name: style}. Adapters of linear layers that the plan does not name become replicated DTensors, because
        torch's clipping and optimizers take no mixture; adapters of experts and embeddings stay plain tensors.

    Raises:
        ValueError: a model that is not patched, or is wrapped or sharded already; a style that cannot cut what it is
            given: AdaLoRA's adapters, experts, embeddings with an adapter, Conv1D, a quantised weight, merged adapters,
            a head whose loss is fused.

    Examples:
        >>> fastlora.patch(model, r=16)
        >>> mesh = init_device_mesh("cuda", (8,))
        >>> parallelize_module(model, mesh, fastlora.parallel_plan(model, {"layers.*.up": ColwiseParallel()}))

    Source: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053.
    """
    caller = "parallel_plan"
    check_module(caller, model)
    if (wrapped := sharding.wrapper(model)) is not None:
        raise ValueError(f"{caller}: model: got {wrapped}, want this {sharding.BEFORE}")
    layers = {id(layer): layer for _, layer in lora_layers(model)}
    if not any(isinstance(layer, FusedLayer) for layer in layers.values()):
        raise ValueError(f"{caller}: model: this {type(model).__name__} has no fused layers; want fastlora.patch first")
    if plan is None:
        inner: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
        plan = getattr(inner, "tp_plan", None)
        if not plan:
            raise ValueError(f"{caller}: plan: got None, and {type(inner).__name__} has no tp_plan; want a plan")
    check(isinstance(plan, Mapping), caller, "plan", plan, "a dict of names and styles")
    from ..layers.parallel import LoraParallel  # here, because it loads torch.distributed.tensor

    raw = {id(module): name for name, module in model.named_modules()}
    outside = dict(modules_outside_adapters(model))
    found: dict[str, Any] = {}
    for key, asked in plan.items():
        named = {name: module for name, module in outside.items() if _is_named(name, key)}
        if not named:
            warnings.warn(f"fastlora.{caller}: plan: no module is called {key!r}", UserWarning, stacklevel=2)
        style = _style(key, asked, named)
        for name, module in named.items() if style is not None else ():
            adapted = id(module) in layers or any(isinstance(part, ExpertWeight) for part in module.children())
            if adapted and (why := _why_not(module, style)) is not None:
                raise ValueError(f"{caller}: plan: {key!r} cuts {name!r} by {type(style).__name__}: {why}")
            found[raw[id(module)]] = LoraParallel(style) if adapted else style
    for layer in layers.values():
        if raw[id(layer)] not in found and _why_not(layer, None) is None:
            found[raw[id(layer)]] = LoraParallel(None)
    return found


def _is_named(name: str, key: str) -> bool:
    """By `parallelize_module`'s rule, in PEFT's model too."""
    parts, keys = name.removeprefix("base_model.model.").split("."), key.split(".")
    return len(parts) == len(keys) and all(map(fnmatchcase, parts, keys))


def _style(key: str, style: Any, named: Mapping[str, nn.Module]) -> Any:
    """A word of transformers' as torch's style; None where nothing is to be done. Raises ValueError for another."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

    if isinstance(style, ParallelStyle):
        return style
    if style == "replicated_with_grad_allreduce":
        if not any(parameter.requires_grad for module in named.values() for parameter in module.parameters()):
            return None
        raise ValueError(f"parallel_plan: plan: {key!r}: got {style!r} of trained parameters, want frozen ones")
    words = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
    }
    if style not in words:
        raise ValueError(f"parallel_plan: plan: {key!r}: got {style!r}, want a ParallelStyle or one of {list(words)}")
    return words[style]


def _why_not(layer: Any, style: Any) -> str | None:
    """Why a layer with adapters cannot be cut in this style (None: be whole, with replicated adapters)."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if isinstance(layer, (ExpertWeight, FusedLoraEmbedding)) or not getattr(layer, "shares_input", False):
        return "its adapters are those of experts, an embedding, a quantised layer or a layer that is left to PEFT"
    if type(style) not in (ColwiseParallel, RowwiseParallel, type(None)):
        return "a layer with adapters takes ColwiseParallel or RowwiseParallel"
    if len(getattr(layer, "lora_E", ())):
        return "AdaLoRA deals out ranks in one process only"
    if layer.merged_adapters:
        return f"adapters {list(layer.merged_adapters)} are merged into its weight; call fastlora.unmerge(model) first"
    if layer.loss_trust is not None and style is not None:
        return "its loss is fused, which needs the head whole"
    base = getattr(layer, "base_layer", layer)
    if getattr(layer, "fan_in_fan_out", False) or is_conv1d(base):
        return "a Conv1D, whose weight is (in, out), which torch's styles do not take either"
    if any(type(tensor) not in PLAIN_TENSORS or not tensor.is_floating_point() for tensor in layer.parameters()):
        return "not all of its parameters are plain floating-point tensors"
    return None
