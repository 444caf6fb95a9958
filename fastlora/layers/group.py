"""Groups in a patched model: layers that may be fed the same tensor, and what makes them run as one where they are.

Nothing is computed for a layer that has not been called. The first member of a group that is called with an x opens a
`Round`: S = drop(x) Aᵀ of every member in one pass. Each member called with the same x then adds its own products, and
hands x on to the next (ops/group), so that dX is accumulated and dA made once. A member that is skipped, called
twice, or given another tensor has lost the few columns of S made for it, and nothing else: its call opens a round of
its own, or runs alone.

A round belongs to one thread, and holds for the same x only: the same object, not modified since (its version), under
the same grad mode, autocast and saved-tensor hooks (so never across the border of a checkpoint). It is over when every
member has been called, when another group is called, or when its backward pass is through; until then it keeps x, which
matters only where a member was skipped. Writes that torch's version counter does not see (`x.data`) it does not see
either, as autograd does not.

Which layers form a group is read from their names (`NAMES`), given, or watched (`watching`); it never changes by
itself, so that recomputing a checkpoint finds what the first pass found.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..introspect.names import named_modules
from ..ops import call
from ..ops.group import group as group_op
from .fused import FusedLayer, Terms

NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# In cross-attention the query comes from elsewhere: only the last two are fed the same tensor.
CROSS_ATTENTION = re.compile(r"cross|enc_?dec|encoder_attn|attn2|multihead_attn", re.IGNORECASE)

Layer = Any  # a FusedLayer, which is an nn.Module

_here = threading.local()  # .round: the one that is open in this thread


class LayerGroup:
    """Layers by name. They are known by weak references and make themselves known when they are copied or unpickled, so
    that a copied model's groups are made of its own layers, and a layer copied alone is alone."""

    def __init__(self) -> None:
        self.members: dict[str, weakref.ref[Layer]] = {}

    def add(self, name: str, layer: Layer) -> None:
        """Makes the layer a member, unless a living one has that name."""
        known = self.members.get(name)
        if known is None or known() is None:
            self.members[name] = weakref.ref(layer)

    def layers(self) -> list[Layer]:
        return [layer for reference in self.members.values() if (layer := reference()) is not None]

    def __deepcopy__(self, memo: dict) -> LayerGroup:
        memo[id(self)] = copy = LayerGroup()
        return copy

    def __reduce__(self) -> tuple:
        return LayerGroup, ()

    def run(self, layer: Layer, x: Tensor, terms: Terms) -> Tensor | None:
        """The layer's output as a member of its group, or None where it runs alone. `terms`: what this call runs."""
        if x.device.type == "cpu" and x.numel() < group_op.SMALL * call.SMALL:
            return None
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing() or x.is_inference():
            return None
        reading = _read(layer, terms)
        # A member that could not share (DoRA's) runs alone without ending the round of those around it.
        if reading is None or [adapter for adapter in reading.adapters if adapter.magnitude is not None]:
            return None
        open_round: Round | None = getattr(_here, "round", None)
        if open_round is None or not open_round.takes(self, layer, reading, x):
            _here.round = None  # lets go of the former one's tensors before there are new ones
            _here.round = open_round = Round.opened(self, layer, reading, x)
            if open_round is None:
                return None
        try:
            return open_round.call(layer, reading)
        except BaseException:
            _here.round = None
            raise
        finally:
            if not open_round.seats:
                _here.round = None


