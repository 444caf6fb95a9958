"""The experts of a mixture with adapters: transformers' experts modules, whose weights are 3-D parameters, on
`ops/experts/`.

A module of experts keeps its weights, and its class gets `FusedExperts` in front; each weight that is adapted gets a
layer next to it, an `ExpertWeight`, with the adapters and all that a linear layer's have. The layout is PEFT's, that of
the files: lora_A (E·r, K) has the expert slowest, lora_B (N, r·E) fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect.fused import rebind_forward
from ..ops import call
from ..ops.experts.aten import combined
from ..ops.experts.experts import lora_grouped_linear
from ..ops.experts.routing import Routing
from . import starts
from .checks import tensors_of
from .state import AdapterState

LORA = "lora_"  # and the weight's name: the layer's, in its module
TAP = "_fastlora_taps"  # on a module that sketches and monitors look at


class ExpertWeight(AdapterState):
    """The adapters of one weight of a module of experts: (E, N, K), or (E, K, N) where the module is transposed.

    `lora_A[name]` is (E·r, K), `lora_B[name]` (N, r·E), r the rank of each expert. It is never called: the module is.
    """

    shares_input = False
    experts: Any  # the module

    def __init__(self, experts: Any, key: str, backend: str = "auto") -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # not as a child: the module holds this layer
        self.key = key
        self.num_experts, *sides = experts._parameters[key].shape
        self.out_features, self.in_features = reversed(sides) if experts.is_transposed else sides
        self._init_adapter_state(fan_in_fan_out=experts.is_transposed, backend=backend)

    def called(self, name: str) -> str:
        """What the layer of this name is called: the weight."""
        return name.removesuffix(f"{LORA}{self.key}") + self.key

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.experts._parameters[self.key]

    def _set_weight(self, weight: nn.Parameter) -> None:
        self.experts._parameters[self.key] = weight

    def attach(self) -> None:
        """Puts the layer next to its weight, and the module on our ops."""
        experts = self.experts
        swap_class(experts)
        experts._modules[f"{LORA}{self.key}"] = self.train(experts.training)

    def detach(self) -> None:
        """Undoes `attach`."""
        experts = self.experts
        if experts._modules.pop(f"{LORA}{self.key}", None) is None:
            return
        put_class_back(experts)

    def factor_shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (self.num_experts * r, self.in_features), "lora_B": (self.out_features, r * self.num_experts)}

    def reset_adapter(self, name: str, init_lora_weights: bool | str = True) -> None:
        """Restarts every expert's adapter: see `FusedLoraLinear.reset_adapter`; no start that moves the weight."""
        self._check_names([name], "reset_adapter")
        r, lora_A, lora_B = self.r[name], self.lora_A[name], self.lora_B[name]
        starts.check_init(init_lora_weights, "ExpertWeight.reset_adapter", r)
        check_start(init_lora_weights, "ExpertWeight.reset_adapter")
        self.forget_initial_factors(name)
        if init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1.0 / r)
            nn.init.zeros_(lora_B)
        elif init_lora_weights == "orthogonal":
            with torch.no_grad():
                for a, b in zip(*by_expert(lora_A, lora_B, self.num_experts), strict=True):
                    starts.draw(a, b, init_lora_weights)
        else:
            starts.draw(lora_A, lora_B, init_lora_weights)

    def running_adapters(self) -> list[call.Adapter]:
        """The low-rank terms that the module adds now, lora_A (E, r, K) and lora_B (E, N, r): none while adapters are
        disabled or merged."""
        if self.disable_adapters or self.merged_adapters:
            return []
        return self._terms(self.active_adapters)

    def _terms(self, names: Iterable[str]) -> list[call.Adapter]:
        """An adapter that started away from zero has its start's factors behind its own: one dropout mask for both."""
        terms = []
        for name in names:
            dropout_p = self.lora_dropout[name] if self.training else 0.0
            a, b = (tensors_of(factors)[name] for factors in (self.lora_A, self.lora_B))
            a, b = by_expert(a, b, self.num_experts)
            if name in self.lora_A0:
                a0, b0 = by_expert(self.lora_A0[name], self.lora_B0[name], self.num_experts)
                a, b = torch.cat((a, a0), dim=1), torch.cat((b, b0), dim=2)
            terms.append(call.Adapter(a, b, self.scaling[name], dropout_p))
        return terms

    def as_plain_adapter(self, name: str) -> tuple[Tensor, Tensor, int, float]:
        """(A, B, r, alpha) of an ordinary adapter: the adapter's own, or [A; A₀] and [B, −B₀] of each expert."""
        self._check_names([name], "as_plain_adapter")
        if name not in self.lora_A0:
            return self.lora_A[name], self.lora_B[name], self.r[name], self.lora_alpha[name]
        (term,) = self._terms([name])
        r = term.lora_A.shape[1]
        return *as_stored(term.lora_A, term.lora_B), r, self.alpha_at(name, r)

    def merge(self, untie: bool = False) -> None:
        """Adds the active adapters to the weight, one expert at a time, in float32 and rounded once; `unmerge` restores
        its bits. Raises ValueError, with nothing changed, where the merged weight would not be finite, or adapters are
        merged already."""
        self._check_not_merged("merge")
        if not self.active_adapters:
            return
        weight = self.weight
        if untie:
            with torch.inference_mode(False):
                weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        bits = add_deltas(weight, self._terms(self.active_adapters), self.fan_in_fan_out, "ExpertWeight.merge")
        self._base_weight = (self.weight if untie else bits,)
        if untie:
            self._set_weight(weight)  # type: ignore[arg-type]
        self.merged_adapters = list(self.active_adapters)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={r}, scaling={self.scaling[name]:g}" for name, r in self.r.items())
        return f"{self.num_experts} experts, {self.in_features} -> {self.out_features}, {adapters}"


