"""DoRA on a whole model: its norms kept between calls, where someone asks for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..introspect.targets import lora_layers
from ..ops.dora.norms import KeptNorms
from ..runtime.checks import check_module


@contextmanager
def kept_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Within it DoRA's layers keep their norms ‖W0 + s·B A‖ between calls without gradients, as in generation.

    By default every call makes them again, in one pass over W0: a small part of a call with many tokens, but as long as
    the call itself where there are few. A norm that is kept is made again as soon as the weight, a factor or the scale
    is another one or was changed through PyTorch's operations (`copy_`, `add_`, an optimiser's step, a new `.data`).
    What writes past its version counters (`weight.data.mul_(2)`, a kernel of one's own) must stay outside: leave the
    block, write, and enter another. Calls with gradients keep nothing.

    Args:
        model: patched, with fastlora's own layers or PEFT's. One without DoRA is left as it is.

    Raises:
        ValueError: what is no module.

    Examples:
        >>> with fastlora.variants.kept_norms(model), torch.no_grad():
        ...     model.generate(**prompt)
    """
    check_module("kept_norms", model)
    layers: list[Any] = [layer for _, layer in lora_layers(model) if hasattr(layer, "kept_norms")]
    opened = [layer for layer in layers if layer.kept_norms is None]  # the outermost of nested blocks closes them
    for layer in opened:
        layer.kept_norms = KeptNorms()
    try:
        yield model
    finally:
        for layer in opened:
            layer.__dict__.pop("kept_norms", None)
