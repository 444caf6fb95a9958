"""What compare.py compares: one entry per way to fine-tune. A new way is one more entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """`method` is one of methods.py; `overrides` are the fields of `Settings` in which it differs from the others;
    `lr` is where the search for its learning rate starts (a value of the series 1, 2, 5, 10, ...).
    """

    title: str
    method: str
    lr: float
    overrides: Mapping[str, Any] = field(default_factory=dict)


CONTESTANTS: dict[str, Contestant] = {
    "full": Contestant("full fine-tuning", "full", 2e-4),
    "lora": Contestant("LoRA", "fastlora", 2e-3),
    "pissa": Contestant("PiSSA", "fastlora", 1e-3, {"init": "pissa"}),
    "lora_ga": Contestant("LoRA-GA, γ = 16", "fastlora", 1e-3, {"init": "lora_ga", "gamma": 16.0}),
    "lora_ga_64": Contestant("LoRA-GA, γ = 64", "fastlora", 1e-3, {"init": "lora_ga", "gamma": 64.0}),
}
BASELINE = "lora"  # whose final loss the others' steps are counted to
