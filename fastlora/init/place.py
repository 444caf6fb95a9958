"""Where a start goes in a patched layer, and how the layer is put back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layers.linear import FusedLoraLinear


class PlainStart:
    """One adapter of a `FusedLoraLinear`, as `init_lora_ga` sees it."""

    def __init__(self, name: str, layer: FusedLoraLinear, adapter_name: str) -> None:
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
