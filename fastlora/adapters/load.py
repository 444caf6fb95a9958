"""Adapters on disk, in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT loads what is saved here, and what PEFT saved loads here. Files are written next to their final place and renamed
into it; everything read is checked before the model is touched. No pickle, ever. docs/details/peft.md has the details.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..introspect import names as introspect_names
from ..introspect import sharding
from ..introspect import targets as introspect_targets
from ..introspect.fused import FusedPeftLayer
from ..layers import starts
from ..layers.checks import check_adapter_arguments, scale_of
from ..layers.experts import LORA, ExpertWeight
from ..layers.state import AdapterState
from ..runtime import progress
from ..runtime.messages import some
from . import format, patch
from .format import AdapterFile, Spec
from .save import is_peft_model, modules_outside_adapters
from .switch import follow_ties


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Puts an adapter saved by `save_adapter` or by PEFT into a model, under this name.

    A model into which `add_adapter` of transformers, or `inject_adapter_in_model`, has put PEFT's layers takes it too.
    A plain model is patched as the adapter's configuration says, and the adapter is active. A patched model gets one
    more adapter, inactive until `set_adapter`, or has the one of that name overwritten. A `PeftModel` loads it itself.
    In a model inside DistributedDataParallel, or sharded by `fully_shard`, adapters can be overwritten and not added:
    every process must call this, and must be able to read the directory.
    Weights take the dtype of the layer's adapters: float32 on half-precision bases. An adapter that PEFT started with
    "pissa" or "olora" and did not convert runs on a changed base weight, as in PEFT: the change is computed again from
    the model's own weight (the one that the adapter was trained on), and `unpatch` takes it back. What PEFT saved whole
    besides LoRA (embeddings of a resized vocabulary, `modules_to_save`) goes into the model's own weights, for all
    adapters, and stays there; a PeftModel has it for the one adapter.

    Raises:
        FileNotFoundError: the directory or one of its two files is not there.
        ValueError: files that are truncated, foreign or in use of features that are not supported; keys or shapes that
            do not fit the model; an adapter of that name with other shapes, or merged; a new one for a wrapped model.
            The model is then as it was.

    Examples:
        >>> fastlora.load_adapter(model, "runs/my-adapter")
    """
    model, outermost = introspect_targets.unwrap(model, "load_adapter"), model
    introspect_targets.check_holder(model, "load_adapter")
    root = Path(directory)
    config, tensors = format.read(root)
    wrapped = sharding.wrapper(outermost)
    if sharding.has_shards(model):
        sharding.reshard(model)
    if is_peft_model(model) or any(True for _ in introspect_targets.peft_lora_layers(model)):
        from ..integrations.peft import state  # which needs peft, and the model brought it

        _check_wrapped(wrapped, adapter_name, adapter_name not in getattr(model, "peft_config", {}))
        with introspect_names.peeled(model):
            state.load(model, root, config, tensors, adapter_name, format.changes_base(config))
        if not sharding.has_shards(model):
            _patch_new_layers(model)
        return
    experts = _experts(model, config)
    places = format.places_of_experts([(name, layer.experts, layer.key) for name, layer in experts.items()])
    in_file = {place: (name, experts[name].num_experts) for name, place in places.items()}
    file = format.parse(root, config, tensors, in_file)
    layers = dict(modules_outside_adapters(model)) | experts
    whole = _check_whole(model, file)
    _check_against_model(model, layers, experts, file, adapter_name)
    new = [name for name in file.filled if not _has_adapter(layers[name], adapter_name)]
    _check_wrapped(wrapped, adapter_name, bool(new))
    if sharding.has_shards(model):
        _check_starts_at_zero(file, layers, adapter_name)
    linear = {name: layers[name] for name in file.modules if name not in file.embeddings}
    shifts = _shifts(model, linear, file, adapter_name)
    with _added(model, layers, file, adapter_name, new), torch.no_grad():
        for name in file.modules:
            layer = layers[name]
            if not _has_adapter(layer, adapter_name):  # of rank 0
                continue
            assert isinstance(layer, AdapterState)
            layer.forget_initial_factors(adapter_name)
            r = layer.r[adapter_name]
            _set_scale(layer, adapter_name, file.spec(name, r))
            if file.is_adalora:
                layer.allocation[adapter_name] = file.allocation(name)
            if name in shifts:
                layer.set_initial_factors(adapter_name, *shifts[name], exact=False)
            for factor, values in file.tensors(name, r).items():
                parameter = getattr(layer, factor)[adapter_name]
                parameter.copy_(sharding.spread(values, parameter))
        for name in _cut_to_nothing(layers, file, adapter_name):
            layer = cast(AdapterState, layers[name])
            layer.lora_E[adapter_name].zero_()
            layer.allocation[adapter_name] = file.cut_to_nothing(layer.r[adapter_name])
        for (module, key), values, alone in whole:
            tensor = getattr(module, key)
            if alone:
                setattr(module, key, nn.Parameter(values.to(tensor), requires_grad=tensor.requires_grad))
            else:
                tensor.copy_(sharding.spread(values, tensor))
        follow_ties(model)