def check_start(init_lora_weights: bool | str, caller: str) -> None:
    """Raises ValueError for a start that experts do not have."""
    if starts.shifts_weight(init_lora_weights):
        raise ValueError(
            f"{caller}: init_lora_weights: got {init_lora_weights!r}, which moves a part of the weight into the "
            'adapter; experts want True, False, "gaussian" or "orthogonal"'
        )


def by_expert(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """lora_A (E, r, K) and lora_B (E, N, r): views of PEFT's (E·r, K) and (N, r·E)."""
    return (
        lora_A.view(num_experts, -1, lora_A.shape[1]),
        lora_B.view(len(lora_B), -1, num_experts).permute(2, 0, 1),
    )


def as_stored(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What `by_expert` undoes."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def delta_of(term: call.Adapter, expert: int, transposed: bool) -> Tensor:
    """What an adapter adds to one expert's weight, in float32 (float64 for float64 adapters)."""
    a, b = term.lora_A[expert].detach(), term.lora_B[expert].detach()
    wide = torch.promote_types(a.dtype, torch.float32)
    with call.without_autocast(a):
        delta = torch.mm(b.to(wide), a.to(wide)).mul_(term.scaling)
    return delta.t() if transposed else delta


@torch.no_grad()
def add_deltas(weight: Tensor, terms: Sequence[call.Adapter], transposed: bool, caller: str) -> Tensor:
    """Adds adapters to a weight (E, ., .) in place, expert by expert, and returns its former bits, on the host. Raises
    ValueError, with the bits back, where it would not be finite."""
    bits = weight.detach().to("cpu", copy=True)
    for expert in range(len(weight)):
        merged = weight[expert].to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for term in terms:
            merged += delta_of(term, expert, transposed)
        merged = merged.to(weight.dtype)
        if not torch.isfinite(merged).all():
            weight.copy_(bits)
            raise ValueError(
                f"{caller}: merging would make the {weight.dtype} weight of expert {expert} infinite or NaN; nothing "
                "was changed. Check the adapter for NaN, or merge in a wider dtype (model.float())"
            )
        weight[expert].copy_(merged)
    return bits


class FusedExperts(nn.Module):
    """Before a class of transformers' experts: its forward runs the adapters of its `ExpertWeight`s too."""

    ORIGINAL: type[nn.Module]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, k) of experts, top_k_weights (T, k) -> (T, H)"""
        terms = {}
        for layer in layers_of(self):
            if layer.disable_adapters and layer.merged_adapters:
                layer.unmerge()
            terms[layer.key] = layer.running_adapters()
        fused = any(terms.values())
        if not torch.compiler.is_compiling():
            for layer in layers_of(self):
                if fused:
                    layer.calls.fused += 1
                else:
                    layer.calls.base += 1
        if not fused and TAP not in self.__dict__:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
        backend = next((layer.backend for layer in layers_of(self)), "auto")
        return run(self, hidden_states, top_k_index, top_k_weights, terms, backend)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for layer in layers_of(self):
            starts.check_weight_to_load(layer, state_dict.get(prefix + layer.key), prefix + layer.key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time: a pickle names the one that it was made from."""
        return _new, (self.ORIGINAL,), self.__dict__


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class under its own name, with `FusedExperts` in front."""
    attributes = {"ORIGINAL": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (FusedExperts, cls), attributes)


def swap_class(experts: nn.Module) -> None:
    if not isinstance(experts, FusedExperts):
        cls = fused_class(type(experts))
        rebind_forward(experts, cls)
        experts.__class__ = cls


def put_class_back(experts: Any) -> None:
    """Unless something next to the module's weights still needs ours."""
    if isinstance(experts, FusedExperts) and not any(True for _ in layers_of(experts)):
        original: Any = experts.ORIGINAL
        rebind_forward(experts, original)
        experts.__class__ = original


def _new(cls: type[nn.Module]) -> nn.Module:
    fused = fused_class(cls)
    return fused.__new__(fused)


def layers_of(experts: Any) -> Iterable[ExpertWeight]:
    """The layers next to the weights of a module of experts."""
    return (child for child in experts._modules.values() if isinstance(child, ExpertWeight))


def run(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    terms: Mapping[str, Sequence[call.Adapter]],
    backend: str = "auto",
) -> Tensor:
    """What transformers' `grouped_mm_experts_forward` computes, with adapters by the weights' names: tokens are sorted
    by expert once, and nothing of a weight's size is made."""
    routing = Routing(top_k_index, experts.num_experts)
    arguments = hidden_states, routing, terms, backend
    if experts.has_gate:
        hidden = experts._apply_gate(_linear(experts, "gate_up_proj", *arguments, gathered=True))
    else:
        hidden = experts.act_fn(_linear(experts, "up_proj", *arguments, gathered=True))
    normed = getattr(experts, "has_post_expert_norm", False)
    if normed or TAP in experts.__dict__:  # they want every routed token's row
        out = _linear(experts, "down_proj", hidden, *arguments[1:])
        out = combined(experts.post_expert_norm(out) if normed else out, top_k_weights, routing.order)
    else:
        out = _linear(experts, "down_proj", hidden, *arguments[1:], combine=top_k_weights)
    return out.to(hidden_states.dtype)


def _linear(
    experts: Any,
    key: str,
    x: Tensor,
    routing: Routing,
    terms: Mapping[str, Sequence[call.Adapter]],
    backend: str,
    gathered: bool = False,
    combine: Tensor | None = None,
) -> Tensor:
    adapters, weight = terms.get(key, ()), getattr(experts, key)
    y = lora_grouped_linear(
        x if call.autocast_enabled(x) else x.to(weight.dtype),
        weight,
        routing,
        [adapter.lora_A for adapter in adapters],
        [adapter.lora_B for adapter in adapters],
        [adapter.scaling for adapter in adapters],
        bias=getattr(experts, f"{key}_bias") if experts.has_bias else None,
        is_transposed=experts.is_transposed,
        gathered=gathered,
        dropout_p=[adapter.dropout_p for adapter in adapters],
        combine=combine,
        backend=backend,
    )
    for tap in experts.__dict__.get(TAP, ()):
        y = tap(key, y, x, routing, gathered)
    return y


def sizes_of(weights: Mapping[str, tuple[Any, str]]) -> dict[str, tuple[int, int]]:
    """(n, m) of every expert, "<weight>[<expert>]", of weights that are (module, key) by name."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, (module, key) in weights.items():
        count, n, m = module._parameters[key].shape
        sizes |= {f"{name}[{expert}]": (m, n) if module.is_transposed else (n, m) for expert in range(count)}
    return sizes


def tap(
    weights: Mapping[str, tuple[Any, str]],
    shown: Callable[[Tensor, Tensor, Callable[..., None]], Tensor],
    observe: Callable[..., None],
) -> Callable[[], None]:
    """Calls `observe(f"{name}[{e}]", X, dY, pass)` for each expert that has tokens, in the backward passes that `shown`
    is made for (`introspect.taps`). `weights`: (module, key) by name. Returns what undoes it."""
    experts: dict[nn.Module, dict[str, str]] = {}
    for name, (module, key) in weights.items():
        experts.setdefault(module, {})[key] = name

    def tapped(names: Mapping[str, str], key: str, y: Tensor, x: Tensor, routing: Routing, gathered: bool) -> Tensor:
        def deliver(x: Tensor, dy: Tensor, now: Any) -> None:
            start = 0
            for expert, end in enumerate(routing.ends):
                if end > start:
                    rows = x[routing.rows[start:end]] if gathered else x[start:end]
                    observe(f"{names[key]}[{expert}]", rows, dy[start:end], now)
                start = end

        return shown(y, x, deliver) if key in names else y

    own: dict[Any, Callable[..., Tensor]] = {}
    for module, names in experts.items():
        swap_class(module)
        own[module] = functools.partial(tapped, names)
        module.__dict__.setdefault(TAP, []).append(own[module])

    def restore() -> None:
        for module, one in own.items():
            module.__dict__[TAP].remove(one)
            if not module.__dict__[TAP]:
                del module.__dict__[TAP]
                put_class_back(module)

    return restore
