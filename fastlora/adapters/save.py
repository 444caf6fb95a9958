"""What is written for an adapter: PEFT's two files, from our layers or by PEFT itself, and where."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..integrations.peft import ranks as peft_ranks
from ..introspect import names as introspect_names
from ..introspect import sharding, targets
from ..introspect.fused import PATCHED, OwnLayer
from ..introspect.names import most_common
from ..introspect.targets import lora_layers
from ..layers.checks import scale_of
from ..layers.experts import ExpertWeight
from ..layers.schedule import Allocation, RankSchedule, with_nonzero
from ..layers.state import AdapterState
from ..runtime.messages import some
from . import format

# AdaLoraConfig's default. PEFT's penalty is another one than ours, and no file says what ours was weighted with.
ORTH_REG_WEIGHT = 0.5


def contents(model: nn.Module, adapter_name: str, as_lora: bool = False) -> dict[str, bytes]:
    """The two files' contents. `as_lora`: AdaLoRA's adapters as plain ones."""
    modules = dict(modules_outside_adapters(model))
    layers: dict[str, AdapterState] = {
        name: layer
        for name, layer in lora_layers(model)
        if isinstance(layer, AdapterState) and adapter_name in layer.lora_A
    }
    places = format.places_of_experts(
        [(name, layer.experts, layer.key) for name, layer in layers.items() if isinstance(layer, ExpertWeight)]
    )
    kind = _kind_of(layers, adapter_name)
    kind = "use_lora" if as_lora and kind == "use_adalora" else kind
    peft_type = "ADALORA" if kind == "use_adalora" else "LORA"
    found = {name: _whole_factors(name, layer, adapter_name, kind) for name, layer in layers.items()}
    config = _config(model, modules, layers, adapter_name, kind)
    if kind == "use_adalora":
        plan = _AdaLoraPlan(layers, adapter_name, {name: factors["lora_E"] for name, factors in found.items()})
        found = {name: plan.pruned(name, factors) for name, factors in found.items()}
        config |= plan.config()
    tensors = {
        format.key(places.get(name, name), factor, peft_type, isinstance(layers[name], nn.Embedding)): tensor
        for name, factors in found.items()
        for factor, tensor in factors.items()
    }
    return {
        format.CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        format.WEIGHTS_NAME: safetensors.torch.save(
            # Clones: adapters may share a factor, or be views of one buffer.
            {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
            metadata={"format": "pt"},
        ),
    }


def _whole_factors(name: str, layer: AdapterState, adapter_name: str, kind: str) -> dict[str, Tensor]:
    """A layer's tensors on the host. Raises ValueError for one that is not whole."""
    if kind == "use_adalora":
        r = layer.r[adapter_name]
        lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    else:
        lora_A, lora_B, r, _ = layer.as_plain_adapter(adapter_name)
    shapes = layer.factor_shapes(r)
    found = {"lora_A": (lora_A, shapes["lora_A"]), "lora_B": (lora_B, shapes["lora_B"])}
    if kind == "use_dora":
        found["lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter_name], (layer.out_features,)
    if kind == "use_adalora":
        found["lora_E"] = layer.lora_E[adapter_name], (r, 1)
    whole = {}
    for factor, (parameter, wanted) in found.items():
        tensor = sharding.whole(parameter.detach())
        if tuple(tensor.shape) != wanted or tensor.is_meta:
            raise ValueError(
                f"save_adapter: model: {factor} of {name!r} is a {tuple(tensor.shape)} tensor on "
                f"{tensor.device}, want {wanted}: gather sharded parameters before saving, and "
                "resize a vocabulary before patch"
            )
        whole[factor] = tensor.cpu()
    return whole


def _kind_of(layers: dict[str, AdapterState], adapter_name: str) -> str:
    """ "use_dora", "use_adalora" or "use_lora"; ValueError where layers differ in it."""
    kinds = {
        next((k for k in ("use_dora", "use_adalora") if getattr(layer, k)[adapter_name]), "use_lora")
        for layer in layers.values()
    }
    if len(kinds) > 1:
        raise ValueError(
            f"save_adapter: adapter_name: {adapter_name!r} is of several kinds in different layers "
            f"({', '.join(sorted(kinds))}), want one kind: the format holds one setting"
        )
    return kinds.pop()


class _AdaLoraPlan:
    """What PEFT's AdaLoRA format makes of our adapters: one rank that all began with, one alpha, and in `rank_pattern`
    which of the ranks are left. `values`: each layer's λ (r, 1). One that is not zero is never left out."""

    def __init__(self, layers: dict[str, AdapterState], adapter_name: str, values: dict[str, Tensor]) -> None:
        self.allocations = {name: layer.allocation.get(adapter_name, Allocation()) for name, layer in layers.items()}
        self.kept = {}
        for name, layer in layers.items():
            r, kept = layer.r[adapter_name], self.allocations[name].kept
            if kept is not None and r == len(kept):
                self.kept[name] = with_nonzero(kept, values[name])
            else:
                self.kept[name] = list(kept) if kept is not None and r == sum(kept) else [True] * r
        self.final = any(allocation.kept is not None for allocation in self.allocations.values())
        lengths = {len(kept) for kept in self.kept.values()}
        self.init_r = max(lengths)
        self.has_pattern = self.final or len(lengths) > 1
        scales = {
            name: scale_of(layer.lora_alpha[adapter_name], layer.r[adapter_name], layer.use_rslora[adapter_name])
            for name, layer in layers.items()
        }
        # PEFT's scale is alpha over the rank that all began with, or 1 for an alpha that is not positive. What differs
        # from that in a layer goes into its singular values.
        alpha = introspect_names.as_integer(float(f"{most_common(scales.values()) * self.init_r:.12g}"))
        self.alpha = alpha if alpha > 0 else self.init_r
        self.factors = {name: scale * self.init_r / self.alpha for name, scale in scales.items()}

    def pruned(self, name: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors as the file has them."""
        kept, found = self.kept[name], {}
        index = torch.tensor([i for i, keep in enumerate(kept) if keep], dtype=torch.int64)
        for factor, tensor in factors.items():
            dim = format.RANK_DIMS[factor]
            found[factor] = tensor.index_select(dim, index) if tensor.shape[dim] == len(kept) else tensor
        if not math.isclose(self.factors[name], 1.0, rel_tol=1e-9):
            found["lora_E"] = found["lora_E"] * self.factors[name]
        return found

    def config(self) -> dict[str, Any]:
        """AdaLoraConfig's settings. The schedule is the allocator's, or that of the file that was loaded."""
        schedules = [a.schedule for a in self.allocations.values() if a.schedule is not None]
        # PEFT wants a number of steps in every file.
        schedule = most_common(schedules) if schedules else RankSchedule(target_r=self.init_r, total_steps=1)
        pattern = {
            f"{name}{'.' if name else ''}lora_E": kept + [False] * (self.init_r - len(kept))
            for name, kept in self.kept.items()
        }
        return {
            "init_r": self.init_r,
            "lora_alpha": self.alpha,
            **{key: getattr(schedule, field) for field, (key, _) in format.SCHEDULE.items()},
            "orth_reg_weight": ORTH_REG_WEIGHT,
            "rank_pattern": pattern if self.has_pattern else None,
            "r": 8,  # LoraConfig's default: AdaLoraConfig does not read it, and warns of any other
            "alpha_pattern": {},
            "use_rslora": False,
        }


def _config(
    model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, AdapterState], adapter_name: str, kind: str
) -> dict[str, Any]:
    use_rslora = most_common(layer.use_rslora[adapter_name] for layer in layers.values())
    plain = {name: layer.as_plain_adapter(adapter_name) for name, layer in layers.items()}
    ranks = {name: r for name, (_, _, r, _) in plain.items()}
    alphas = {}
    for name, layer in layers.items():
        alpha = plain[name][3]
        if layer.use_rslora[adapter_name] != use_rslora:  # one flag for all: the same scale by another alpha
            alpha = alpha / math.sqrt(ranks[name]) if not use_rslora else alpha * math.sqrt(ranks[name])
            alpha = alpha * ranks[name] if not use_rslora else alpha / ranks[name]
        alphas[name] = alpha
    dropouts = {layer.lora_dropout[adapter_name] for layer in layers.values()}
    dropout = most_common(layer.lora_dropout[adapter_name] for layer in layers.values())
    if len(dropouts) > 1:
        warnings.warn(
            f"fastlora.save_adapter: adapter {adapter_name!r} has lora_dropout {sorted(dropouts)} in different layers, "
            f"and the format holds one number: {dropout} is saved",
            UserWarning,
            stacklevel=4,
        )
    experts = {name for name, layer in layers.items() if isinstance(layer, ExpertWeight)}
    linear = layers.keys() - experts
    in_out = [layers[name].fan_in_fan_out for name in linear if not isinstance(layers[name], nn.Embedding)]
    if experts and dropout:
        warnings.warn(
            f"fastlora.save_adapter: adapter {adapter_name!r} has lora_dropout {dropout}, and PEFT reads no file with "
            "target_parameters and dropout: 0 is saved. What it computes is the same; training on from the file drops "
            "nothing",
            UserWarning,
            stacklevel=4,
        )
        dropout = 0.0
    r, rank_pattern = introspect_names.common_and_pattern(ranks)
    alpha, alpha_pattern = introspect_names.common_and_pattern(alphas)
    base = sharding.class_of(model)
    return {
        "peft_type": "ADALORA" if kind == "use_adalora" else "LORA",
        "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": introspect_names.target_modules(
            set(linear), {name for name, module in modules.items() if not isinstance(module, ExpertWeight)}
        ),
        "exclude_modules": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "fan_in_fan_out": bool(in_out) and all(in_out),
        "bias": "none",
        "use_rslora": use_rslora,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": kind == "use_dora",
        "lora_bias": False,
        "target_parameters": introspect_names.target_parameters(
            experts, {name for name, *_ in targets.parameters_outside_adapters(model)}
        )
        if experts
        else None,
    }


def peft_contents(model: Any, adapter_name: str, root: Path) -> dict[str, bytes]:
    """What PEFT's own `save_pretrained` writes for one adapter (and its README.md), without touching the directory."""
    with tempfile.TemporaryDirectory() as folder:
        card = root / "README.md"
        if card.is_file():  # PEFT updates a model card that is there
            shutil.copy(card, folder)
        state = None
        if sharding.has_shards(model):
            from ..integrations.peft.state import gathered_state  # which needs peft, and the model brought it

            with introspect_names.peeled(model):
                state = gathered_state(model, adapter_name)
        with introspect_names.peeled(model), peft_ranks.as_saved(model, adapter_name):
            model.save_pretrained(folder, selected_adapters=[adapter_name], state_dict=state)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in paths}


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, but for what a LoRA layer holds inside."""
    inside: set[int] = set()
    for _, layer in lora_layers(model):
        inside.update(id(module) for module in layer.modules() if module is not layer)
    for name, module in introspect_names.named_modules(model):
        if id(module) not in inside:
            yield module.called(name) if isinstance(module, OwnLayer) else name, module


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    as_lora: bool = False,
    allow_replaced: bool = False,
) -> None:
    """Writes adapters as PEFT would, so that `PeftModel.from_pretrained(base_model, directory)` loads them.

    Args:
        model: a patched model, or a `PeftModel` (which saves itself, with all that PEFT saves).
        directory: made where it does not exist. An adapter that is there is replaced, whole or not at all.
        adapter_name: save this one, into `directory` itself. None: all of them, "default" into `directory` and each
            other one into the subdirectory of its name, as PEFT does.
        as_lora: AdaLoRA's adapters as plain LoRA's, A = Λ∘Q of the triplets whose λ is not zero, for whatever loads
            LoRA only. Otherwise they are in PEFT's AdaLoRA format.
        allow_replaced: save also where patched layers have been replaced since, and their adapters are gone
            (`resize_token_embeddings` makes a new `lm_head`).

    A warning names adapters that have not moved from their start, and trainable parameters that the file leaves out.

    Of a model that `fully_shard` or `parallelize_module` has sharded, every process must call this; the first one
    writes, and all wait for it.
    Of others, the process that calls this writes: one is enough.

    Weights are saved in the dtype they have. What is saved of the scale is alpha, not a changed `scaling`, as in PEFT.

    Raises:
        ValueError: no adapters, PEFT's others than LoRA or around fastlora's, patched layers that have been replaced,
            an unknown name, a directory that is a file, parameters sharded by ZeRO-3; `as_lora` of a PeftModel, which
            saves itself.
        OSError: the directory cannot be written (PermissionError, no space left, ...); nothing in it was changed.

    Examples:
        >>> fastlora.save_adapter(model, "runs/my-adapter")
    """
    model, outermost = targets.unwrap(model, "save_adapter"), model
    root = Path(directory)
    if root.exists() and not root.is_dir():
        raise ValueError(f"save_adapter: directory: got {str(root)!r}, which is a file; want a directory")
    targets.check_holder(model, "save_adapter")
    if (why := sharding.is_flat(outermost)) is not None:
        raise ValueError(f"save_adapter: model: {why}")
    names = adapters_of(model)
    if not names:
        raise ValueError(
            f"save_adapter: model: this {type(model).__name__} has no adapters; want a model after fastlora.patch"
        )
    if adapter_name is not None and adapter_name not in names:
        raise ValueError(f"save_adapter: adapter_name: got {adapter_name!r}, want one of {names}")
    if as_lora and is_peft_model(model):
        raise ValueError(
            "save_adapter: as_lora: got True for a PeftModel, which PEFT saves in its own format; want False, then "
            "load_adapter into the base model, and save that with as_lora=True"
        )
    for name in names:
        # PEFT writes to the subdirectory of this name, whatever directory it is given.
        outside = os.path.isabs(name) or ".." in name.split("/")
        if outside or (adapter_name is None and set(name) & {"/", "\\"}):
            raise ValueError(
                f"save_adapter: adapter_name: {name!r} has a slash and is no name of a subdirectory; want each adapter "
                "saved by itself, with adapter_name and a directory (and no absolute path as a name)"
            )
    check_complete(model, allow_replaced)
    wanted = names if adapter_name is None else [adapter_name]
    shards = sharding.has_shards(model)
    if shards:
        sharding.reshard(model)
    files: dict[Path, bytes] = {}
    for name in wanted:
        folder = root if name in ("default", adapter_name) else root / name
        of_peft = is_peft_model(model)
        made = peft_contents(model, name, root) if of_peft else contents(model, name, as_lora)
        if not format.keys(made[format.WEIGHTS_NAME]):
            raise ValueError(
                f"save_adapter: adapter_name: no tensor of this {type(model).__name__} belongs to {name!r}"
            )
        _warn_of_unmoved(made, name)
        files.update({(root if file == "README.md" else folder) / file: data for file, data in made.items()})

    def write() -> None:
        try:
            format.write_files(files)
        except OSError as error:
            message = f"cannot write to {str(root)!r}, nothing in it was changed: {error.strerror}"
            raise OSError(error.errno, f"save_adapter: directory: {message}", error.filename) from error

    sharding.on_first_process(write) if shards else write()


# What a file would lack.
def check_complete(model: nn.Module, allow_replaced: bool) -> None:
    """Raises ValueError, or warns where that is allowed, of patched layers that are gone; warns of what is trainable
    and no adapter's."""
    gone = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in introspect_names.named_modules(model)
        if (patched := module.__dict__.get(PATCHED))
        for name in patched - {n for n, layer in lora_layers(module) if isinstance(layer, OwnLayer)}
    ]
    if gone:
        message = (
            f"{some(gone)} had been patched and are not any more: something has replaced them "
            "(resize_token_embeddings, say), and their adapters are gone"
        )
        if not allow_replaced:
            raise ValueError(f"save_adapter: model: {message}; want patch after that, or allow_replaced=True")
        warnings.warn(f"fastlora.save_adapter: {message}", UserWarning, stacklevel=3)
    places: dict[int, list[str]] = {}
    for name, parent in introspect_names.named_modules(model):
        for key, child in parent._modules.items():
            if isinstance(child, OwnLayer):
                places.setdefault(id(child), []).append(f"{name}.{key}" if name else key)
    for first, *others in (found for found in places.values() if len(found) > 1):
        warnings.warn(
            f"fastlora.save_adapter: {first!r} is the same layer as {some(others)}, and PEFT adapts only the first of "
            "them when it loads the file; fastlora.load_adapter adapts both. Copy the layer before patch to part them",
            UserWarning,
            stacklevel=3,
        )
    kept = {id(p) for p in _parameters_of_adapters(model)}
    left = {
        f"{name}.{key}" if name else key: p
        for name, module in introspect_names.named_modules(model)
        for key, p in module._parameters.items()
        if p is not None and p.requires_grad and id(p) not in kept
    }
    if left:
        warnings.warn(
            f"fastlora.save_adapter: {len(left)} trainable parameters are no adapter's and not saved: {some(left)}"
            ". Save them yourself, or train them as PEFT's modules_to_save",
            UserWarning,
            stacklevel=3,
        )


