"""Where a start goes in a patched layer or expert, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layers import starts
from ..layers.experts import ExpertWeight, by_expert
from ..layers.state import AdapterState


class PlainStart:
    """One adapter of a patched layer, as `init_lora_ga` sees it."""

    def __init__(self, name: str, layer: AdapterState, adapter_name: str) -> None:
        if adapter_name not in layer.lora_A:
            raise ValueError(f"init_lora_ga: adapter_name: got {adapter_name!r}, but {name!r} has {list(layer.lora_A)}")
        self.name, self.layer, self.adapter_name = name, layer, adapter_name
        self.r = layer.r[adapter_name]
        self.scaling = layer.scaling[adapter_name]
        self.out_features = layer.out_features
        self.device = layer.weight.device

    @property
    def base_parameter(self) -> Tensor:
        """The parameter that base="offset" writes to."""
        return self.layer.weight

    def weight(self) -> Tensor:
        """W0 as it is without this adapter's shift, in either layout."""
        shift = self.layer._weight_before_shift
        if shift is not None and shift[0] == self.adapter_name:
            return shift[1].to(self.layer.weight)
        return self.layer.weight.detach()

    def check(self, exact: bool) -> None:
        """Raises ValueError where `set` cannot work in the layer's present state."""
        self.layer.check_initial_factors(self.adapter_name, exact)

    def set(self, a: Tensor, b: Tensor, exact: bool) -> None:
        """Starts the adapter at A₀ = a (r, in), B₀ = b (out, r)."""
        self.layer.set_initial_factors(self.adapter_name, a, b, exact)

    def reset(self) -> None:
        """LoRA's ordinary start."""
        self.layer.reset_adapter(self.adapter_name)

    def remember(self) -> Callable[[], None]:
        """What puts the layer back as it is now, to the bit; it holds copies of A and B on the host."""
        layer, name = self.layer, self.adapter_name
        copies = [(part[name], part[name].detach().to("cpu", copy=True)) for part in (layer.lora_A, layer.lora_B)]
        starts = [(part, part[name]) for part in (layer.lora_A0, layer.lora_B0, layer.lora_shift) if name in part]
        shift = layer._weight_before_shift
        shifted_here = shift is not None and shift[0] == name
        shifted = layer.weight.detach().to("cpu", copy=True) if shifted_here else None

        def restore() -> None:
            layer.forget_initial_factors(name)
            with torch.no_grad():
                for parameter, copy in copies:
                    parameter.copy_(copy)
                if shifted is not None:
                    layer.weight.copy_(shifted)
            for part, start in starts:
                part[name] = start
            layer._weight_before_shift = shift

        return restore


class ExpertStart(PlainStart):
    """One expert's part of a weight's adapter. The frozen half is there for all experts as soon as for one; those that
    have no start of their own have zeros in it."""

    layer: ExpertWeight

    def __init__(self, name: str, layer: ExpertWeight, adapter_name: str) -> None:
        super().__init__(name, layer, adapter_name)
        self.expert = int(name.rpartition("[")[2].removesuffix("]"))

    def weight(self) -> Tensor:
        return self.layer.weight[self.expert].detach()

    def check(self, exact: bool) -> None:
        if not exact:
            raise ValueError(f'init_lora_ga: base: got "offset", and {self.name!r} is an expert; want "exact"')
        super().check(exact)

    def _parts(self, *factors: str) -> list[Tensor]:
        """The expert's views of an adapter's factors."""
        a, b = (getattr(self.layer, factor)[self.adapter_name].detach() for factor in factors)
        return [part[self.expert] for part in by_expert(a, b, self.layer.num_experts)]

    def set(self, a: Tensor, b: Tensor, exact: bool) -> None:
        layer, name = self.layer, self.adapter_name
        if name not in layer.lora_A0:
            zeros = (torch.zeros_like(factors[name].detach()) for factors in (layer.lora_A, layer.lora_B))
            layer.set_frozen_factors(name, *zeros)
        for part, value in zip(self._parts("lora_A", "lora_B"), (a, b), strict=True):
            part.copy_(value)
        (own_a, own_b), (a0, b0) = self._parts("lora_A", "lora_B"), self._parts("lora_A0", "lora_B0")
        a0.copy_(own_a)
        b0.copy_(own_b).neg_()

    def reset(self) -> None:
        a, b = self._parts("lora_A", "lora_B")
        starts.draw(a, b, True)
        if self.adapter_name in self.layer.lora_A0:
            for part in self._parts("lora_A0", "lora_B0"):
                part.zero_()

    def remember(self) -> Callable[[], None]:
        started = self.adapter_name in self.layer.lora_A0
        factors = [("lora_A", "lora_B"), *([("lora_A0", "lora_B0")] if started else [])]
        copies = [part.to("cpu", copy=True) for pair in factors for part in self._parts(*pair)]

        def restore() -> None:
            if not started:
                self.layer.forget_initial_factors(self.adapter_name)
            for part, copy in zip((part for pair in factors for part in self._parts(*pair)), copies, strict=True):
                part.copy_(copy)

        return restore
