"""The ways to fine-tune: one entry each. A new way is one more entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Contestant:
    """`adapter`: arguments of `fastlora.patch` next to those that all share; None trains the weights themselves.
    `rank_share`: the rank that it begins with, as a multiple of r. `start`: "" as `adapter` says, or one of
    `learner.start_from_gradients`. `groups`: the optimiser's parameter groups, "lora_plus" or "galore". `numbers`: the
    method's own, read in learner.py. `without`: optimisers with which the entry has no meaning, and why.
    `library`: "fastlora", "peft" for its own layers, or "none" for a frozen model; `patch`: further arguments of
    `fastlora.patch`, which change no number but rounding.
    """

    title: str
    adapter: Mapping[str, Any] | None = field(default_factory=dict)
    rank_share: float = 1.0
    start: str = ""
    groups: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    library: str = "fastlora"
    patch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, Any]:
        """What of the entry a trial's numbers depend on."""
        values = asdict(self)
        return {name: values[name] for name in values if name not in ("title", "without", "library", "patch")}

    def uses(self, argument: str) -> bool:
        """Whether its adapters are of the kind that an argument of `fastlora.patch` asks for."""
        return bool((self.adapter or {}).get(argument))


CONTESTANTS: dict[str, Contestant] = {
    "full": Contestant("full fine-tuning", adapter=None),
    "lora": Contestant("LoRA"),
    "rslora": Contestant("rsLoRA", {"use_rslora": True}),
    "lora_plus": Contestant(
        "LoRA+",
        groups="lora_plus",
        numbers={"ratio": 16.0},  # the paper's advice
        without={"sgd": "its ratio of rates is made for steps whose size does not depend on the gradient's"},
    ),
    "dora": Contestant("DoRA", {"use_dora": True}),
    "pissa": Contestant("PiSSA", {"init_lora_weights": "pissa"}),
    "adalora": Contestant(
        "AdaLoRA",
        {"use_adalora": True},
        rank_share=1.5,
        # The penalty's γ; the shares of the steps with all ranks and with the final ones, near the paper's; and that
        # from one cut to the next in between.
        numbers={"orthogonality": 0.1, "initial": 0.125, "final": 0.3, "interval": 0.02},
    ),
    "galore": Contestant(
        "GaLore",
        adapter=None,
        groups="galore",
        numbers={"update_proj_gap": 50},  # the paper's 200 would be longer than the runs here
        without={"sgd": "it is Adam on projected gradients"},
    ),
    "lora_ga": Contestant("LoRA-GA, γ = 16", start="lora_ga", numbers={"gamma": 16.0}),
    "lora_ga_64": Contestant("LoRA-GA, γ = 64", start="lora_ga", numbers={"gamma": 64.0}),
    "lora_ga_ranks": Contestant(
        "LoRA-GA, ranks for 90 %",
        start="lora_ga",
        numbers={"gamma": 16.0, "captured": 0.9, "most": 4},  # at most 4r: how many parameters is the gradient's choice
    ),
    "sign": Contestant(
        "LoRA-GA for Adam, γ = 64",
        start="sign",
        numbers={"gamma": 64.0},
        without={"sgd": "its factors are made for Adam's first step"},
    ),
}
BASELINE = "lora"  # whose final loss the others' steps are counted to
