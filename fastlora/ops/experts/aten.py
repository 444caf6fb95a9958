"""The experts' linear layer in plain ATen, an expert at a time: the CPU's path, and the fallback of every dtype.

An expert's rows are gathered as they are needed and go through `ops/lora/aten.py`. Where W + ΔW is asked for, one
expert's exists at a time, and the gradients of A and B still come from the rank-r path: no dense dW.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import low_rank_dtype
from ..lora import aten as lora
from .routing import Routing, inverse

Tensors = list[Tensor | None]


class Options(NamedTuple):
    """Everything of a call that is no tensor."""

    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    top_k: int
    is_transposed: bool  # weight is (E, K, N)
    gathered: bool  # x is (T, K)
    narrow: bool  # `call.low_rank_dtype`
    materialise: bool  # y and dX by W + ΔW
    routing: Routing | None = None  # that of order and offsets, for what it keeps

    def without_adapters(self) -> Options:
        return self._replace(scalings=(), dropout_ps=())


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weight: bool
    bias: bool
    lora_As: tuple[bool, ...]
    lora_Bs: tuple[bool, ...]
    combine: bool = False

    @classmethod
    def of(cls, wanted: Sequence[bool]) -> Needs:
        """From the flags of x, weight, bias, combine, and each lora_A and lora_B."""
        x, weight, bias, combine, *factors = wanted
        count = len(factors) // 2
        return cls(x, weight, bias, tuple(factors[:count]), tuple(factors[count:]), combine)

    @property
    def rows(self) -> bool:
        """dX before it is weighted, which the weights' gradient is made of too."""
        return self.x or self.combine


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    combine: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor]]:
    """(y (P, N), each adapter's S (P, r) with dropout's scale, or with W + ΔW none) for the P sorted rows; with
    `combine` y (T, N), their weighted sums."""
    num_rows, n = order.shape[0], weight.shape[2 if options.is_transposed else 1]
    weights = weights_of(combine, order)
    y = x.new_empty(num_rows, n, dtype=None if weights is None else torch.promote_types(x.dtype, weights.dtype))
    adapters = _Adapters(x, lora_As, lora_Bs, seed, num_rows, options)
    s = [x.new_empty(num_rows, a.shape[1], dtype=t) for a, t in zip(lora_As, adapters.dtypes, strict=True)]
    end = 0
    for e, span in _experts(offsets, options):
        rows, w, end = rows_of(x, order, options, span), _weight(weight, e, x, options), span.stop
        own = y[span] if weights is None else x.new_empty(span.stop - span.start, n)
        if options.materialise:
            w = adapters.add_to(w, e)
        if bias is None:
            torch.mm(rows, w.t(), out=own)
        else:
            torch.addmm(bias[e].to(x.dtype), rows, w.t(), out=own)
        if not options.materialise:
            for i, (a, b, scaling, p, keep) in enumerate(adapters.of(e, span)):
                s[i][span] = lora.add_low_rank(own, rows, a, b, scaling, p, keep, options.narrow)[1]
        if weights is not None:
            y.index_copy_(0, order[span], own * weights[span])
    if weights is None:
        y[end:].zero_()
    else:
        y.index_fill_(0, order[end:], 0.0)
        y = summed(y, options.top_k)
    if options.materialise:
        return y, []
    for part in s:
        part[end:].zero_()
    return y, s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    s: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    combine: Tensor | None,
    options: Options,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensors, Tensors]:
    """(dX, dW, db, dcombine, dAs, dBs), None where it is not needed; zero for experts without rows.

    With `combine` dY's rows are those of `dy` unweighted, and what the adapters' and dense gradients are made of is
    weighted instead. y is linear in x but for the bias, so ⟨dy, y⟩, a weight's gradient, is ⟨dX, x⟩ + ⟨dy, b⟩: y is
    needed no more.
    """
    num_rows, k = order.shape[0], weight.shape[1 if options.is_transposed else 2]
    weights = weights_of(combine, order)
    dx = dy.new_empty(num_rows, k) if needs.x else None
    dw = torch.zeros_like(weight) if needs.weight else None
    db = weight.new_zeros(weight.shape[0], dy.shape[1]) if needs.bias else None
    dots = dy.new_zeros(num_rows, dtype=torch.promote_types(dy.dtype, torch.float32)) if needs.combine else None
    grad_as = [torch.zeros_like(a) if need else None for a, need in zip(lora_As, needs.lora_As, strict=True)]
    grad_bs = [
        torch.zeros_like(b, memory_format=torch.contiguous_format) if need else None
        for b, need in zip(lora_Bs, needs.lora_Bs, strict=True)
    ]
    adapters = _Adapters(dy, lora_As, lora_Bs, seed, num_rows, options)
    end = 0
    for e, span in _experts(offsets, options):
        w, end = _weight(weight, e, dy, options), span.stop
        d = dy[span] if weights is None else dy.index_select(0, order[span] // options.top_k)
        rows = None if x is None else rows_of(x, order, options, span)
        weighted = rows if weights is None or rows is None else (rows * weights[span]).to(rows.dtype)
        own = None
        if options.materialise and needs.rows:
            own = d.mm(adapters.add_to(w, e))
        for i, (a, b, scaling, p, keep) in enumerate(adapters.of(e, span)):
            needs_x = needs.rows and not options.materialise
            if not (needs_x or needs.lora_As[i] or needs.lora_Bs[i]):
                continue
            part = s[i][span] if s else None
            if part is not None and weights is not None:
                part = (part * weights[span]).to(part.dtype)
            if part is None and needs.lora_Bs[i]:
                assert weighted is not None
                part = lora.shrink(weighted, a.to(adapters.dtypes[i]))
            frozen = w if own is None else None
            wants = needs_x, needs.lora_As[i], needs.lora_Bs[i]
            grads = lora.backward(d, weighted, frozen, a, b, part, keep, scaling, p, wants, options.narrow)
            if needs_x and grads[0] is not None:
                own = grads[0] if own is None else own.add_(grads[0])
            for grad, to in ((grads[1], grad_as[i]), (grads[2], grad_bs[i])):
                if to is not None and grad is not None:
                    to[e] = grad
        if needs.rows:
            own = d.mm(w) if own is None else own
            if dots is not None:
                assert rows is not None
                dots[span] = torch.sum(own * rows, 1, dtype=dots.dtype)
                if bias is not None:
                    dots[span] += d.mv(bias[e].to(d.dtype))
            if dx is not None:
                own = own if weights is None else (own * weights[span]).to(own.dtype)
                if options.gathered:
                    dx.index_copy_(0, order[span], own)
                else:
                    dx[span] = own
        if dw is not None:
            assert weighted is not None
            (dw[e].t() if options.is_transposed else dw[e]).copy_(d.t().mm(weighted))
        if db is not None:
            db[e] = d.sum(0) if weights is None else (d * weights[span]).sum(0)
    if dx is not None:
        if end < num_rows:
            dx.index_fill_(0, order[end:] if options.gathered else torch.arange(end, num_rows, device=dx.device), 0.0)
        if options.gathered:
            dx = summed(dx, options.top_k)
    return dx, dw, db, grad_of(combine, dots, order), grad_as, grad_bs


def weights_of(combine: Tensor | None, order: Tensor) -> Tensor | None:
    """(P, 1), the weight of each sorted row."""
    return None if combine is None else combine.reshape(-1)[order].unsqueeze(-1)


def summed(rows: Tensor, top_k: int, dtype: torch.dtype | None = None) -> Tensor:
    """(T·k, N) to (T, N) in the wider of the rows' and `dtype`: rounded once, in a fixed order."""
    dtype = rows.dtype if dtype is None else torch.promote_types(rows.dtype, dtype)
    return rows.view(-1, top_k, rows.shape[1]).sum(1, dtype=dtype)


def grad_of(combine: Tensor | None, dots: Tensor | None, order: Tensor) -> Tensor | None:
    """The gradient of combine (T, k) from that of each sorted row."""
    if combine is None or dots is None:
        return None
    return torch.empty_like(dots).index_copy_(0, order, dots).view(combine.shape).to(combine.dtype)


def combined(y: Tensor, combine: Tensor, order: Tensor) -> Tensor:
    """(T, N): the sum of each token's sorted rows y (P, N), weighted by combine (T, k)."""
    weights = weights_of(combine, order)
    assert weights is not None
    return summed((y * weights)[inverse(order)], combine.shape[1])


class _Adapters:
    """The adapters of a call, expert by expert. PEFT's lora_B has the expert fastest: it is copied once, not strided
    through for each expert."""

    def __init__(self, x, lora_As, lora_Bs, seed, num_rows: int, options: Options) -> None:
        self.options, self.x_dtype = options, x.dtype
        self.lora_As, self.lora_Bs = lora_As, [b.contiguous() for b in lora_Bs]
        self.dtypes = [low_rank_dtype(x, a, b, options.narrow) for a, b in zip(lora_As, lora_Bs, strict=True)]
        self.keeps: Tensors = [
            keep_mask(seed, i, num_rows, a.shape[2], p)
            for i, (a, p) in enumerate(zip(lora_As, options.dropout_ps, strict=True))
        ]

    def of(self, e: int, span: slice) -> Iterator[tuple[Tensor, Tensor, float, float, Tensor | None]]:
        """(A, B, scaling, dropout_p, what is kept of the rows) for expert e."""
        options = self.options
        for a, b, scaling, p, keep in zip(
            self.lora_As, self.lora_Bs, options.scalings, options.dropout_ps, self.keeps, strict=True
        ):
            if keep is not None:
                keep = keep[span]
                keep = keep.to(self.x_dtype) if keep.device.type == "cpu" else keep  # `lora.draw_keep_mask` says why
            yield a[e], b[e], scaling, p, keep

    def add_to(self, w: Tensor, e: int) -> Tensor:
        """W + ΔW of expert e (N, K), summed in the widest dtype and rounded once."""
        total = w
        for a, b, scaling, dtype in zip(self.lora_As, self.lora_Bs, self.options.scalings, self.dtypes, strict=True):
            wide = torch.promote_types(dtype, total.dtype)
            total = torch.addmm(total.to(wide), b[e].to(wide), a[e].to(wide), alpha=scaling)
        return total.to(w.dtype)


def keep_mask(seed: Tensor | None, adapter: int, num_rows: int, columns: int, p: float) -> Tensor | None:
    """What dropout keeps of the sorted rows for one of the adapters (P, K), made from the seed each time."""
    return None if p == 0.0 or seed is None else lora.keep_mask(seed + adapter, (num_rows, columns), p)


def _experts(offsets: Tensor, options: Options) -> Iterator[tuple[int, slice]]:
    """(expert, its sorted rows) of the experts that have any."""
    start = 0
    for e, end in enumerate(offsets.tolist() if options.routing is None else options.routing.ends):
        if end > start:
            yield e, slice(start, end)
        start = end


def rows_of(x: Tensor, order: Tensor, options: Options, span: slice = slice(None)) -> Tensor:
    """The sorted rows of x, or some of them."""
    return x.index_select(0, order[span] // options.top_k) if options.gathered else x[span]


def _weight(weight: Tensor, e: int, like: Tensor, options: Options) -> Tensor:
    """(N, K) of one expert; under autocast the base may have another dtype, and is cast an expert at a time."""
    return (weight[e].t() if options.is_transposed else weight[e]).to(like.dtype)
