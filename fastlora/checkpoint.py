"""Adapters on disk, in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT loads what is saved here, and what PEFT saved loads here. Files are written beside their final place and renamed
into it; everything read is checked before the model is touched. No pickle, ever. docs/peft.md has the details.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import adapter_files, patching, peft_format, progress, sharding, starts, targets
from .adapter_files import contents, modules_outside_adapters, most_common
from .layers import FusedLoraLinear, check_adapter_arguments, scale_of
from .peft_format import AdapterFile, Spec, some
from .targets import lora_layers


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None, as_lora: bool = False
) -> None:
    """Writes adapters as PEFT would, so that `PeftModel.from_pretrained(base_model, directory)` loads them.

    Args:
        model: a patched model, or a `PeftModel` (which saves itself, with all that PEFT saves).
        directory: made where it does not exist. An adapter that is there is replaced, whole or not at all.
        adapter_name: save this one, into `directory` itself. None: all of them, "default" into `directory` and each
            other one into the subdirectory of its name, as PEFT does.
        as_lora: AdaLoRA's adapters as plain LoRA's, A = Λ∘Q of the triplets whose λ is not zero, for whatever loads
            LoRA only. Otherwise they are in PEFT's AdaLoRA format.

    Of a model that `fully_shard` has sharded, every process must call this; the first one writes, and all wait for it.
    Of others, whoever calls this writes: one process is enough.

    Weights are saved in the dtype they have. What is saved of the scale is alpha, not a changed `scaling`, as in PEFT.

    Raises:
        ValueError: no adapters, an unknown name, a directory that is a file, parameters sharded by ZeRO-3; `as_lora` of
            a PeftModel, which saves itself.
        OSError: the directory cannot be written (PermissionError, no space left, ...); nothing in it was changed.

    Example:
        >>> fastlora.save_adapter(model, "runs/my-adapter")
    """
    model = targets.unwrap(model, "save_adapter")
    root = Path(directory)
    if root.exists() and not root.is_dir():
        raise ValueError(f"save_adapter: directory: got {str(root)!r}, which is a file; want a directory")
    names = _adapters_of(model)
    if not names:
        raise ValueError(
            f"save_adapter: model: this {type(model).__name__} has no adapters; want a model after fastlora.patch"
        )
    if adapter_name is not None and adapter_name not in names:
        raise ValueError(f"save_adapter: adapter_name: got {adapter_name!r}, want one of {names}")
    if as_lora and _is_peft_model(model):
        raise ValueError(
            "save_adapter: as_lora: got True for a PeftModel, which PEFT saves in its own format; want False, then "
            "load_adapter into the base model, and save that with as_lora=True"
        )
    wanted = names if adapter_name is None else [adapter_name]
    shards = sharding.has_shards(model)
    if shards:
        sharding.reshard(model)
    files: dict[Path, bytes] = {}
    for name in wanted:
        folder = root if name in ("default", adapter_name) else root / name
        of_peft = _is_peft_model(model)
        made = adapter_files.peft_contents(model, name, root) if of_peft else contents(model, name, as_lora)
        files.update({(root if file == "README.md" else folder) / file: data for file, data in made.items()})

    def write() -> None:
        try:
            peft_format.write_files(files)
        except OSError as error:
            message = f"cannot write to {str(root)!r}, nothing in it was changed: {error.strerror}"
            raise OSError(error.errno, f"save_adapter: directory: {message}", error.filename) from error

    sharding.on_first_process(write) if shards else write()


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Puts an adapter saved by `save_adapter` or by PEFT into a model, under this name.

    A plain model is patched as the adapter's configuration says, and the adapter is active. A patched model gets one
    more adapter, inactive until `set_adapter`, or has the one of that name overwritten. A `PeftModel` loads it itself.
    In a model inside DistributedDataParallel, or sharded by `fully_shard`, adapters can be overwritten and not added:
    every process must call this, and must be able to read the directory.
    Weights take the dtype of the layer's adapters: float32 on half-precision bases. An adapter that PEFT started with
    "pissa" or "olora" and did not convert runs on a changed base weight, as in PEFT: the change is computed again from
    the model's own weight (the one that the adapter was trained on), and `unpatch` takes it back.

    Raises:
        FileNotFoundError: the directory or one of its two files is not there.
        ValueError: files that are truncated, foreign or in use of features that are not supported; keys or shapes that
            do not fit the model; an adapter of that name with other shapes, or merged; a new one for a wrapped model.
            The model is then as it was.

    Example:
        >>> fastlora.load_adapter(model, "runs/my-adapter")
    """
    model, outermost = targets.unwrap(model, "load_adapter"), model
    root = Path(directory)
    config, tensors = peft_format.read(root)
    wrapped = sharding.wrapper(outermost)
    if sharding.has_shards(model):
        sharding.reshard(model)
    if _is_peft_model(model):
        _check_wrapped(wrapped, adapter_name, adapter_name not in model.peft_config)  # type: ignore[operator]
        if sharding.has_shards(model):
            _load_into_sharded_peft(model, root, config, tensors, adapter_name)
            return
        _load_into_peft(model, root, adapter_name, peft_format.changes_base(config))
        return
    file = peft_format.parse(root, config, tensors)
    layers = dict(modules_outside_adapters(model))
    _check_against_model(model, layers, file, adapter_name)
    new = [name for name in file.filled if not _has_adapter(layers[name], adapter_name)]
    _check_wrapped(wrapped, adapter_name, bool(new))
    if sharding.has_shards(model):
        _check_starts_at_zero(file, layers, adapter_name)
    shifts = _shifts(model, {name: layers[name] for name in file.modules}, file, adapter_name)
    with _added(model, layers, file, adapter_name, new), torch.no_grad():
        for name in file.modules:
            layer = layers[name]
            if not _has_adapter(layer, adapter_name):  # of rank 0
                continue
            assert isinstance(layer, FusedLoraLinear)
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


