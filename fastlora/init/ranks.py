"""A rank per layer from the gradient's singular values, under a budget or for a share of each gradient.

An adapter of rank r that starts by LoRA-GA moves along 2r singular triplets of G, so the k-th rank of a layer is worth
σ²₂ₖ₋₁ + σ²₂ₖ: what it adds to ‖captured gradient‖², the first-order fall of the loss in a step of SGD. Worth never
grows with k, so taking the rank with the most worth for its cost, again and again, fills all layers to one level, as
water does: for costs that are alike no other choice captures more, else none by more than one rank's worth.
"""

from __future__ import annotations

import heapq
import itertools
import math

from ..runtime.checks import check, check_choice, check_integer, is_integer, is_number
from ..runtime.messages import some
from .sketch import GradientSketch

WORTHS = ("gradient", "share")


def allocate_ranks(
    sketch: GradientSketch,
    *,
    captured: float | None = None,
    parameters: int | None = None,
    total_rank: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    by: str = "gradient",
) -> dict[str, int]:
    """A rank of every layer and expert of a sketch, for `init_lora_ga(model, sketch, ranks=...)`. Experts that see
    many tokens have large gradients, and get more; all of a weight take the room of the largest of their ranks.

    Args:
        sketch: after its passes. σ are known for its `width` leading triplets only, the last ones poorly: sketch with
            a `width` of 4 to 6 times the largest rank that is wanted.
        captured: a share in (0, 1): the least ranks r whose 2r leading triplets hold that share of each layer's
            ‖G‖²; instead of a budget.
        parameters: the budget, in parameters of A and B that can learn: rank·(n + m) a layer. By default what the
            sketch's r costs in every layer.
        total_rank: the budget as the sum of the ranks, instead.
        min_rank: what every layer gets; layers without a gradient get no more.
        max_rank: by default 2r, with `captured` as many as there are: half of a layer's triplets or of the sketch's
            width, the most in any case.
        by: "gradient", σ² as it is: layers with larger gradients get more. "share": σ²/‖G‖², each layer's own share.

    Returns:
        Layer -> rank, in the model's order.

    Raises:
        ValueError: more than one of captured, parameters and total_rank; a share that is not in (0, 1), or that the
            sketch's width does not hold of some layers (a max_rank accepts less); a budget that is below min_rank in
            every layer, ranks out of range, an unknown `by`.

    Examples:
        >>> ranks = fastlora.allocate_ranks(sketch, total_rank=8 * len(sketch.names), max_rank=32)
        >>> fastlora.init_lora_ga(model, sketch, ranks=ranks)
    """
    check_choice("allocate_ranks", "by", by, WORTHS)
    goals = {"captured": captured, "parameters": parameters, "total_rank": total_rank}
    if len(given := [goal for goal, value in goals.items() if value is not None]) > 1:
        raise ValueError(f"allocate_ranks: {', '.join(given)}: got {len(given)} of them, want one")
    if captured is not None:
        right = is_number(captured) and 0 < captured < 1
        check(right, "allocate_ranks", "captured", captured, "a share in (0, 1)")
    check_integer("allocate_ranks", "min_rank", min_rank)
    clip = max_rank is not None
    if max_rank is None:
        max_rank = max(min_rank, 2 * sketch.r if captured is None else sketch.width)
    check_integer("allocate_ranks", "max_rank", max_rank, min_rank)
    sizes = sketch.sizes
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
    if captured is not None:
        return _least(sketch, limits, min_rank, captured, clip)
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


def _least(
    sketch: GradientSketch, limits: dict[str, int], min_rank: int, captured: float, clip: bool
) -> dict[str, int]:
    """The least ranks that hold a share of every layer's gradient. Raises ValueError where the sketch is too narrow."""
    ranks, short = {}, {}
    for name, limit in limits.items():
        held = list(itertools.accumulate(_worths(sketch, name, limit, "share")))
        enough = next((rank for rank, share in enumerate(held, 1) if share >= captured), limit)
        ranks[name] = max(min_rank, enough) if held[-1] else min_rank
        if 0 < held[-1] < captured and 2 * limit < min(sketch.sizes[name]) - 1:
            short[name] = held[-1]
    if short and not clip:
        raise ValueError(
            f"allocate_ranks: captured: got {captured}, and a sketch of width {sketch.width} holds less of "
            f"{some(f'{name} ({share:.2f})' for name, share in short.items())}; sketch with a larger width, or give a "
            "max_rank, at which such layers then stay"
        )
    return ranks


def _worths(sketch: GradientSketch, name: str, limit: int, by: str) -> list[float]:
    if not sketch.has_gradient(name):
        return [0.0] * limit
    layer = sketch.layers[name]
    squares = layer.svd(2 * limit)[1].double().square().tolist()
    whole = layer.squared_norm() if by == "share" else 1.0
    pairs = [(squares[2 * k] + squares[2 * k + 1]) / whole for k in range(limit)]
    return [pair if math.isfinite(pair) else 0.0 for pair in pairs]