def _experts(model: nn.Module, config: dict[str, Any]) -> dict[str, ExpertWeight]:
    """By name the layers of the experts' weights that the configuration targets, those that there are and new ones that
    are not in the model yet. Raises ValueError for one that cannot be adapted."""
    found: Any = {}
    for name, module, key in introspect_targets.target_parameters(
        model, config.get("target_parameters"), "load_adapter"
    ):
        there = module._modules.get(f"{LORA}{key}")
        if there is None and (why_not := introspect_targets.why_not_experts(module, key)) is not None:
            raise ValueError(f"load_adapter: {name!r} cannot carry an adapter: {why_not}")
        found[name] = ExpertWeight(module, key) if there is None else there
    return found


def _has_adapter(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, AdapterState) and adapter_name in module.lora_A


# Reading, and checking before the model is touched.
def _check_wrapped(wrapped: str | None, adapter_name: str, new: bool) -> None:
    if wrapped is not None and new:
        raise ValueError(
            f"load_adapter: adapter_name: some of the layers have no {adapter_name!r}, and the model is in {wrapped}; "
            f"want it loaded {sharding.BEFORE}"
        )


def _check_starts_at_zero(file: AdapterFile, layers: dict[str, nn.Module], adapter_name: str) -> None:
    started = any(adapter_name in cast(AdapterState, layers[name]).lora_A0 for name in file.modules)
    if file.shift is not None or started:
        raise ValueError(
            f"load_adapter: adapter_name: {adapter_name!r} {'in the file' if file.shift else 'in the model'} did not "
            f"start at zero, and the model is sharded; want it loaded {sharding.BEFORE}"
        )


def _check_against_model(
    model: nn.Module, layers: dict[str, nn.Module], experts: Container[str], file: AdapterFile, adapter_name: str
) -> None:
    """Raises ValueError where the file does not fit the model, naming the module, what it has and what is wanted."""
    check_adapter_arguments(adapter_name, 1, 1, 0.0, caller="load_adapter")
    given = set(file.modules)
    if given - set(layers):
        linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"load_adapter: the adapter has weights for {some(given - set(layers))}, which this {type(model).__name__} "
            f"has not; its linear layers are {some(linear)}"
        )
    targets = file.config.get("target_modules")
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    selected = (
        given
        if all_linear
        else {
            name
            for name, layer in layers.items()
            if (name in experts if isinstance(layer, ExpertWeight) else introspect_names.selects(file.config, name))
        }
    )
    existing = {name for name, layer in layers.items() if _has_adapter(layer, adapter_name)}
    if selected - given:
        raise ValueError(
            f"load_adapter: the adapter has no weights for {some(selected - given)}, which it targets in this model"
        )
    if existing - given - set(_cut_to_nothing(layers, file, adapter_name)):
        raise ValueError(
            f"load_adapter: adapter_name: {adapter_name!r} exists already, also in {some(existing - given)}, for which "
            "there are no weights; want another name"
        )
    if given - selected:
        raise ValueError(
            f"load_adapter: target_modules: {targets!r} does not select {some(given - selected)}, for which there are "
            "weights"
        )
    for name, layer in layers.items():
        if not isinstance(layer, AdapterState):
            continue
        if layer.holds(adapter_name):
            raise ValueError(
                f"load_adapter: {layer.merged_adapters} merged into {name!r}; call fastlora.unmerge(model) first"
            )
    if existing and (missing := set(file.filled) - existing):
        raise ValueError(
            f"load_adapter: adapter_name: {adapter_name!r} exists already, and not in {some(missing)}, for "
            "which there are weights; want another name"
        )
    for name in file.modules:
        _check_shapes(name, layers[name], file, adapter_name)


