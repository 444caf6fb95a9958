"""The LoRA linear layer in plain ATen: the CPU's path, and every other backend's fallback.

What it saves over eager autograd: the rank-r product accumulates into the frozen layer's (`addmm_`, beta = 1), so that
no M×N or M×K temporary is made, scaled and added; for float32 adapters on a half-precision base x and dY are cast a few
rows at a time, so that no float32 copy of them is made or kept; with dropout only the mask is kept, and drop(x) is
formed again in the backward pass. With B = 0 the output is the frozen layer's to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import low_rank_dtype

CHUNK = 1 << 18  # elements cast at a time on a CPU: 1 MiB in fp32
GPU_CHUNK = 1 << 24  # elsewhere, where a launch costs as much as 4 MiB do


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> str | None:
    """None: ATen takes every dtype, stride, device and rank."""
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    dropout_state: Tensor | None = None,
    narrow: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, S, keep mask): y = x W0ᵀ + b + s·S Bᵀ with S = drop(x) Aᵀ. Shapes: docs/architecture.md, "The backend
    interface"."""
    return add_low_rank(F.linear(x, weight, bias), x, lora_A, lora_B, scaling, dropout_p, dropout_state, narrow)


def add_low_rank(
    frozen: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    dropout_state: Tensor | None,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(frozen + s·S Bᵀ in place, S, keep mask)."""
    dtype = low_rank_dtype(x, lora_A, lora_B, narrow)
    keep = None
    if dropout_p > 0.0:
        if dropout_state is None:
            dropout_state = draw_keep_mask(x, dropout_p)
        keep = keep_mask(dropout_state, x.shape, dropout_p)
    s = shrink(x, lora_A.to(dtype), keep)
    if keep is not None:
        s.mul_(dropout_scale(dropout_p))
    y = add_product(frozen, s, lora_B.to(dtype).t(), scaling)
    return y, s, dropout_state


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    dropout_state: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
    narrow: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB), None where `needs` (x, lora_A, lora_B) is False: dS = s·dY B, dB = s·dYᵀ S, dX = dY W0 + drop′(dS
    A), dA = dSᵀ drop(x). Without a weight dX is drop′(dS A) alone."""
    needs_x, needs_a, needs_b = needs
    dtype = low_rank_dtype(dy, lora_A, lora_B, narrow) if s is None else s.dtype
    # S and dS are the only places where the mask's scale enters.
    scale = scaling * dropout_scale(dropout_p)
    ds, grad_b = ds_and_db(dy, lora_B, s, dtype, scale, scaling, (needs_x or needs_a, needs_b))
    dx = grad_a = keep = None
    if ds is not None and dropout_p > 0.0:
        assert dropout_state is not None and lora_A is not None
        keep = keep_mask(dropout_state, (dy.shape[0], lora_A.shape[1]), dropout_p)
    if needs_x:
        assert lora_A is not None and ds is not None
        dx = dy.mm(weight) if weight is not None else dy.new_zeros(dy.shape[0], lora_A.shape[1])
        add_product(dx, ds, lora_A.to(dtype), 1.0, keep)
    if needs_a:
        assert x is not None and lora_A is not None and ds is not None
        grad_a = weight_grad(ds, x, keep).to(lora_A.dtype)
    return dx, grad_a, grad_b


# The four products with a tall matrix and a thin one. Where the thin one is wider than the tall one (float32 adapters
# on a half-precision base) the tall one is cast a few rows at a time, in a core's cache: nothing of its size is made.
def row_chunks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(1, (CHUNK if matrix.device.type == "cpu" else GPU_CHUNK) // max(1, columns))
    yield from (slice(start, start + step) for start in range(0, rows, step))


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _rows_of(x: Tensor, keep: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    return _dropped(x[rows], None if keep is None else keep[rows]).to(dtype)


def shrink(x: Tensor, a: Tensor, keep: Tensor | None = None) -> Tensor:
    """(keep ∘ x) Aᵀ (M, r) in A's dtype."""
    if x.dtype == a.dtype:
        return F.linear(_dropped(x, keep), a)
    out, a_t = a.new_empty(x.shape[0], a.shape[0]), a.t()
    for rows in row_chunks(x):
        torch.mm(_rows_of(x, keep, rows, a.dtype), a_t, out=out[rows])
    return out


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """out (M, N) += alpha · keep ∘ (left right) in place, summed in left's dtype and rounded once; returns out."""
    if out.dtype == left.dtype:
        if keep is None:
            return out.addmm_(left, right, alpha=alpha)
        return out.addcmul_(left.mm(right), keep, value=alpha)
    for rows in row_chunks(out):
        wide = out[rows].to(left.dtype)  # every cast apart: in one operation of two dtypes they are six times slower
        if keep is None:
            out[rows] = wide.addmm_(left[rows], right, alpha=alpha)
        else:
            out[rows] = wide.addcmul_(left[rows].mm(right), keep[rows].to(left.dtype), value=alpha)
    return out


def weight_grad(ds: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """dSᵀ (keep ∘ x) (r, K) in dS's dtype."""
    if x.dtype == ds.dtype:
        return ds.t().mm(_dropped(x, keep))
    out = ds.new_zeros(ds.shape[1], x.shape[1])
    for rows in row_chunks(x):
        out.addmm_(ds[rows].t(), _rows_of(x, keep, rows, ds.dtype))
    return out


def ds_and_db(
    dy: Tensor,
    lora_B: Tensor | None,
    s: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    scaling: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(scale · dY B (M, r) in `dtype`, scaling · dYᵀ S (N, r) in B's dtype), None where `needs` is False."""
    needs_s, needs_b = needs
    if not (needs_s or needs_b):
        return None, None
    assert lora_B is not None
    b = lora_B.to(dtype)
    # As (r, N) and transposed: ATen's GEMM is faster with the long side last (285 against 484 µs at M = 512, N = 1024,
    # r = 16, fp32).
    ds = grad_b = None
    if dy.dtype == dtype:
        ds = dy.mm(b) if needs_s else None
        grad_b = s.t().mm(dy) if needs_b and s is not None else None
    else:
        ds = b.new_empty(dy.shape[0], b.shape[1]) if needs_s else None
        grad_b = b.new_zeros(b.shape[1], b.shape[0]) if needs_b else None
        for rows in row_chunks(dy):
            part = dy[rows].to(dtype)
            if ds is not None:
                torch.mm(part, b, out=ds[rows])
            if grad_b is not None and s is not None:
                grad_b.addmm_(s[rows].t(), part)
    if grad_b is not None:
        grad_b = grad_b.mul_(scaling).t().to(lora_B.dtype)
    return None if ds is None else ds.mul_(scale), grad_b


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    narrow: bool = False,
) -> Tensor:
    """The same y, differentiated by ATen's own autograd: no Python in the backward pass, but drop(x) is saved.

    The faster one for small problems on a CPU, where an `autograd.Function` costs more (about 12 µs) than a pass over
    memory.
    """
    dtype = low_rank_dtype(x, lora_A, lora_B, narrow)
    wide = x.to(dtype)
    s = F.linear(F.dropout(wide, dropout_p) if dropout_p > 0.0 else wide, lora_A.to(dtype))
    y = F.linear(x, weight, bias)
    if dtype == y.dtype:
        return y.addmm_(s, lora_B.to(dtype).t(), alpha=scaling)
    # Summed in the wider dtype and rounded once; not with alpha, whose gradient would be dY's rounded to its own dtype.
    return y.add_(F.linear(s * scaling, lora_B.to(dtype)))


def draw_keep_mask(x: Tensor, dropout_p: float) -> Tensor:
    """What dropout keeps of x (M, K), drawn from torch's generator: the same elements that F.dropout would keep for the
    same seed.

    On a CPU in x's dtype, because ATen multiplies by a bool at a fifth of the speed (550 against 80 µs for 512×1024
    bf16); elsewhere a bool.
    """
    dtype = x.dtype if x.device.type == "cpu" else torch.bool
    return torch.empty_like(x, dtype=dtype).bernoulli_(1.0 - dropout_p)


def keep_mask(dropout_state: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """The mask itself, or the one that a seed stands for: a compiled graph made for the kernels that fell down to this
    backend."""
    if dropout_state.dtype != torch.int64:
        return dropout_state
    generator = torch.Generator(dropout_state.device).manual_seed(int(dropout_state.item()))
    keep = torch.empty(shape, dtype=torch.bool, device=dropout_state.device)
    return keep.bernoulli_(1.0 - dropout_p, generator=generator)


def dropout_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
