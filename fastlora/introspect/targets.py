"""Which modules of a model are meant, in PEFT's words, and which of those can be patched."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .fused import OwnLayer, has_own_forward
from .names import named_modules, peeled, unwrapped


class Selection:
    """`target_modules` and `exclude_modules` in PEFT's meaning."""

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str],
        exclude: str | Sequence[str] | None,
        caller: str = "patch",
    ) -> None:
        self.targets = _check_names(targets, f"{caller}: target_modules")
        self.exclude = _check_names(exclude if exclude is not None else [], f"{caller}: exclude_modules")
        self.all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        self.heads = _output_heads(model) if self.all_linear else {}
        self.unused = set() if isinstance(self.targets, str) else set(self.targets)

    def why_not(self, name: str, module: nn.Module) -> str | None:
        """None for a target; else why the module is not one."""
        if not self.all_linear and not self.names(name):
            return "not among target_modules"
        if self.excludes(name):
            return "in exclude_modules"
        if id(module) in self.heads:
            return self.heads[id(module)]
        return None

    def excludes(self, name: str) -> bool:
        """True where exclude_modules names this module."""
        return self._matches(name, self.exclude)

    def names(self, name: str) -> bool:
        """True where target_modules names this module."""
        return self._matches(name, self.targets)

    def _matches(self, name: str, names: str | Sequence[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        found = [target for target in names if name == target or name.endswith(f".{target}")]
        self.unused.difference_update(found)
        return bool(found)


def _check_names(names: str | Sequence[str], argument: str) -> str | list[str]:
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(f"{argument}: got {names!r}, want a regular expression: {error}") from None
        return names
    listed: list[Any] = list(names) if isinstance(names, Iterable) else [names]
    if not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{argument}: got {names!r}, want a string or a list of strings")
    return listed


def _output_heads(model: nn.Module) -> dict[int, str]:
    """The heads that "all-linear" leaves alone, as PEFT does: a transformers model's output embeddings and
    classifiers."""
    heads: dict[int, str] = {}
    with peeled(model):  # transformers looks for the head by names
        for module in model.modules():
            output = getattr(module, "get_output_embeddings", None)
            if not callable(output):
                continue
            head = output()
            if isinstance(head, nn.Module):
                heads[id(head)] = 'the output head: "all-linear" leaves it alone'
            if type(module).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
                for attribute in ("score", "classifier"):
                    head = getattr(module, attribute, None)
                    for part in head.modules() if isinstance(head, nn.Module) else ():
                        heads[id(part)] = 'the classification head: "all-linear" leaves it alone'
    return heads


def unwrap(model: nn.Module, caller: str) -> nn.Module:
    """The model inside its wrappers (`names.inner`)."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{caller}: model: got {type(model).__name__}, want a torch.nn.Module")
    return unwrapped(model)


# Modules of transformers that read the weights of linear layers in them and, some only in their GPU kernels, never call
# these: by a pattern of the class's name.
_READERS = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    r"\w*(Mamba\w*Mixer|BambaMixer|FalconH1Mixer|MambaLayer)": ("dt_proj", "x_proj", "out_proj"),
    r"\w*MHAttentionMap": ("k_proj", "k_linear"),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    r"LongcatFlash\w*Router": ("classifier",),
}


def read_by_parents(model: nn.Module) -> dict[int, str]:
    """By the layer's id, why it is left alone: its parent reads its weight."""
    found: dict[int, str] = {}
    for module in model.modules():
        kind = type(module).__name__
        for pattern, children in _READERS.items():
            if re.fullmatch(pattern, kind):
                why = f"{kind} reads this layer's weight itself and does not (or not always) call its forward"
                found |= {id(child): why for key in children if (child := module._modules.get(key)) is not None}
    return found


def _outside_own_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, but for what a layer of fastlora's own holds."""
    inside: set[int] = set()
    for name, module in named_modules(model):
        if isinstance(module, OwnLayer):
            inside.update(id(child) for child in module.modules() if child is not module)
        if id(module) not in inside:
            yield name, module


def candidates(model: nn.Module, selection: Selection) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer, and whatever else was named as a target, once each."""
    for name, module in _outside_own_layers(model):
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        # A regular expression that ends in ".*" means layers, not what they are in.
        meant = not isinstance(selection.targets, str) or not any(True for _ in module.children())
        if linear or (not selection.all_linear and meant and selection.names(name)):
            yield name, module


def expert_weights(model: nn.Module, selection: Selection) -> Iterator[tuple[str, str, bool]]:
    """(name, why it is left alone, whether it was asked for as a module) of every 3-D parameter that is no
    convolution's kernel: the weights of several linear layers, as transformers has experts."""
    for name, module, key, parameter in parameters_outside_adapters(model):
        if parameter.dim() != 3 or min(parameter.shape) < 2 or isinstance(module, nn.modules.conv._ConvNd):
            continue
        if selection.excludes(name):
            yield name, "in exclude_modules", False
            continue
        suffix = ".".join(name.split(".")[-2:])
        reason = why_not_experts(module, key)
        why = f"experts: target_parameters=[{suffix!r}] adapts them" if reason is None else f"a 3-D parameter: {reason}"
        yield name, why, not selection.all_linear and selection.names(name)


def parameters_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name, module, key, parameter) of every parameter but for adapters', called as before PEFT wrapped its module."""
    for name, module in _outside_own_layers(model):
        if isinstance(module, nn.ParameterDict):
            continue
        name = name.replace(".base_layer", "")
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{key}" if name else key, module, key, parameter


def target_parameters(
    model: nn.Module, targets: Sequence[str] | None, caller: str = "patch"
) -> list[tuple[str, nn.Module, str]]:
    """(name, module, key) of the parameters that are called so, or whose names end so from a dot on, as in PEFT.

    Raises ValueError for a name that matches none.
    """
    if targets is None:
        return []
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{caller}: target_parameters: got {targets!r}, want a list of parameters' names")
    found, unused = [], set(targets)
    for name, module, key, _ in parameters_outside_adapters(model):
        matches = {target for target in targets if name == target or name.endswith(f".{target}")}
        unused -= matches
        if matches:
            found.append((name, module, key))
    if unused:
        experts = [name for name, *_, parameter in parameters_outside_adapters(model) if parameter.dim() == 3]
        known = sorted({".".join(name.split(".")[-3:]) for name in experts})
        raise ValueError(
            f"{caller}: target_parameters: no parameter is called {', '.join(map(repr, sorted(unused)))} in this "
            f"{type(model).__name__}; its 3-D parameters are "
            + (", ".join(known[:8]) + (", ..." if len(known) > 8 else "") if known else "none: it has no experts")
        )
    return found


def why_not_experts(module: Any, key: str) -> str | None:
    """None where this parameter is the weight of experts that can be adapted: of a module that transformers' experts
    interface runs (`use_experts_implementation`); else why not."""
    parameter = module._parameters[key]
    if parameter.dim() != 3:
        return f"it has {parameter.dim()} dimensions, want a weight of experts, which has 3"
    forward = type(module).forward if not hasattr(module, "ORIGINAL") else module.ORIGINAL.forward
    if getattr(forward, "__globals__", {}).get("__name__") != "transformers.integrations.moe":
        return f"{type(module).__name__} is not run by transformers' experts interface (use_experts_implementation)"
    if key not in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        return f"{type(module).__name__} multiplies its tokens by other parameters"
    if not has_own_forward(module):
        return "its module's forward was replaced on the instance"
    if module._is_expert_parallel:
        return "its experts are spread over processes (expert parallel): adapters would be too"
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.element_size() < 2:
        kind = f"{type(parameter).__name__} of {parameter.dtype}"
        return f"its weight is a {kind}, quantised or sharded: want a plain one, patched before sharding"
    return None


def sketchable(
    model: nn.Module, target_modules: str | Sequence[str], exclude_modules: str | Sequence[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose weight gradients `GradientSketch` looks at: a model's LoRA layers where it has any, else its
    linear layers, quantised ones too (only inputs and output gradients are needed)."""
    selection = Selection(model, target_modules, exclude_modules, caller="GradientSketch")
    lora = dict(lora_layers(model))
    read = {} if lora else read_by_parents(model)
    embeddings = []
    for name, module in lora.items() if lora else candidates(model, selection):
        base = getattr(module, "base_layer", module) if lora else module  # PEFT adapts embeddings and convolutions too
        if lora:
            chosen = (selection.all_linear or selection.names(name)) and not selection.excludes(name)
        else:
            unreachable = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or id(module) in read
            chosen = not unreachable and selection.why_not(name, module) is None
        if chosen and (isinstance(base, nn.Linear) or is_conv1d(base)):
            yield name, module
        elif chosen and isinstance(base, nn.Embedding) and not selection.all_linear:
            embeddings.append(name)
    if embeddings:
        warnings.warn(
            f"fastlora.GradientSketch: {', '.join(embeddings)}: only linear layers are sketched; LoRA on an embedding "
            "keeps its own start and rank, as in PEFT",
            UserWarning,
            stacklevel=4,
        )


def layer_sizes(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer of any kind, or of an embedding."""
    if is_conv1d(layer) or isinstance(layer, nn.Embedding):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D, a linear layer whose weight is (in, out)."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and type(module) is pytorch_utils.Conv1D


def why_not_patchable(module: nn.Module) -> str | None:
    """None where `patch` can swap this module, else why not."""
    if isinstance(module, OwnLayer):
        return None
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        if type(module) is not nn.Embedding and not _only_scales(module):
            return f"{kind} is a subclass of nn.Embedding with behaviour of its own"
        if module.max_norm is not None:
            return f"{kind} has max_norm, which rewrites rows of its weight at every call"
    elif type(module) is not nn.Linear and not is_conv1d(module):
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads this layer's weight itself and never calls its forward"
        if type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear):
            return f"{kind} is quantised: put PEFT's LoRA on it (peft.get_peft_model), and patch that model"
        if isinstance(module, nn.Linear):
            return f"{kind} is a subclass of nn.Linear with behaviour of its own (quantised, parametrised or custom)"
        return f"{kind} is not a linear layer"
    if not has_own_forward(module):
        if hasattr(module, "_hf_hook"):
            return (
                "accelerate's hook offloads its weight or replaces its forward: patch before that, or take hooks off "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )
        return "its forward was replaced on the instance, so a swapped layer would not run"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight_norm, pruning), not a plain parameter"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain tensor: patch before sharding or quantising"
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"its weight has dtype {weight.dtype}"
    if weight.numel() == 0:
        return "its weight is empty (partitioned by ZeRO-3?): patch before partitioning"
    return None


def _only_scales(module: nn.Embedding) -> bool:
    """Whether it is one of transformers' embeddings that multiply their rows by `embed_scale`."""
    kind = type(module)
    named = re.fullmatch(r"\w*ScaledWordEmbedding", kind.__name__) is not None
    return named and kind.__module__.startswith("transformers.") and getattr(module, "embed_scale", None) is not None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every `FusedLoraLinear` and every PEFT LoRA layer, once each, as `named_modules` orders them."""
    peft_layer = sys.modules.get("peft.tuners.lora.layer")
    kinds = (OwnLayer,) if peft_layer is None else (OwnLayer, peft_layer.LoraLayer)
    return iter(modules_of(model, kinds))


def check_holder(model: nn.Module, caller: str) -> None:
    """Raises ValueError where a model holds adapters of PEFT's that fastlora does not run, or PEFT's and fastlora's
    both: whose they are decides, not which wrapper is outermost."""
    peft, tuners = sys.modules.get("peft"), sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or tuners is None:
        return
    kinds = (peft.PeftModel, peft.PeftMixedModel, tuners.BaseTuner, tuners.BaseTunerLayer)
    parts = [module for module in model.modules() if isinstance(module, kinds)]
    layers = [layer for _, layer in lora_layers(model)] if parts else []
    own = [layer for layer in layers if isinstance(layer, OwnLayer)]
    if not parts or (layers and not own):
        return
    configs = [config for part in parts for config in getattr(part, "peft_config", {}).values()]
    found = ", ".join(dict.fromkeys(str(getattr(c.peft_type, "value", c.peft_type)) for c in configs))
    found = found or type(parts[0]).__name__
    if own:
        raise ValueError(
            f"{caller}: model: got PEFT's adapters ({found}) around fastlora's own, which no file holds together, and "
            "which PEFT may have frozen; want one kind: fastlora's in model.unload(), which takes PEFT's out "
            "(model.get_base_model() where PEFT's are prompts), or call fastlora.unpatch(model) before get_peft_model "
            "(no peft_config for a patched model in TRL) and fastlora.patch(model) after it"
        )
    raise ValueError(
        f"{caller}: model: got PEFT's adapters ({found}) and no LoRA layers of PEFT's; new ones would freeze those; "
        "want a plain model (model.unload() or model.merge_and_unload() takes PEFT's out, model.get_base_model() where "
        "they are prompts), or one with LoRA layers of PEFT's, which are accelerated"
    )


def modules_of(model: nn.Module, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    """(name, module) of these kinds, all of which have children, once each, named and ordered as by `named_modules`.

    Of what has no children, and within our own layers, nothing is asked: a twentieth of `named_modules`' time on a
    patched Llama, which switching adapters waits for.
    """
    found: list[tuple[str, Any]] = []
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        seen.add(id(module))
        if isinstance(module, kinds):
            found.append((module.called(name) if isinstance(module, OwnLayer) else name, module))
        if isinstance(module, OwnLayer):
            return
        for child_name, child in module._modules.items():
            if child is None or not child._modules:
                continue
            child = unwrapped(child)
            if child._modules and id(child) not in seen:
                walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", unwrapped(model))
    return found


def called(name: str, layer: Any) -> str:
    """A LoRA layer's name, or, of PEFT's wrapper of a parameter, that parameter's in the plain model."""
    key = getattr(layer, "parameter_name", None)
    return name if key is None else f"{name.replace('.base_layer', '')}.{key}"


def peft_lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every PEFT LoRA layer."""
    for name, layer in lora_layers(model):
        if not isinstance(layer, OwnLayer):
            yield name, layer
