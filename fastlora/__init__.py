"""fastlora: LoRA fine-tuning that costs little more than the frozen model.

`fastlora.patch(model)` swaps the fused layers in; `fastlora.unpatch(model)` takes them out again. Importing does
nothing else.
"""

import logging

from . import functional, linalg, optim, variants
from .adapters.combine import Combined, add_weighted_adapter
from .adapters.explain import Explanation, explain, fallbacks
from .adapters.load import load_adapter
from .adapters.parallel import parallel_plan
from .adapters.patch import is_patched, patch, unpatch
from .adapters.report import ModuleReport, PatchReport
from .adapters.save import save_adapter
from .adapters.switch import adapter_names, delete_adapter, disable_adapter, merge, set_adapter, unmerge
from .adapters.verify import AdapterCheck, verify_adapter
from .init import (
    AlignmentMonitor,
    GradientSketch,
    PeriodicReinit,
    allocate_ranks,
    init_lora_ga,
    reinit_lora_ga,
    sign_factors,
)
from .layers.group import dissolve_groups, watching
from .layers.linear import FusedLoraLinear
from .ops.lora.choice import measuring
from .ops.quant.weights import release_buffers

logging.getLogger(__name__).addHandler(logging.NullHandler())  # whether and where its messages show is the program's


__version__ = "0.1.0"

__all__ = [
    "AdapterCheck",
    "AlignmentMonitor",
    "Combined",
    "Explanation",
    "FusedLoraLinear",
    "GradientSketch",
    "ModuleReport",
    "PatchReport",
    "PeriodicReinit",
    "adapter_names",
    "add_weighted_adapter",
    "allocate_ranks",
    "delete_adapter",
    "disable_adapter",
    "dissolve_groups",
    "explain",
    "fallbacks",
    "functional",
    "init_lora_ga",
    "is_patched",
    "linalg",
    "load_adapter",
    "measuring",
    "merge",
    "optim",
    "parallel_plan",
    "patch",
    "reinit_lora_ga",
    "release_buffers",
    "save_adapter",
    "set_adapter",
    "sign_factors",
    "unmerge",
    "unpatch",
    "variants",
    "verify_adapter",
    "watching",
]