# Which model.


def _is_peft_model(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _adapters_of(model: nn.Module) -> list[str]:
    if _is_peft_model(model):
        return list(model.peft_config)  # type: ignore[arg-type]
    names: dict[str, None] = {}
    for name, layer in lora_layers(model):
        if not isinstance(layer, FusedLoraLinear):
            raise ValueError(
                f"save_adapter: model: {name!r} is PEFT's layer in a {type(model).__name__}, want the PeftModel around "
                "it (or save with the library that put PEFT's layers there)"
            )
        names.update(dict.fromkeys(layer.lora_A))
    return list(names)


def _has_adapter(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, FusedLoraLinear) and adapter_name in module.lora_A


# Reading, and checking before the model is touched.


def _check_wrapped(wrapped: str | None, adapter_name: str, new: bool) -> None:
    if wrapped is not None and new:
        raise ValueError(
            f"load_adapter: adapter_name: some of the layers have no {adapter_name!r}, and the model is in {wrapped}; "
            f"want it loaded {sharding.BEFORE}"
        )


def _check_starts_at_zero(file: AdapterFile, layers: dict[str, nn.Module], adapter_name: str) -> None:
    started = any(adapter_name in cast(FusedLoraLinear, layers[name]).lora_A0 for name in file.modules)
    if file.shift is not None or started:
        raise ValueError(
            f"load_adapter: adapter_name: {adapter_name!r} {'in the file' if file.shift else 'in the model'} did not "
            f"start at zero, and the model is sharded; want it loaded {sharding.BEFORE}"
        )


def _check_against_model(model: nn.Module, layers: dict[str, nn.Module], file: AdapterFile, adapter_name: str) -> None:
    """Raises ValueError where the file does not fit the model, naming the module, what it has and what is wanted."""
    check_adapter_arguments(adapter_name, 1, 1, 0.0, caller="load_adapter")
    given = set(file.modules)
    if given - set(layers):
        linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"load_adapter: the adapter has weights for {some(given - set(layers))}, which this {type(model).__name__} "
            f"has not; its linear layers are {some(linear)}"
        )
    targets = file.config["target_modules"]
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    selected = given if all_linear else {name for name in layers if peft_format.selects(file.config, name)}
    existing = {name for name, layer in layers.items() if _has_adapter(layer, adapter_name)}
    if selected - given:
        raise ValueError(
            f"load_adapter: the adapter has no weights for {some(selected - given)}, which it targets in this model"
        )
    if existing - given:
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
        if not isinstance(layer, FusedLoraLinear):
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


def _check_shapes(name: str, layer: nn.Module, file: AdapterFile, adapter_name: str) -> None:
    why_not = targets.why_not_patchable(layer)
    if why_not is not None:
        raise ValueError(f"load_adapter: {name!r} cannot carry an adapter: {why_not}")
    weight_shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    n, k = weight_shape[::-1] if _is_stored_in_out(layer) else weight_shape
    spec = file.spec(name)
    r = spec.r
    if isinstance(layer, FusedLoraLinear) and adapter_name in layer.r:
        r = layer.r[adapter_name]
        for kind in ("use_dora", "use_adalora"):
            if (there := getattr(layer, kind)[adapter_name]) != getattr(spec, kind):
                raise ValueError(
                    f"load_adapter: adapter_name: {adapter_name!r} of {name!r} has {kind}={there}, the file "
                    f"{kind}={not there}; want another name"
                )
    shapes = {"lora_A": (r, k), "lora_B": (n, r), "lora_E": (r, 1), "lora_magnitude_vector": (n,)}
    for factor, tensor in file.tensors(name, r).items():
        if tuple(tensor.shape) != shapes[factor]:
            raise ValueError(
                f"load_adapter: {factor} of {name!r}: got shape {tuple(tensor.shape)}, want {shapes[factor]}"
            )


