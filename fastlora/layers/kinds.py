"""Adapters that are more than B A: DoRA's, which have a magnitude for every row, and AdaLoRA's, which have singular
values. `AdapterVariants` is the part of `FusedLoraLinear` that holds what is theirs.

    DoRA      W = m ∘ (W0 + s·B A) / ‖W0 + s·B A‖     m `lora_magnitude_vector[name]` (out,), norms by row
    AdaLoRA   W = W0 + s·P Λ Q                        P `lora_B[name]`, Λ `lora_E[name]` (r, 1), Q `lora_A[name]`
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect import sharding
from ..ops import call
from ..ops.dora import dora as dora_op
from ..ops.dora.norms import KeptNorms
from .schedule import Allocation
from .starts import AdapterStart

ADALORA_STD = 0.02  # of P and Q at the start, as in the paper's code
# Every `nn.ParameterDict` of a layer; each has entries by adapter, or none.
TRAINED = ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector")
FROZEN = ("lora_A0", "lora_B0", "lora_shift")


class Magnitudes(nn.ParameterDict):
    """DoRA's magnitudes by adapter. They stay in float32 at least, whatever the model is cast to: in half precision
    they would not be the norms that they are divided by."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == wide else tensor.to(moved.device, wide)

        return super()._apply(at_least_float32, recurse)


