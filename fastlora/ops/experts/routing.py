"""Which expert takes which token, sorted once for every weight of a mixture's layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class Routing:
    """The T·k routed tokens of a mixture sorted by expert; the sort is stable and nothing is read back to the host.

    Args:
        top_k_index: (T, k) integers, the experts of each token. An index outside 0 … E-1 means that no expert here
            takes the token (transformers marks another rank's experts by E): such rows come last, and their outputs
            and gradients are zero.
        num_experts: E, at least 1.

    Attributes:
        order: (T·k,) int64, the position in the flattened (T, k) of each sorted row.
        rows: (T·k,) int64, its token. experts: (T·k,) int64, its expert, E for none.
        offsets: (E,) int32, where each expert's rows end, as `torch.nn.functional.grouped_mm` takes them.
        counts: (E,) int32, each expert's number of rows.

    Raises:
        ValueError: an index that is no 2-D tensor of integers, or fewer experts than one.

    Examples:
        >>> routing = Routing(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
        >>> routing.rows.tolist(), routing.offsets.tolist()
        ([0, 0, 1, 1], [1, 3, 4])
    """

    def __init__(self, top_k_index: Tensor, num_experts: int) -> None:
        if top_k_index.dim() != 2 or top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
            raise ValueError(
                f"Routing: top_k_index: got {tuple(top_k_index.shape)} of {top_k_index.dtype}, want (T, k) integers"
            )
        if num_experts < 1:
            raise ValueError(f"Routing: num_experts: got {num_experts}, want at least 1")
        self.num_tokens, self.top_k = top_k_index.shape
        self.num_experts = num_experts
        self.kept: dict[str, Any] = {}  # what the kernels derive from it, for every weight and both passes
        flat = top_k_index.detach().reshape(-1).long()
        taken = (flat >= 0) & (flat < num_experts)
        self.experts, self.order = torch.sort(torch.where(taken, flat, num_experts), stable=True)
        self.rows = self.order // max(self.top_k, 1)
        # Not bincount, whose size the host would wait for.
        self.offsets = torch.searchsorted(
            self.experts, torch.arange(1, num_experts + 1, device=flat.device), out_int32=True
        )

    @property
    def counts(self) -> Tensor:
        return self.offsets.diff(prepend=self.offsets.new_zeros(1))

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """`offsets` on the host, which waits for a GPU."""
        return tuple(self.offsets.tolist())


def inverse(order: Tensor) -> Tensor:
    """Where each routed token of the flattened (T, k) lies among the sorted rows: `order`'s inverse."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