class Round:
    """One x on its way through the members of a group."""

    def __init__(self, group: LayerGroup, x: Tensor, shared: group_op.SharedInput) -> None:
        self.group = group
        self.x = weakref.ref(x)
        self.surroundings = _surroundings(x)
        self.pack_hook = _weak(_pack_hook())
        self.shared = shared
        self.seats: dict[int, tuple[int, _State]] = {}  # of members that are still to be called, by their id
        self.frame = 0  # of the function that calls the members, where dropout was drawn ahead

    @staticmethod
    def opened(group: LayerGroup, layer: Layer, reading: Reading, x: Tensor) -> Round | None:
        """A round that begins with this layer, or None where sharing is not possible or not worth it."""
        known = group.layers()
        if not [one for one in known if one is layer]:  # a replica that DataParallel made
            return None
        members, states = {}, {}
        for one in (layer, *(other for other in known if other is not layer and _may_be_foreseen(other, group))):
            found = reading if one is layer else _read(one, one.terms(x))
            member = None if found is None else _member(found, one.backend)
            # On a CPU a mask is drawn when its layer is called: the generator's numbers go where they always do.
            if found is not None and member is not None and not (member.dropout_p > 0.0 and x.device.type == "cpu"):
                members[one], states[one] = member, _State(one, found)
        if layer not in members:
            return None
        shared = group_op.open_group(x, list(members.values()), 1)
        if shared is None:
            return None
        opened = Round(group, x, shared)
        opened.seats = {id(one): (index, states[one]) for index, one in enumerate(members)}
        if [member for member in members.values() if member.dropout_p > 0.0]:
            opened.frame = _caller()
        return opened

    def takes(self, group: LayerGroup, layer: Layer, reading: Reading, x: Tensor) -> bool:
        """Whether this call is the round's: its S is there, and what it was made of is unchanged."""
        seat = self.seats.get(id(layer))
        return (
            self.group is group
            and seat is not None
            and self.x() is x
            and self.shared.x is not None
            and self.surroundings == _surroundings(x)
            and self.pack_hook() is _pack_hook()
            and seat[1].still_holds(layer, reading)
            and (not self.frame or self.frame == _caller())
        )

    def call(self, layer: Layer, reading: Reading) -> Tensor:
        index, _ = self.seats.pop(id(layer))
        if index == 0:  # the member that opened it
            return self.shared.ys[0]
        adapter = call.as_one_adapter(reading.adapters)
        assert adapter is not None, "its state was compared"
        return self.shared.call(index, reading.weight, reading.bias, adapter.lora_B, adapter.scaling)


class Reading(NamedTuple):
    """A layer as it is at one call: what it runs, and the tensors and settings that its S depends on besides x."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    adapters: Sequence[call.Adapter]
    sources: list[Tensor]
    settings: tuple


class _State:
    """What a layer's S was made of, besides x."""

    def __init__(self, layer: Layer, reading: Reading) -> None:
        self.layer = weakref.ref(layer)
        self.sources = reading.sources
        self.versions = _versions(self.sources)
        self.settings = reading.settings

    def still_holds(self, layer: Layer, reading: Reading) -> bool:
        return (
            self.layer() is layer
            and len(reading.sources) == len(self.sources)
            and [*map(id, reading.sources)] == [*map(id, self.sources)]
            and _versions(reading.sources) == self.versions
            and reading.settings == self.settings
        )


def _versions(sources: Sequence[Tensor]) -> list[tuple]:
    return [(source._version, source.data_ptr(), source.requires_grad) for source in sources]


def _read(layer: Layer, terms: Terms | str) -> Reading | None:
    """The layer as it is now; None where it adds no low-rank term, or its call is left to PEFT."""
    if isinstance(terms, str) or not terms.adapters:
        return None
    sources, settings = layer.group_sources()
    settings += tuple([adapter.dropout_p for adapter in terms.adapters])
    return Reading(terms.weight, terms.bias, terms.adapters, sources, settings)


def _member(reading: Reading, backend: str) -> group_op.Member | None:
    adapter = call.as_one_adapter(reading.adapters)
    if adapter is None or [source for source in reading.sources if source.is_inference()]:
        return None
    return group_op.Member(reading.weight, reading.bias, *adapter[:4], backend)


def _may_be_foreseen(layer: nn.Module, group: LayerGroup) -> bool:
    """Whether a layer's S may be made before it is called: not where a hook may change its input or its weights first
    (sharding, offloading), or a full backward hook wraps its input."""
    seat = layer.__dict__.get("group")
    return (
        is_fused(layer)
        and seat is not None
        and seat[0] is group
        and "forward" not in layer.__dict__
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
    )


def _surroundings(x: Tensor) -> tuple:
    """What must be the same at every call of a round, besides x itself."""
    autocast = torch.get_autocast_dtype(x.device.type) if call.autocast_enabled(x) else None
    return x._version, x.requires_grad, torch.is_grad_enabled(), autocast


