"""Initialisations that look at data: gradient sketches and LoRA-GA."""

from .lora_ga import init_lora_ga, undo_lora_ga
from .report import LayerReport, SketchReport
from .sketch import GradientSketch
from .streaming import StreamingSketch

__all__ = ["GradientSketch", "LayerReport", "SketchReport", "StreamingSketch", "init_lora_ga", "undo_lora_ga"]
