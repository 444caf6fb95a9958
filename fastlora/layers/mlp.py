"""MLPs in a patched model: modules whose forward is down(act(gate(x)) * up(x)), or down(act(up(x))), run so that
neither h nor act(gate) is kept (ops/mlp).

Which modules those are is not read from names, and not assumed. `recognise` lets a module's own forward run with its
projections replaced by stand-ins that return known fp64 numbers and note what they are given; only where everything,
in training and in evaluation, is what one of the activations gives is the module's class swapped for a subclass
(`FusedMlp`), which `release` takes back; and then it is run on a small input both ways and compared.

The gate and up projections are still called as the modules they are, so their hooks, groups, adapters and quantised
weights work as they do; only the activation and the down projection run as one. Whenever something is not as it was
checked, in training state, hooks, children, settings or the class's forward, the module's own forward runs.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..introspect.names import named_modules
from ..ops import call
from ..ops.lora import choice as lora_choice
from ..ops.mlp import aten as mlp_aten
from ..ops.mlp import mlp as mlp_op
from ..runtime.trust import seeded
from . import batch, group
from .checks import is_overridden

MODES = ("auto", True, False, None)
_RECIPE = "_fastlora_mlp"
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_PLAIN_SETTINGS = (int, float, str, types.FunctionType, types.BuiltinFunctionType, type(None))


class Recipe(NamedTuple):
    """What was found out about a module, by its children's names."""

    calls: tuple[str, ...]  # gate and up, or the one of a plain MLP, in the order in which forward calls them
    gate: str
    up: str | None
    down: str
    activation: str
    always: bool  # also where a CPU is no faster so
    settings: tuple  # of the module and the children besides the projections

    def __str__(self) -> str:
        kind = "plain" if self.up is None else "gated"
        return f"{kind}, {self.activation}"


class FusedMlp(nn.Module):
    """What a recognised module's class is made of, besides its own (`_fused_class`)."""

    _fastlora_original: type[nn.Module]
    _fastlora_forward: Any  # the original class's, when it was checked

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        recipe: Recipe | None = self.__dict__.get(_RECIPE)
        if recipe is None or kwargs or len(args) != 1 or not _applies(self, recipe, args[0]):
            return super().forward(*args, **kwargs)
        (x,) = args
        found = {name: self._modules[name](x) for name in recipe.calls}  # type: ignore[misc]
        gate, up = found[recipe.gate], None if recipe.up is None else found[recipe.up]
        layer = _layer(self._modules[recipe.down], gate)
        if layer is None:
            h = mlp_aten.ACTIVATIONS[recipe.activation].value(gate)
            return self._modules[recipe.down](h if up is None else h * up)  # type: ignore[misc]
        return mlp_op.lora_activated_linear(gate, up, layer[0], recipe.activation, backend=layer[1])

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self._fastlora_original,), self.__dict__


def form(model: nn.Module, mode: str | bool | None) -> tuple[dict[str, str], dict[str, str]]:
    """Makes every recognised module a `FusedMlp`; ({name: what it is}, {name: why not} of those that look like one)."""
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    if not mode:
        return fused, left
    for name, module in list(named_modules(model)):
        if isinstance(module, FusedMlp):
            fused[name] = str(module.__dict__.get(_RECIPE))
        elif _looks_like_one(module):
            found = recognise(module, always=mode is True)
            if isinstance(found, Recipe):
                found = _swap(module, found)
            (fused if isinstance(found, Recipe) else left)[name] = str(found)
    return fused, left


def release(module: FusedMlp) -> None:
    """Gives a module its own class back."""
    module.__dict__.pop(_RECIPE, None)
    cast(nn.Module, module).__class__ = type(module)._fastlora_original


def check_mode(mode: Any, caller: str) -> None:
    """Raises ValueError for anything but "auto", True, False or None."""
    if not any(mode is one or (isinstance(mode, str) and mode == one) for one in MODES):
        raise ValueError(f'{caller}: mlp: got {mode!r}, want "auto", True or False')


