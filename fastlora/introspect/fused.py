"""The marks of what fastlora has put into a model, by which the lower floors know it without importing it."""

from __future__ import annotations


class OwnLayer:
    """The mark of `FusedLoraLinear`: a plain layer that holds its adapters itself."""


class FusedPeftLayer:
    """The mark of a PEFT layer whose forward runs fastlora's ops."""


class FusedPeftTuner:
    """The mark of a PEFT tuner that fuses the adapters it adds later."""