def _is_stored_in_out(layer: nn.Module) -> bool:
    """True where the weight is (in, out): a Conv1D, patched or not."""
    return layer.fan_in_fan_out if isinstance(layer, FusedLoraLinear) else not isinstance(layer, nn.Linear)


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
        if isinstance(layer, FusedLoraLinear):
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


@contextlib.contextmanager
def _added(
    model: nn.Module, layers: dict[str, nn.Module], file: AdapterFile, adapter_name: str, names: list[str]
) -> Iterator[None]:
    """Adds the adapter to these modules, patching those that are plain; the body sets its weights. All or nothing."""
    if not names:
        yield
        return
    was_patched = patching.is_patched(model)
    fused = [layer for layer in layers.values() if isinstance(layer, FusedLoraLinear)]
    common = most_common(file.spec(name) for name in names)
    others: dict[int, list[str]] = {}  # by rank; the other settings are set with the weights
    for name in names:
        if (r := file.spec(name).r) != common.r:
            others.setdefault(r, []).append(re.escape(name))
    patching.patch(
        model,
        **common._asdict(),
        rank_pattern={f"^(?:{'|'.join(alike)})": r for r, alike in others.items()},
        target_modules="|".join(re.escape(name) for name in names),
        adapter_name=adapter_name,
        backend=fused[0].backend if fused else "auto",
        strict=True,
    )
    try:
        for name in names:
            layer = layers[name]
            assert isinstance(layer, FusedLoraLinear)
            if was_patched and layer not in fused:
                layer.set_adapter([])  # the model's active adapters stay the same
        yield
    except BaseException:
        if not was_patched:
            patching.unpatch(model)
        for layer in (layers[name] for name in names):
            if isinstance(layer, FusedLoraLinear) and layer not in fused:
                layer.forget_initial_factors(adapter_name)
                patching.restore_layer(layer)
            elif isinstance(layer, FusedLoraLinear) and adapter_name in layer.lora_A:
                layer.delete_adapter(adapter_name)
        raise


def _set_scale(layer: FusedLoraLinear, adapter_name: str, spec: Spec) -> None:
    layer.lora_alpha[adapter_name] = spec.lora_alpha
    layer.lora_dropout[adapter_name] = spec.lora_dropout
    layer.use_rslora[adapter_name] = spec.use_rslora
    layer.scaling[adapter_name] = scale_of(spec.lora_alpha, spec.r, spec.use_rslora)


def _load_into_peft(model: Any, root: Path, adapter_name: str, changes_base: bool) -> None:
    """PEFT's own `load_adapter`. It adds first and checks later: where the file does not fit, it is all taken back, the
    base weights too where PEFT changes them (they are kept on the host meanwhile)."""
    bases = [module for module in model.modules() if isinstance(module, nn.Linear) or targets.is_conv1d(module)]
    weights = [(b.weight, b.weight.detach().to("cpu", copy=True)) for b in bases] if changes_base else []
    existed = adapter_name in model.peft_config
    marker = f".{adapter_name}."
    before = {k: v.detach().clone() for k, v in model.state_dict().items() if marker in k} if existed else {}
    modules_before = set(model.modules())
    fused = [module for module in modules_before if patching.is_fused_peft(module)]
    try:
        result = model.load_adapter(str(root), adapter_name)
        wrong = [*result.missing_keys, *result.unexpected_keys]
        if wrong:
            raise ValueError(f"keys missing or unexpected: {some(wrong)}")
    except Exception as error:
        if existed:
            model.load_state_dict(before, strict=False)
        elif adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        with torch.no_grad():
            for weight, bits in weights:
                weight.copy_(bits)
        for name, module in list(model.named_modules()):
            if module not in modules_before and getattr(module, "base_layer", None) in modules_before:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        raise ValueError(f"load_adapter: {str(root)!r} does not fit this PeftModel: {error}") from error
    if fused:  # the adapter may have brought new layers
        patching.patch(model, backend=fused[0].backend)  # type: ignore[arg-type]


def _load_into_sharded_peft(
    model: Any, root: Path, config: dict[str, Any], tensors: dict[str, Tensor], adapter_name: str
) -> None:
    """Overwrites an adapter that is there: its tensors are laid out as the model's are, and the rest is PEFT's."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict  # the model brought it

    there = get_peft_model_state_dict(model, adapter_name=adapter_name)
    shapes = [{key: tuple(value.shape) for key, value in some_of.items()} for some_of in (tensors, there)]
    wrong = [key for key in {*tensors, *there} if shapes[0].get(key) != shapes[1].get(key)]
    if wrong or peft_format.changes_base(config):
        why = f"keys or shapes differ: {some(wrong)}" if wrong else "it changes the base weights, which are sharded"
        raise ValueError(f"load_adapter: {str(root)!r} does not fit this PeftModel: {why}")
    set_peft_model_state_dict(
        model, {key: sharding.spread(value, there[key]) for key, value in tensors.items()}, adapter_name
    )