def _cut_to_nothing(layers: dict[str, nn.Module], file: AdapterFile, adapter_name: str) -> list[str]:
    """The layers with AdaLoRA's adapter that the file of a model after `shrink_to_ranks` has nothing for."""
    if not file.is_adalora or not file.config.get("rank_pattern"):
        return []
    return [
        name
        for name, layer in layers.items()
        if name not in file.modules and isinstance(layer, AdapterState) and adapter_name in layer.lora_E
    ]


def _check_shapes(name: str, layer: nn.Module, file: AdapterFile, adapter_name: str) -> None:
    why_not = introspect_targets.why_not_patchable(layer)
    if why_not is not None:
        raise ValueError(f"load_adapter: {name!r} cannot carry an adapter: {why_not}")
    if (name in file.embeddings) != isinstance(layer, nn.Embedding):
        kinds = ("an embedding", "a linear layer")
        wanted, got = kinds if name in file.embeddings else reversed(kinds)
        raise ValueError(f"load_adapter: {name!r}: the file has it as {wanted}, and it is {got} in this model")
    spec = file.spec(name)
    r = spec.r
    if isinstance(layer, AdapterState) and adapter_name in layer.r:
        r = layer.r[adapter_name]
        for kind in ("use_dora", "use_adalora"):
            if (there := getattr(layer, kind)[adapter_name]) != getattr(spec, kind):
                raise ValueError(
                    f"load_adapter: adapter_name: {adapter_name!r} of {name!r} has {kind}={there}, the file "
                    f"{kind}={not there}; want another name"
                )
    if isinstance(layer, ExpertWeight):
        shapes = layer.factor_shapes(r)
    else:
        n, k = introspect_targets.layer_sizes(layer)
        shapes = {"lora_A": (r, k), "lora_B": (n, r), "lora_E": (r, 1), "lora_magnitude_vector": (n,)}
    for factor, tensor in file.tensors(name, r).items():
        if tuple(tensor.shape) != shapes[factor]:
            raise ValueError(
                f"load_adapter: {factor} of {name!r}: got shape {tuple(tensor.shape)}, want {shapes[factor]}"
            )


def _is_stored_in_out(layer: nn.Module) -> bool:
    """True where the weight is (in, out): a Conv1D, patched or not."""
    return layer.fan_in_fan_out if isinstance(layer, AdapterState) else not isinstance(layer, nn.Linear)


def _shifts(
    model: nn.Module, layers: dict[str, nn.Module], file: AdapterFile, adapter_name: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A₀, B₀) by module name, where the adapter runs on weights from which s·B₀A₀ was taken; the model is only read.

    PEFT finds them again at each load, by the full decomposition of the weight in float32; so does this.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if file.shift is None:
        return found
    caller = f"load_adapter: init_lora_weights={file.shift!r}"
    weights = {name: cast(Tensor, layer.weight) for name, layer in layers.items()}
    starts.check_not_shared(model, weights, caller)
    for name, layer in progress.bar(layers.items(), "load", len(layers)):
        spec = file.spec(name)
        if file.shift == "olora" and _is_stored_in_out(layer):
            raise ValueError(
                f"{caller}: {name!r} is a Conv1D, of whose weight PEFT decomposes the transpose, so that the adapter "
                "does not fit it; load it with PEFT"
            )
        if isinstance(layer, AdapterState):
            layer.check_initial_factors(adapter_name, exact=False)
            weight = layer.unshifted_weight(adapter_name)
        else:
            weight = cast(Tensor, layer.weight).detach()
            weight = weight.t() if _is_stored_in_out(layer) else weight
        scaling = scale_of(spec.lora_alpha, spec.r, spec.use_rslora)
        where = f"load_adapter: {name!r}"
        found[name] = starts.from_weight(weight, spec.r, scaling, file.shift, whole=True, caller=where)
    return found


