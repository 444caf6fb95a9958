"""`SignFactors`: what `sign_factors` found, for `init_lora_ga`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SignLayer:
    """One layer: A (r, m) and B (n, r) on the host.

    f(A, B), the share of ‖sign(G)‖² that Adam's first step on them misses at the best learning rate, is `objective`;
    `lora_ga` is that of LoRA-GA's own factors of G (ArB2r), `start` of those that the search began with. `rounds` it
    took; `tokens` that G is the sum of; `skipped` micro-batches that were not finite.
    """

    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    objective: float
    lora_ga: float
    start: float
    rounds: int
    tokens: int
    skipped: int


@dataclass
class SignFactors:
    """The layers' factors in the model's order; `str` of it is a table. `init_lora_ga(model, factors)` sets them.

    `sizes`: (n, m) of every layer looked at, those without a gradient too, which are not in `layers`.
    """

    r: int
    method: str
    sizes: dict[str, tuple[int, int]]
    layers: dict[str, SignLayer] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The layers looked at."""
        return list(self.sizes)

    def has_gradient(self, name: str) -> bool:
        """Whether a layer has factors."""
        return name in self.layers

    def check_complete(self) -> None:
        """Raises ValueError, naming them, where layers had no gradient that was finite and not zero."""
        missing = [name for name in self.names if name not in self.layers]
        if missing:
            raise ValueError(
                f"sign_factors: {len(missing)} of {len(self.sizes)} layers had no finite gradient: "
                f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. Reach them in the backward passes, "
                'leave them out with exclude_modules, or pass missing="kaiming" to init_lora_ga'
            )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "n×m", "tokens", "LoRA-GA", "start", "reached", "rounds")]
        for name, (n, m) in self.sizes.items():
            line = self.layers.get(name)
            if line is None:
                rows.append((name, f"{n}×{m}", "no gradient", "", "", "", ""))
                continue
            values = (f"{value:.4f}" for value in (line.lora_ga, line.start, line.objective))
            rows.append((name, f"{n}×{m}", str(line.tokens), *values, str(line.rounds)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
