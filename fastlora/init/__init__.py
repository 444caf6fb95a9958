"""Initialisations that look at data: gradient sketches and LoRA-GA."""

from .lora_ga import init_lora_ga, undo_lora_ga
from .monitor import AlignmentMonitor, AlignmentRecord, LayerAlignment
from .periodic import PeriodicReinit
from .ranks import allocate_ranks
from .reinit import LayerReinit, ReinitReport, reinit_lora_ga
from .report import LayerReport, SketchReport
from .sign import SignFactors, SignLayer, sign_factors
from .sketch import GradientSketch
from .streaming import StreamingSketch

__all__ = [
    "AlignmentMonitor",
    "AlignmentRecord",
    "GradientSketch",
    "LayerAlignment",
    "LayerReinit",
    "LayerReport",
    "PeriodicReinit",
    "ReinitReport",
    "SignFactors",
    "SignLayer",
    "SketchReport",
    "StreamingSketch",
    "allocate_ranks",
    "init_lora_ga",
    "reinit_lora_ga",
    "sign_factors",
    "undo_lora_ga",
]