def _parameters_of_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    for _, layer in lora_layers(model):
        for name, child in layer.named_children():
            if name != "base_layer":
                yield from child.parameters()
    if not is_peft_model(model):
        return
    wrapper = sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper
    configs: Any = model.peft_config
    biases = any(getattr(config, "bias", "none") != "none" for config in configs.values())
    for name, module in model.named_modules():
        if isinstance(module, wrapper) or name == "prompt_encoder":
            yield from module.parameters()
        elif biases and module._parameters.get("bias") is not None:
            yield module.bias  # type: ignore[misc]


def _warn_of_unmoved(made: dict[str, bytes], adapter_name: str) -> None:
    """Of layers in which the adapter is what it was at its start: B A is zero, or cancels the start's."""
    tensors = safetensors.torch.load(made[format.WEIGHTS_NAME])
    unmoved, known = [], 0
    for key, b in tensors.items():
        name, found, suffix = key.rpartition(".lora_B")
        a, values = tensors.get(f"{name}.lora_A{suffix}"), tensors.get(f"{name}.lora_E")
        if key.endswith(".lora_embedding_A"):  # its A starts at zero, and B does not
            name, found = key.rpartition(".")[0], key
            a, b = tensors[f"{name}.lora_embedding_B"].t(), b.t()
        if not found or a is None or not b.numel():
            continue
        known += 1
        half = b.shape[1] // 2
        cancels = b.shape[1] % 2 == 0 and torch.equal(b[:, :half], -b[:, half:]) and torch.equal(a[:half], a[half:])
        if not (b if values is None else values).any() or cancels:
            unmoved.append(name.removeprefix(format.PREFIX))
    if unmoved:
        warnings.warn(
            f"fastlora.save_adapter: {adapter_name!r} has not moved from its start in {len(unmoved)} of {known} layers"
            f": {some(unmoved)}. There it does nothing: it was never trained, or its layer was never called",
            UserWarning,
            stacklevel=3,
        )


# Which model.
def is_peft_model(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapters_of(model: nn.Module) -> list[str]:
    if is_peft_model(model):
        return list(model.peft_config)  # type: ignore[arg-type]
    names: dict[str, None] = {}
    for name, layer in lora_layers(model):
        if not isinstance(layer, AdapterState):
            raise ValueError(
                f"save_adapter: model: {name!r} is PEFT's layer in a {type(model).__name__}, want the PeftModel around "
                "it (or save with the library that put PEFT's layers there)"
            )
        names.update(dict.fromkeys(layer.lora_A))
    return list(names)
