"""PEFT's LoRA layers on bitsandbytes' 4-bit and 8-bit layers, fused. Imported only where a model has them, and so has
imported bitsandbytes; at the top of a module, so that swapped layers can be pickled."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from .quantised import FusedQuantisedLayer


class FusedLinear4bit(FusedQuantisedLayer, Linear4bit):  # type: ignore[misc]
    """PEFT's layer on a bitsandbytes Linear4bit: NF4 or FP4."""

    PLAIN = Linear4bit


class FusedLinear8bitLt(FusedQuantisedLayer, Linear8bitLt):  # type: ignore[misc]
    """PEFT's layer on a bitsandbytes Linear8bitLt. Inputs are not quantised here, as they are in bitsandbytes' int8
    product on a GPU: nearer to the exact result, by products in 16 bits."""

    PLAIN = Linear8bitLt
