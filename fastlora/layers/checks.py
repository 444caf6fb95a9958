"""What a layer's arguments must be, and which tensors and modules keep off the fast path."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..introspect.fused import has_own_forward
from ..ops.lora import choice
from ..runtime.checks import check, check_choice, check_integer, is_number


def tensors_of(adapters: Any) -> Any:
    """An `nn.ParameterDict`'s own dict (4 µs a call cheaper), or itself in a DataParallel replica, which has no
    parameters."""
    return adapters._parameters or adapters


def keep_off_the_fast_path(*_: Any) -> None:
    """A hook that never runs."""


def is_overridden(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: the fused path would leave that out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and not has_own_forward(module))
    )


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """alpha/r, or alpha/√r with rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_adapter_arguments(
    name: str, r: int, lora_alpha: float, lora_dropout: float, caller: str = "FusedLoraLinear"
) -> None:
    """Raises ValueError for an adapter that cannot be."""
    check_integer(caller, "r", r, also=" (the rank of the adapter)")
    check(is_number(lora_alpha) and math.isfinite(lora_alpha), caller, "lora_alpha", lora_alpha, "a finite number")
    part = isinstance(lora_dropout, (int, float)) and 0.0 <= lora_dropout < 1.0
    check(part, caller, "lora_dropout", lora_dropout, "a probability in [0, 1)")
    if not isinstance(name, str) or not name or set(name) & set("./\\") or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"{caller}: adapter_name: got {name!r}, want a non-empty string without dots and "
            "slashes that is no attribute of nn.ParameterDict"
        )


def check_backend(backend: str, caller: str) -> None:
    """Raises ValueError for a backend name that does not exist."""
    check_choice(caller, "backend", backend, choice.BACKENDS)