def _pack_hook() -> Any:
    """The innermost saved-tensor hook: each checkpoint, and each recomputation of one, has its own."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
    return None if hooks is None else hooks[0]


def _weak(hook: Any) -> Any:
    """A hook without what it holds on to: called, it gives the hook back while it lives."""
    if hook is None:
        return lambda: None
    try:
        return weakref.ref(hook)
    except TypeError:  # a builtin, which holds on to nothing of the model's
        return lambda: hook


def _caller() -> int:
    """Which function call is calling the members: the nearest frame that is neither this project's nor `nn.Module`'s.

    Where dropout was drawn ahead, the members of a round must be called from one function: a checkpoint of its own
    around one of them would otherwise draw again what the first member has drawn for it.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("fastlora", nn_module.__name__)):
        frame = frame.f_back
    return id(frame)


# Forming groups.
def is_fused(module: Any) -> bool:
    """Whether it is a layer that can be in a group: ours, or PEFT's on our kernels."""
    return isinstance(module, FusedLayer) and module.shares_input


def form_groups(model: nn.Module, names: Sequence[Sequence[str]] = NAMES) -> list[tuple[str, ...]]:
    """Groups the model's patched layers that lie side by side under one of these sets of names, and says which."""
    formed = []
    for path, parent in named_modules(model):
        layers = {name: child for name, child in parent.named_children() if is_fused(child)}
        crossing = CROSS_ATTENTION.search(f"{path}.{type(parent).__name__}") is not None
        for wanted in names:
            wanted = wanted[1:] if crossing and len(wanted) == 3 else wanted
            found = {name: layers[name] for name in wanted if name in layers}
            prefix = f"{path}." if path else ""
            if len(found) > 1 and seat_together({prefix + name: layer for name, layer in found.items()}):
                formed.append(tuple(prefix + name for name in found))
    return formed


def check_names(group: Any, caller: str) -> Sequence[Sequence[str]]:
    """The sets of names that `group` stands for. Raises ValueError for anything but "auto", None, or such sets."""
    if group is None:
        return ()
    if isinstance(group, str):
        if group == "auto":
            return NAMES
    elif isinstance(group, Sequence) and all(
        isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
        for names in group
    ):
        return group
    raise ValueError(
        f'{caller}: group: got {group!r}, want "auto", None or sets of names such as [("q_proj", "k_proj")]'
    )


def seat_together(layers: dict[str, Layer]) -> bool:
    """Makes these layers, by name, a group; False where they have it already or read inputs of different sizes."""
    if len({layer.in_features for layer in layers.values()}) > 1:
        return False
    seats = [layer.group for layer in layers.values()]
    if seats[0] is not None and all(seat is not None and seat[0] is seats[0][0] for seat in seats):
        return False
    group = LayerGroup()
    for name, layer in layers.items():
        group.add(name, layer)
        layer.group = (group, name)
    return True


def dissolve_groups(model: nn.Module) -> None:
    """Every patched layer of the model runs alone again."""
    for module in model.modules():
        seat = module.__dict__.get("group")
        if isinstance(seat, tuple) and seat and isinstance(seat[0], LayerGroup):
            cast(Layer, module).group = None


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[list[tuple[str, ...]]]:
    """Within it the model's patched layers run alone and are watched; afterwards those that were fed the same tensor,
    one after another, are a group, and the list that it gives names them. Run one forward pass in it.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
        >>> _ = fastlora.patch(model, r=4)
        >>> with fastlora.watching(model) as groups, torch.no_grad():
        ...     _ = model(torch.randn(2, 16))
        >>> groups
        []
    """
    names: dict[Layer, str] = {module: name for name, module in named_modules(model) if is_fused(module)}
    fed: list[tuple[Any, int, dict[str, Layer]]] = []  # (x, its version, who was fed it), in order
    seen: set[nn.Module] = set()
    formed: list[tuple[str, ...]] = []

    def note(layer: Layer, args: tuple) -> None:
        if not args or not isinstance(args[0], Tensor) or layer in seen:
            return
        x = args[0]
        version = -1 if x.is_inference() else x._version
        seen.add(layer)
        if fed and fed[-1][0]() is x and fed[-1][1] == version:
            fed[-1][2][names[layer]] = layer
        else:
            fed.append((weakref.ref(x), version, {names[layer]: layer}))

    dissolve_groups(model)
    hooks = [layer.register_forward_pre_hook(note) for layer in names]  # type: ignore[arg-type]
    try:
        yield formed
    finally:
        for hook in hooks:
            hook.remove()
    for _, _, layers in fed:
        if len(layers) > 1 and seat_together(layers):
            formed.append(tuple(layers))
