"""Where a start goes in a patched layer or expert, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..integrations.peft.starts import PeftStart
from ..layers import starts
from ..layers.experts import by_expert
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

    @property
    def num_experts(self) -> int:
        return getattr(self.layer, "num_experts", 1)

    def trained(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]

    def frozen(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and −B₀, where there are some."""
        started, name = self.adapter_name in self.layer.lora_A0, self.adapter_name
        return (self.layer.lora_A0[name], self.layer.lora_B0[name]) if started else None

    def begin_with_zeros(self) -> None:
        """Frozen halves that take nothing away yet."""
        zeros = (torch.zeros_like(part.detach()) for part in self.trained())
        self.layer.set_frozen_factors(self.adapter_name, *zeros)

    def forget(self) -> None:
        """Takes a start back, but for the values of A and B."""
        self.layer.forget_initial_factors(self.adapter_name)

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


class ExpertStart:
    """One expert's part of an adapter, plain or PEFT's (`whole`). The frozen half is there for all experts as soon as
    for one; those that have no start of their own have zeros in it, and so has an expert of a rank below the weight's.
    """

    def __init__(self, name: str, whole: PlainStart | PeftStart, r: int) -> None:
        self.name, self.whole, self.r = name, whole, r
        self.scaling, self.out_features, self.device = whole.scaling, whole.out_features, whole.device
        self.expert = int(name.rpartition("[")[2].removesuffix("]"))

    @property
    def base_parameter(self) -> Tensor:
        return self.whole.base_parameter

    def weight(self) -> Tensor:
        """The expert's W0."""
        return self.base_parameter[self.expert].detach()

    def check(self, exact: bool) -> None:
        """Raises ValueError where `set` cannot work in the layer's present state."""
        if not exact:
            raise ValueError(f'init_lora_ga: base: got "offset", and {self.name!r} is an expert; want "exact"')
        self.whole.check(exact)

    def _parts(self, factors: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """The expert's views of an adapter's factors."""
        if factors is None:
            return []
        a, b = (part.detach() for part in factors)
        return [part[self.expert] for part in by_expert(a, b, self.whole.num_experts)]

    def set(self, a: Tensor, b: Tensor, exact: bool) -> None:
        """Starts the expert at A₀ = a (r, in), B₀ = b (out, r)."""
        if self.whole.frozen() is None:
            self.whole.begin_with_zeros()
        own_a, own_b = self._parts(self.whole.trained())
        for part, value in ((own_a, a), (own_b.t(), b.t())):
            part[: self.r].copy_(value)
            part[self.r :].zero_()
        a0, b0 = self._parts(self.whole.frozen())
        a0.copy_(own_a)
        b0.copy_(own_b).neg_()

    def reset(self) -> None:
        """LoRA's ordinary start, at the expert's rank."""
        a, b = self._parts(self.whole.trained())
        starts.draw(a, b, True)
        for part in (a[self.r :], *self._parts(self.whole.frozen())):
            part.zero_()

    def remember(self) -> Callable[[], None]:
        """What puts the expert back as it is now, to the bit; it holds copies on the host."""
        whole, started = self.whole, self.whole.frozen() is not None
        copies = [part.to("cpu", copy=True) for part in self._parts(whole.trained()) + self._parts(whole.frozen())]

        def restore() -> None:
            if not started:
                whole.forget()
            for part, copy in zip(self._parts(whole.trained()) + self._parts(whole.frozen()), copies, strict=True):
                part.copy_(copy)

        return restore


Place = PlainStart | PeftStart | ExpertStart