# Running.
def _applies(module: nn.Module, recipe: Recipe, x: Any) -> bool:
    """Whether this call is one of those that were checked, as far as is known before gate and up have run."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN_TENSORS or x.dim() < 1:
        return False
    if x.device.type == "cpu" and (x.numel() < call.SMALL or not (recipe.always or _gains_on_cpu(recipe, x))):
        return False
    if call.autocast_enabled(x) or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    cls: Any = type(module)
    if nn_module._has_any_global_hook() or cls._fastlora_original.forward is not cls._fastlora_forward:
        return False
    down = module._modules.get(recipe.down)
    if down is None or not group.is_fused(down) or is_overridden(down) or down.__dict__.get("group") is not None:
        return False
    return batch.current(down) is None and _settings(module, (*recipe.calls, recipe.down)) == recipe.settings


def _gains_on_cpu(recipe: Recipe, x: Tensor) -> bool:
    """On a CPU making act(gate) again costs more than is saved, except in float32 with a gate (docs/kernels/mlp.md)."""
    return recipe.up is not None and x.dtype == torch.float32 and recipe.activation != "gelu_tanh"


def _layer(down: Any, gate: Tensor) -> tuple[call.GroupLayer, str] | None:
    """The down projection as it is now, and its backend; None where it is to be called as a module."""
    terms = down.terms(gate)
    if isinstance(terms, str) or terms.weight.dtype != gate.dtype or terms.weight.device != gate.device:
        return None
    if call.as_one_adapter(terms.adapters) is None:
        return None
    down.calls.fused += 1
    return call.GroupLayer(terms.weight, terms.adapters, terms.bias), down.backend


def _settings(module: nn.Module, projections: tuple[str, ...]) -> tuple | None:
    """What else forward may depend on: the children besides the projections, and plain attributes. None where it cannot
    be known, as with hooks; and while a dropout drops something."""
    found: list[Any] = [_plain_attributes(module), tuple(module._modules)]
    for name, child in module._modules.items():
        if name in projections or child is None:
            continue
        if isinstance(child, nn.Dropout):
            if child.training and child.p > 0.0:
                return None
            found.append((name, type(child)))
        else:
            found.append((name, type(child), _plain_attributes(child)))
        if is_overridden(child):
            return None
    return tuple(found)


def _plain_attributes(module: nn.Module) -> tuple:
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if isinstance(value, _PLAIN_SETTINGS) and name != "training"
    )


# Recognising.
def _looks_like_one(module: nn.Module) -> bool:
    projections = [module._modules[name] for name in _projections(module)]
    return (
        2 <= len(projections) <= 3
        and any(group.is_fused(child) for child in projections)
        and all(isinstance(child, nn.Linear) or group.is_fused(child) for child in projections)
    )


def _projections(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if next(child.parameters(), None) is not None]


def recognise(module: nn.Module, always: bool = False) -> Recipe | str:
    """What kind of MLP a module with two or three projections is, by what its forward does; else why it is left alone.

    Nothing of the module is changed when this returns.
    """
    names = _projections(module)
    if next(module.parameters(recurse=False), None) is not None or next(module.buffers(), None) is not None:
        return "it has parameters or buffers besides its projections"
    if "forward" in module.__dict__ or nn_module._has_any_global_hook():
        return "its forward was replaced on the instance, or there are hooks on every module"
    if any(is_overridden(child) for child in module.children()):
        return "hooks on a module in it, or a forward replaced on the instance"
    weight = next(module.parameters())
    if weight.is_meta:
        return "it is on the meta device"
    found = []
    for training in (False, True):
        try:
            seen = _Probe(module, names, weight).run(training)
        except Exception as error:
            return f"its forward does not run with stand-ins for its projections: {type(error).__name__}: {error}"
        if isinstance(seen, str):
            return seen + (" in training" if training and found else "")
        found.append(seen)
    if found[0] != found[1]:
        return "its forward does not compute the same in training"
    calls, gate, up, down, activation = found[0]
    if not group.is_fused(module._modules[down]):
        return f"its last projection, {down}, is not patched"
    with _in_evaluation(module):
        settings = _settings(module, (*calls, down))
    return Recipe(calls, gate, up, down, activation, always, settings or ())


class _Probe:
    """One pass of a module's own forward with stand-ins for its projections."""

    SHAPE = (2, 3, 16)

    def __init__(self, module: nn.Module, names: list[str], weight: Tensor) -> None:
        self.module, self.names, device = module, names, weight.device
        count = 2 * 3 * 16
        # Gates over the range where the activations differ; factors and results that cannot be mistaken for others.
        grid = torch.linspace(-5.0, 5.0, count, dtype=torch.float64, device=device)
        grids = (grid, grid.flip(0) * 0.9 + 0.05, grid.roll(31) * 0.8 - 0.03)
        self.outputs = {name: one.reshape(self.SHAPE) for name, one in zip(names, grids, strict=False)}
        self.x = torch.ones((2, 3, 4), dtype=weight.dtype, device=device)
        self.given: list[tuple[str, Any]] = []

    def run(self, training: bool) -> tuple | str:
        """(order of the calls, gate, up, down, activation), or why it is none of them."""
        module, device = self.module, self.x.device
        cuda = [device] if device.type == "cuda" else []
        with _in_evaluation(module), torch.random.fork_rng(devices=cuda), torch.no_grad():
            module.training = training
            children = [module._modules[name].__dict__ for name in self.names]  # type: ignore[union-attr]
            kept = [attributes.get("forward") for attributes in children]  # accelerate's
            for name in self.names:
                module._modules[name].__dict__["forward"] = functools.partial(self._stand_in, name)  # type: ignore[union-attr]
            try:
                with torch.autocast(device.type, enabled=False):
                    y = type(module).forward(module, self.x)
            finally:
                for attributes, forward in zip(children, kept, strict=True):
                    attributes.pop("forward")
                    if forward is not None:
                        attributes["forward"] = forward
        return self._read(y)

    def _stand_in(self, name: str, given: Any, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise TypeError(f"{name} is called with more than one argument")
        self.given.append((name, given))
        return self.outputs[name].clone()

    def _read(self, y: Any) -> tuple | str:
        calls = tuple(name for name, _ in self.given)
        if sorted(calls) != sorted(self.names):
            return f"its forward does not call each of its projections once: {', '.join(calls) or 'none'}"
        down, h = self.given[-1]
        if not (isinstance(y, Tensor) and y.dtype == torch.float64 and torch.equal(y, self.outputs[down])):
            return f"it does not return what its last projection, {down}, gives"
        if any(x is not self.x for _, x in self.given[:-1]):
            return "its first projections are not given its input as it is"
        if not isinstance(h, Tensor) or h.shape != torch.Size(self.SHAPE) or not h.is_floating_point():
            return f"what its last projection, {down}, is given is not made of the others elementwise"
        firsts = calls[:-1]
        for gate, up in [(firsts[0], None)] if len(firsts) == 1 else [firsts, firsts[::-1]]:
            for activation, (value, _) in mlp_aten.ACTIVATIONS.items():
                expected = value(self.outputs[gate])
                expected = (expected if up is None else expected * self.outputs[up]).to(h.dtype)
                # An activation is known by its negative side, where the two GELUs differ by a tenth at -3.
                rtol = max(1e-6, 2 * torch.finfo(h.dtype).eps)
                if torch.allclose(h, expected, rtol=rtol, atol=1e-9):
                    return firsts, gate, up, down, activation
        return f"what lies between its projections is none of {', '.join(mlp_op.ACTIVATIONS)}"


class _in_evaluation:
    """Within it a module and its children are in evaluation mode; afterwards each is as it was."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())

    def __enter__(self) -> None:
        self.flags = [module.training for module in self.modules]
        for module in self.modules:
            module.training = False

    def __exit__(self, *_: Any) -> None:
        for module, flag in zip(self.modules, self.flags, strict=True):
            module.training = flag


# The swap.
def _swap(module: nn.Module, recipe: Recipe) -> Recipe | str:
    original = type(module)
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        return "its class has a way of its own to be pickled"
    difference = _difference(module, recipe)
    if difference is not None:
        return difference
    try:
        module.__class__ = _fused_class(original, original.forward)
    except TypeError as error:
        return f"its class cannot be extended: {error}"
    module.__dict__[_RECIPE] = recipe
    return recipe


def _difference(module: nn.Module, recipe: Recipe) -> str | None:
    """Runs the module both ways on a small input: None where they agree."""
    weight = next(module.parameters())
    first = module._modules[recipe.gate]
    assert first is not None
    sizes = (getattr(first, "in_features", None), weight.dtype, weight.device)
    if not isinstance(sizes[0], int):
        return f"the size of {recipe.gate}'s input is not known"
    try:
        with _in_evaluation(module), seeded(weight.device), torch.no_grad(), lora_choice.measuring("off"):
            x = torch.randn(3, sizes[0], dtype=weight.dtype, device=weight.device)
            with torch.autocast(weight.device.type, enabled=False):
                want = module(x)
                got = _fused_on_anything(module, recipe, x)
    except Exception as error:
        return f"it does not run on a small input: {type(error).__name__}: {error}"
    if got is None:
        return None  # no adapter runs now; what the stand-ins have shown still holds
    allowed = 3e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()
    return None if error <= allowed else f"fused it differs by {error:.1e} on a small input"


def _fused_on_anything(module: nn.Module, recipe: Recipe, x: Tensor) -> Tensor | None:
    """The fused path, however small x is."""
    found = {name: module._modules[name](x) for name in recipe.calls}  # type: ignore[misc]
    gate, up = found[recipe.gate], None if recipe.up is None else found[recipe.up]
    layer = _layer(module._modules[recipe.down], gate)
    adapter = None if layer is None else call.as_one_adapter(layer[0].adapters)
    if layer is None or adapter is None:
        return None
    return mlp_op.fused(gate, up, layer[0].weight, layer[0].bias, adapter, recipe.activation, layer[1])


@functools.cache
def _fused_class(original: type[nn.Module], forward: Any) -> type:
    attributes = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_fastlora_original": original,
        "_fastlora_forward": forward,
    }
    return cast(Any, type(original))(f"Fused{original.__name__}", (FusedMlp, original), attributes)


def _rebuild(original: type[nn.Module]) -> Any:
    cls: Any = _fused_class(original, original.forward)
    return cls.__new__(cls)


def fused_mlps(model: nn.Module) -> list[FusedMlp]:
    """The model's modules that `form` has swapped. Raises ValueError where something else has changed the class of one
    since."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FusedMlp):
            if FusedMlp not in type(module).__bases__:
                raise ValueError(
                    f"unpatch: {name!r} has become a {type(module).__name__} since it was patched, want a fused MLP: "
                    "undo that first (sharding)"
                )
            found.append(module)
    return found
