"""Optimisers, and parameter groups for them. Importing it does nothing."""

from .lora_plus import lora_plus_param_groups

__all__ = ["lora_plus_param_groups"]
