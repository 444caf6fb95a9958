"""fastlora: LoRA fine-tuning that costs little more than the frozen model.

`fastlora.patch(model)` swaps the fused layers in; `fastlora.unpatch(model)` takes them out again. Importing does nothing else.
"""

from . import functional

__version__ = "0.1.0"
__all__ = ["functional"]
