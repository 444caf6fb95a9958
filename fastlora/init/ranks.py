"""A rank per layer from the gradient's singular values, under a budget.

An adapter of rank r that starts by LoRA-GA moves along 2r singular triplets of G, so the k-th rank of a layer is worth
σ²₂ₖ₋₁ + σ²₂ₖ: what it adds to ‖captured gradient‖², the first-order fall of the loss in a step of SGD. Worth never
grows with k, so taking the rank with the most worth for its cost, again and again, fills all layers to one level, as
water does: for costs that are alike no other choice captures more, else none by more than one rank's worth.
"""

from __future__ import annotations

import heapq
import math

from ..runtime.checks import check_choice, check_integer, is_integer
from .sketch import GradientSketch

WORTHS = ("gradient", "share")


def allocate_ranks(
    sketch: GradientSketch,
    *,
    parameters: int | None = None,
    total_rank: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    by: str = "gradient",
) -> dict[str, int]:
    """A rank of every linear layer of a sketch, for `init_lora_ga(model, sketch, ranks=...)`. Experts keep r.

    Args:
        sketch: after its passes. σ are known for its `width` leading triplets only, the last ones poorly: sketch with
            a `width` of 4 to 6 times the largest rank that is wanted.
        parameters: the budget, in parameters of A and B: rank·(n + m) a layer. By default what the sketch's r costs in
            every layer.
        total_rank: the budget as the sum of the ranks, instead.
        min_rank: what every layer gets; layers without a gradient get no more.
        max_rank: by default 2r. Never more than half of a layer's triplets, or of the sketch's width.
        by: "gradient", σ² as it is: layers with larger gradients get more. "share": σ²/‖G‖², each layer's own share.

    Returns:
        Layer -> rank, in the model's order.

    Raises:
        ValueError: both budgets, one that is below min_rank in every layer, ranks out of range, an unknown `by`.

    Examples:
        >>> ranks = fastlora.allocate_ranks(sketch, total_rank=8 * len(sketch.names), max_rank=32)
        >>> fastlora.init_lora_ga(model, sketch, ranks=ranks)
    """
    check_choice("allocate_ranks", "by", by, WORTHS)
    if parameters is not None and total_rank is not None:
        raise ValueError("allocate_ranks: parameters, total_rank: got both, want one of them")
    check_integer("allocate_ranks", "min_rank", min_rank)
    max_rank = max(2 * sketch.r, min_rank) if max_rank is None else max_rank
    check_integer("allocate_ranks", "max_rank", max_rank, min_rank)
    # All experts of a weight have one rank, the sketch's: it is the file's.
    sizes = {name: size for name, size in sketch.sizes.items() if name.rpartition("[")[0] not in sketch.experts}
    costs = {name: 1 if total_rank is not None else n + m for name, (n, m) in sizes.items()}
    budget = total_rank if parameters is None else parameters
    if budget is None:
        budget = sum(sketch.r * cost for cost in costs.values())
    limits = {name: min(max_rank, sketch.width // 2, min(size) // 2) for name, size in sizes.items()}
    small = [name for name, limit in limits.items() if limit < min_rank]
    if small:
        raise ValueError(
            f"allocate_ranks: min_rank: got {min_rank}, but {small[0]!r} can have at most {limits[small[0]]} (half of "
            f"its {min(sizes[small[0]])} triplets, or of the sketch's width {sketch.width})"
        )
    least = min_rank * sum(costs.values())
    if not is_integer(budget, least):
        what = "parameters" if total_rank is None else "total_rank"
        raise ValueError(
            f"allocate_ranks: {what}: got {budget!r}, want at least {least}, which min_rank={min_rank} costs"
        )
    worths = {name: _worths(sketch, name, limits[name], by) for name in sizes}
    return fill(worths, costs, budget, min_rank)


def fill(worths: dict[str, list[float]], costs: dict[str, int], budget: int, min_rank: int) -> dict[str, int]:
    """Layer -> rank. `worths[layer][k]` is what the layer's rank k + 1 adds, never growing with k; equal worths go to
    the layer that comes first."""
    ranks = dict.fromkeys(worths, min_rank)
    left = budget - min_rank * sum(costs.values())
    order = {name: i for i, name in enumerate(worths)}
    queue: list[tuple[float, int, str]] = []

    def offer(name: str) -> None:
        rank = ranks[name]
        if rank < len(worths[name]) and worths[name][rank] > 0:
            heapq.heappush(queue, (-worths[name][rank] / costs[name], order[name], name))

    for name in worths:
        offer(name)
    while queue:
        *_, name = heapq.heappop(queue)
        if costs[name] <= left:  # what does not fit now never will
            ranks[name] += 1
            left -= costs[name]
            offer(name)
    return ranks


def _worths(sketch: GradientSketch, name: str, limit: int, by: str) -> list[float]:
    if not sketch.has_gradient(name):
        return [0.0] * limit
    layer = sketch.layers[name]
    squares = layer.svd(2 * limit)[1].double().square().tolist()
    whole = layer.squared_norm() if by == "share" else 1.0
    pairs = [(squares[2 * k] + squares[2 * k + 1]) / whole for k in range(limit)]
    return [pair if math.isfinite(pair) else 0.0 for pair in pairs]