class AdapterVariants(AdapterStart):
    """The state of `FusedLoraLinear` that only some kinds of adapter have."""

    lora_E: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    backend: str
    allocation: dict[str, Allocation]
    _base_weight: tuple[Tensor] | None
    _adapters: Callable[[Sequence[str]], list[call.Adapter]]

    @property
    def use_dora(self) -> dict[str, bool]:
        """By adapter."""
        return {name: name in self.lora_magnitude_vector for name in self.r}

    @property
    def use_adalora(self) -> dict[str, bool]:
        """By adapter."""
        return {name: name in self.lora_E for name in self.r}

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        """What an adapter trains: A, B and, where it has them, its singular values or magnitudes."""
        return [factors[name] for key in TRAINED if name in (factors := self._modules[key])]  # type: ignore[index, operator]

    def reset_adapter(self, name: str, init_lora_weights: bool | str = True) -> None:
        """Starts an adapter anew, by PEFT's names (docs/initialisation.md).

        True, A ~ U(±1/√in) (Kaiming, a = √5) and B = 0; "gaussian", A ~ N(0, 1/r²) and B = 0 (the paper's);
        "orthogonal", both random with B A = 0, r even; False, B like A, so that the adapter changes the output at once
        (for tests and benchmarks). "pissa", `"pissa_niter_<iterations>"` and "olora" move a part of the weight into the
        adapter: its bits come back with `reset_adapter`, `delete_adapter` and `unpatch`.

        DoRA's magnitudes become the norms of the weight's rows. AdaLoRA's P and Q are drawn from N(0, 0.02²) and Λ is
        zero (drawn too with False).

        Raises ValueError, with nothing changed, for an unknown name, and as `from_weight` and `set_initial_factors` do.
        """
        self._check_names([name], "reset_adapter")
        if name in self.lora_E:
            check_adalora_init(init_lora_weights, "FusedLoraLinear.reset_adapter")
            nn.init.normal_(self.lora_A[name], std=ADALORA_STD)
            nn.init.normal_(self.lora_B[name], std=ADALORA_STD)
            if init_lora_weights is False:
                nn.init.normal_(self.lora_E[name])
            else:
                nn.init.zeros_(self.lora_E[name])
            return
        super().reset_adapter(name, init_lora_weights)
        if name in self.lora_magnitude_vector:
            with torch.no_grad():
                self.lora_magnitude_vector[name].copy_(self.weight_norm(name))

    kept_norms: KeptNorms | None

    def weight_norm(self, name: str) -> Tensor:
        """‖W0 + s·B A‖ of every row (out,), which DoRA divides by; in float32, or float64 for a float64 weight."""
        self._check_names([name], "weight_norm")
        return self._norm(self._adapters([name])[0])

    def _norm(self, adapter: call.Adapter) -> Tensor:
        if adapter.norm is not None:
            return adapter.norm
        return dora_op.weight_norm(self._rows(), adapter.lora_A, adapter.lora_B, adapter.scaling, self.backend)

    def get_delta_weight(self, name: str) -> Tensor:
        """What the adapter adds to the weight, in float32 (float64 for float64 adapters) and in the weight's layout:
        (out, in), or (in, out) with `fan_in_fan_out`.

        s·B A, or s·(B A − B₀A₀) after a start away from zero; s·P Λ Q; DoRA's m ∘ (W0 + s·B A)/‖W0 + s·B A‖ − W0.
        """
        self._check_names([name], "get_delta_weight")
        delta = self._product(name, self.lora_A[name], self.lora_B[name])
        if self._runs_beside(name):
            delta = delta + self._product(name, self.lora_A0[name], self.lora_B0[name])
        if name in self.lora_magnitude_vector:
            with torch.no_grad():
                weight = self._unmerged_weight().detach().to(delta.dtype)
                factor = self.lora_magnitude_vector[name].to(delta.dtype) / self.weight_norm(name).to(delta.dtype)
                factor = factor if self.fan_in_fan_out else factor.unsqueeze(1)
                delta = factor * (weight + delta) - weight
        return delta

    def _product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """s·B A in the weight's layout; of AdaLoRA's own factors s·P Λ Q."""
        values = self.lora_E[name] if name in self.lora_E and a is self.lora_A[name] else None
        return super()._product(name, a if values is None else (a * values).detach(), b)

    def as_plain_adapter(self, name: str) -> tuple[Tensor, Tensor, int, float]:
        """As an ordinary adapter (see `AdapterStart`). AdaLoRA's singular values go into A, and the ranks whose value
        is zero are left out, but for one where all are."""
        a, b, r, alpha = super().as_plain_adapter(name)
        if name not in self.lora_E:
            return a, b, r, alpha
        a, b, values = (sharding.whole(tensor.detach()) for tensor in (a, b, self.lora_E[name]))
        kept = values.flatten().nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)
        return (a * values)[kept], b[:, kept], len(kept), self.alpha_at(name, len(kept))

    def check_initial_factors(self, name: str, exact: bool) -> None:
        """Raises ValueError where `set_initial_factors` cannot work: with AdaLoRA's adapters too."""
        if name in self.lora_E:
            raise ValueError(
                f"FusedLoraLinear.set_initial_factors: name: {name!r} is an AdaLoRA adapter, P Λ Q, whose own start is "
                "Λ = 0; want one without use_adalora (LoRA-GA sets factors of B A)"
            )
        super().check_initial_factors(name, exact)

    def _rows(self) -> Tensor:
        """The weight without what is merged into it, as (out, in)."""
        weight = self._unmerged_weight()
        return weight.t() if self.fan_in_fan_out else weight

    def _unmerged_weight(self) -> Tensor:
        if not self.merged_adapters:
            return self.weight
        assert self._base_weight is not None
        return self._base_weight[0].detach().to(self.weight)

    def _as_variants(self, names: Sequence[str], adapters: list[call.Adapter]) -> list[call.Adapter]:
        """These adapters with their singular values (in A) and magnitudes."""
        values: Any = self._modules["lora_E"]
        magnitudes: Any = self._modules["lora_magnitude_vector"]
        found = []
        for name, adapter in zip(names, adapters, strict=True):
            if name in values:
                adapter = adapter._replace(lora_A=adapter.lora_A * values[name])
            if name in magnitudes:
                norm = None
                if self.kept_norms is not None:
                    sources = [self.weight, *(factors[name] for factors in self._factors() if name in factors)]
                    norm = self.kept_norms.of(name, sources, adapter.scaling, functools.partial(self._norm, adapter))
                adapter = adapter._replace(magnitude=magnitudes[name], norm=norm)
            found.append(adapter)
        return found

    def _factors(self) -> list[nn.ParameterDict]:
        return [self.lora_A, self.lora_B, self.lora_A0, self.lora_B0]


def check_kinds(use_dora: Any, use_adalora: Any, init: bool | str, caller: str) -> None:
    """Raises ValueError for kinds of adapter that do not go together."""
    for argument, value in (("use_dora", use_dora), ("use_adalora", use_adalora)):
        if not isinstance(value, bool):
            raise ValueError(f"{caller}: {argument}: got {value!r}, want True or False")
    if use_dora and use_adalora:
        raise ValueError(f"{caller}: use_dora, use_adalora: got True for both, want one of them at most")
    if use_adalora:
        check_adalora_init(init, caller)


def check_adalora_init(init: bool | str, caller: str) -> None:
    """Raises ValueError for a start that AdaLoRA's P Λ Q does not have."""
    if not isinstance(init, bool):
        raise ValueError(
            f"{caller}: init_lora_weights: got {init!r} with use_adalora, want True (P and Q drawn, Λ zero) or False"
        )
