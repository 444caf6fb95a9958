"""Initialisations that look at data: gradient sketches and LoRA-GA."""

from .lora_ga import init_lora_ga
from .sketch import GradientSketch
from .streaming import StreamingSketch

__all__ = ["GradientSketch", "StreamingSketch", "init_lora_ga"]
