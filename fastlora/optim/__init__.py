"""Optimisers, and parameter groups for them. Importing it does nothing."""

from .galore.groups import galore_param_groups
from .galore.optimizer import GaLoreAdamW
from .lora_plus import lora_plus_param_groups

__all__ = ["GaLoreAdamW", "galore_param_groups", "lora_plus_param_groups"]