# Loading.
def _check_whole(model: nn.Module, file: AdapterFile) -> list[tuple[tuple[nn.Module, str], Tensor, bool]]:
    """((module, key), values, whether for this module alone) of the model's tensors that the file has whole
    (embeddings, modules_to_save). PEFT trains a copy of a tied weight: where the others keep another, the module gets
    one of its own. Raises ValueError where the model has none of that name and shape, or adapters are merged in it."""
    found: dict[str, Tensor] = {}
    places: dict[str, tuple[nn.Module, str]] = {}
    users: dict[int, list[str]] = {}
    for prefix, module in introspect_names.named_modules(model):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            users.setdefault(id(tensor), []).append(name)
            if tensor is not None and name in file.whole:
                found[name], places[name] = tensor, (module, key)
                if isinstance(module, AdapterState) and module.merged_adapters:
                    raise ValueError(
                        f"load_adapter: {module.merged_adapters} merged into {prefix!r}; call fastlora.unmerge(model) "
                        "first"
                    )
    absent = file.whole.keys() - found.keys()
    if absent:
        raise ValueError(
            f"load_adapter: the file has {some(absent)} (embeddings, modules_to_save), which this "
            f"{type(model).__name__} has not; want the model that the adapter was made for"
        )
    for name, tensor in found.items():
        shapes = tuple(file.whole[name].shape), tuple(tensor.shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"load_adapter: {name}: got shape {shapes[0]}, the model has {shapes[1]}; want a model of that size "
                f"(a vocabulary: model.resize_token_embeddings({shapes[0][0]}), before patch)"
            )
    unsaved = [
        name
        for name in file.config.get("modules_to_save") or ()
        if not any(f".{name}." in f".{key}" for key in file.whole)
    ]
    if unsaved:
        raise ValueError(
            f"load_adapter: modules_to_save: {some(unsaved)} are in the configuration, and not in the file"
        )

    def parts(name: str, tensor: Tensor) -> bool:
        others = [file.whole.get(other, tensor) for other in users[id(tensor)] if other != name]
        tied = bool(others) and not sharding.is_sharded(tensor)
        return tied and not all(torch.equal(file.whole[name].to(tensor), other.to(tensor)) for other in others)

    return [(places[name], file.whole[name], parts(name, tensor)) for name, tensor in found.items()]


@contextlib.contextmanager
def _added(
    model: nn.Module, layers: dict[str, nn.Module], file: AdapterFile, adapter_name: str, names: list[str]
) -> Iterator[None]:
    """Adds the adapter to these modules, patching those that are plain; the body sets its weights. All or nothing."""
    if not names:
        yield
        return
    was_patched = patch.is_patched(model)
    fused: list[Any] = [layer for _, layer in introspect_targets.lora_layers(model)]
    linear = [name for name in names if not isinstance(layers[name], ExpertWeight)]
    common = introspect_names.most_common(file.spec(name) for name in names)
    others: dict[int, list[str]] = {}  # by rank; the other settings are set with the weights
    for name in names:
        if (r := file.spec(name).r) != common.r:
            others.setdefault(r, []).append(re.escape(name))
    patch.patch(
        model,
        **common._asdict(),
        rank_pattern={f"^(?:{'|'.join(alike)})": r for r, alike in others.items()},
        target_modules="|".join(re.escape(name) for name in linear) if linear else [],
        target_parameters=[name for name in names if name not in linear] or None,
        adapter_name=adapter_name,
        backend=fused[0].backend if fused else "auto",
        strict=True,
    )
    layers.update({name: layer for name, layer in introspect_targets.lora_layers(model) if name in names})
    try:
        for name in names:
            layer = layers[name]
            assert isinstance(layer, AdapterState)
            if was_patched and layer not in fused:
                layer.set_adapter([])  # the model's active adapters stay the same
        yield
    except BaseException:
        if not was_patched:
            patch.unpatch(model)
        for layer in (layers[name] for name in names):
            if isinstance(layer, AdapterState) and layer not in fused:
                layer.forget_initial_factors(adapter_name)
                patch.restore_layer(layer)
            elif isinstance(layer, AdapterState) and adapter_name in layer.lora_A:
                layer.delete_adapter(adapter_name)
        raise


def _set_scale(layer: AdapterState, adapter_name: str, spec: Spec) -> None:
    layer.lora_alpha[adapter_name] = spec.lora_alpha
    layer.lora_dropout[adapter_name] = spec.lora_dropout
    layer.use_rslora[adapter_name] = spec.use_rslora
    layer.scaling[adapter_name] = scale_of(spec.lora_alpha, spec.r, spec.use_rslora)


def _patch_new_layers(model: nn.Module) -> None:
    """Those that an adapter of PEFT's has brought, where the others run fused."""
    fused: list[Any] = [module for module in model.modules() if isinstance(module, FusedPeftLayer)]
    if fused:
        patch.patch(model, backend=fused[0].backend)
