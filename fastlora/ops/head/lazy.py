"""Logits that are made only if somebody looks at them: what a head gives in training, for a loss without logits.

A model calls its head, casts, scales or caps the logits, shifts or flattens them and asks for their cross-entropy. A
`LazyLogits` keeps what the head was given, follows those steps, and answers `F.cross_entropy` by
`lora_linear_cross_entropy`. Any other use makes the logits, once, and goes on with them: nothing is wrong, only not
saved. So a model's own loss function runs as it is, whatever it adds (a router's loss, a divisor for accumulation).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import call
from ..call import Adapter
from .head import TokenScores, lora_linear_cross_entropy, lora_linear_log_probs

CHECKED_TOKENS = 8


class Source(NamedTuple):
    """A head's call: weight (V, H), bias (V,) or None, its one adapter or None, and `run`, which makes the logits."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None
    run: Callable[[Tensor], Tensor]
    trust: dict[Any, str | None]  # the head's own: whether its first loss agreed with the logits'
    autocast: torch.dtype | None = None  # the dtype in force at the call


class LazyLogits(torch.Tensor):
    """The logits of `h` (..., H) under a head, followed by scalings and at most one tanh, as a tensor (..., V)."""

    h: Tensor
    source: Source
    steps: tuple[float | None, ...]  # factors; None for a tanh
    made: Tensor | None

    @staticmethod
    def __new__(cls, h: Tensor, source: Source, dtype: torch.dtype | None = None, steps: tuple[float | None, ...] = ()):
        shape = (*h.shape[:-1], source.weight.shape[0])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or h.dtype, device=h.device)
        made.h, made.source, made.steps, made.made = h, source, steps, None
        return made

    def logits(self) -> Tensor:
        """The logits themselves, made at the first call."""
        if self.made is None:
            z = self.source.run(self.h)
            for i, step in enumerate(self.steps):
                if i == 0 and self.dtype != z.dtype:
                    z = z.to(self.dtype)
                z = z.tanh() if step is None else z * step
            self.made = z.to(self.dtype)
        return self.made

    def scale_and_cap(self) -> tuple[float, float | None]:
        """The steps as a head's `logit_scale` and `softcap`."""
        scale, softcap = 1.0, None
        for step in self.steps:
            if step is None:
                softcap = 1.0
            elif softcap is None:
                scale *= step
            else:
                softcap *= step
        return scale if softcap is None else scale * softcap, softcap  # b·tanh(a·z) caps a·b·z at b

    def log_probs(self, labels: Tensor, temperature: float = 1.0, **flags: bool) -> TokenScores:
        """`lora_linear_log_probs` of these logits, in the head's autocast."""
        scale, softcap = self.scale_and_cap()
        weight, bias, adapter, *_, autocast = self.source
        a, b, s, p = adapter[:4] if adapter is not None else (None, None, 1.0, 0.0)
        with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            steps = {"temperature": temperature, "logit_scale": scale, "softcap": softcap}
            found = lora_linear_log_probs(self.h, weight, a, b, labels, s, bias, p, **steps, **flags)
        return found if isinstance(found, TokenScores) else TokenScores(found)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}): made when used"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None):
        kwargs = kwargs or {}
        follow = _FOLLOWED.get(func)
        if follow is not None and isinstance(args[0] if args else None, LazyLogits):
            result = follow(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_made(args), **_made(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None):
        return func(*_made(args), **_made(kwargs or {}))

    def _with(self, h: Tensor | None = None, dtype: torch.dtype | None = None, step: Any = ()) -> LazyLogits:
        steps = self.steps if step == () else (*self.steps, step)
        return LazyLogits(self.h if h is None else h, self.source, dtype or self.dtype, steps)


def _made(values: Any) -> Any:
    """The same arguments with logits in place of what stands for them."""
    if isinstance(values, LazyLogits):
        return values.logits()
    if isinstance(values, dict):
        return {key: _made(value) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_made(value) for value in values)
    return values


def _scaled(logits: LazyLogits, other: Any, *rest: Any, **kwargs: Any) -> Any:
    if rest or kwargs or not isinstance(other, (int, float)) or isinstance(other, bool) or not math.isfinite(other):
        return NotImplemented
    return logits._with(step=float(other))


def _divided(logits: LazyLogits, other: Any, *rest: Any, **kwargs: Any) -> Any:
    return NotImplemented if other == 0 else _scaled(logits, 1.0 / other if isinstance(other, (int, float)) else other)


def _tanh(logits: LazyLogits, *rest: Any, **kwargs: Any) -> Any:
    return NotImplemented if rest or kwargs or None in logits.steps else logits._with(step=None)


def _float(logits: LazyLogits, *rest: Any, **kwargs: Any) -> Any:
    return NotImplemented if rest or kwargs else logits._with(dtype=torch.float32)


def _to(
    logits: LazyLogits, target: Any = None, *rest: Any, dtype: Any = None, device: Any = None, **others: Any
) -> Any:
    """`to` another dtype, or to the device where it is."""
    for what in (target, device, dtype):
        if what is None:
            continue
        if isinstance(what, torch.dtype) and what.is_floating_point and what.itemsize >= logits.dtype.itemsize:
            dtype = what
        elif isinstance(what, torch.dtype) or torch.device(what) != logits.device:
            return NotImplemented
    return NotImplemented if rest or others else logits._with(dtype=dtype)


def _contiguous(logits: LazyLogits, *rest: Any, **kwargs: Any) -> Any:
    return NotImplemented if rest or kwargs else logits


def _viewed(logits: LazyLogits, *shape: Any, **kwargs: Any) -> Any:
    """`view` and `reshape` that keep the words together."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    words = logits.shape[-1]
    if kwargs or not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    rows = math.prod(logits.shape[:-1])
    if sizes[-1] == -1 and math.prod(sizes[:-1]) == rows and rows:
        sizes = (*sizes[:-1], words)
    if sizes[-1] != words:
        return NotImplemented
    return logits._with(h=logits.h.reshape(*sizes[:-1], logits.h.shape[-1]))


def _flattened(logits: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = end_dim % logits.dim()
    if last == logits.dim() - 1:
        return NotImplemented
    return logits._with(h=logits.h.flatten(start_dim, last))


def _indexed(logits: LazyLogits, index: Any) -> Any:
    """An index that takes all words."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None for part in parts):
        return NotImplemented
    used = sum(part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts)
    ellipses = [i for i, part in enumerate(parts) if part is Ellipsis]
    if ellipses:
        used -= 1
        parts[ellipses[0] : ellipses[0] + 1] = [slice(None)] * (logits.dim() - used)
        used = logits.dim()
    if used == logits.dim():
        if not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
            return NotImplemented
        parts = parts[:-1]
    return logits._with(h=logits.h[tuple(parts)])


def _cross_entropy(
    logits: LazyLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    soft = not isinstance(target, Tensor) or target.is_floating_point()
    if soft or logits.dim() != 2 or not (weight is None and size_average is None and reduce is None):
        return NotImplemented
    scale, softcap = logits.scale_and_cap()
    if softcap is not None and softcap <= 0.0:
        return NotImplemented
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    trust, key = logits.source.trust, (scale, softcap)
    if key not in trust:
        trust[key] = _disagreement(logits, target, scale, softcap, options)
        if trust[key] is not None:
            message = f"fastlora: the loss without logits is not used for this head: {trust[key]}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    if trust[key] is not None:
        return NotImplemented
    loss = _loss(logits.source, logits.h, target, scale, softcap, reduction=reduction, **options)
    # Autocast computes F.cross_entropy in float32; without it the loss has the logits' dtype.
    return loss if call.autocast_enabled(logits.h) else loss.to(logits.dtype)


def _loss(source: Source, h: Tensor, target: Tensor, scale: float, softcap: float | None, **options: Any) -> Tensor:
    a, b, s, p = source.adapter[:4] if source.adapter is not None else (None, None, 1.0, 0.0)
    return lora_linear_cross_entropy(
        h, source.weight, a, b, target, s, source.bias, p, logit_scale=scale, softcap=softcap, **options
    )


def _disagreement(
    logits: LazyLogits, target: Tensor, scale: float, softcap: float | None, options: dict[str, Any]
) -> str | None:
    """None where the losses of the first tokens that count are the logits' own, without dropout; else what differs."""
    counts = (target != options["ignore_index"]).nonzero().squeeze(1)[:CHECKED_TOKENS]
    if logits.h.is_meta or counts.numel() == 0:
        return None
    adapter = logits.source.adapter
    quiet = logits.source if adapter is None else logits.source._replace(adapter=adapter._replace(dropout_p=0.0))
    with torch.no_grad():
        few, labels = LazyLogits(logits.h[counts], quiet, logits.dtype, logits.steps), target[counts]
        got = _loss(quiet, few.h, labels, scale, softcap, reduction="none", **options)
        want = F.cross_entropy(few.logits().float(), labels, reduction="none", **options)
    difference = ((got - want).abs() / want.abs().clamp_min(1.0)).max().item()
    allowed = 1e-4 if logits.h.dtype in (torch.float32, torch.float64) else 5e-2
    return None if difference <= allowed else f"it differs from the logits' by {difference:.1e} (relative)"


_ATTRIBUTES = ("shape", "dtype", "device", "is_meta", "is_cuda", "requires_grad", "layout", "ndim")
_ABOUT = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
}
_FOLLOWED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__mul__: _scaled,
    torch.Tensor.__rmul__: _scaled,
    torch.Tensor.mul: _scaled,
    torch.mul: _scaled,
    torch.Tensor.__truediv__: _divided,
    torch.Tensor.div: _divided,
    torch.div: _divided,
    torch.Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    torch.Tensor.float: _float,
    torch.Tensor.to: _to,
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.view: _viewed,
    torch.Tensor.reshape: _viewed,
    torch.Tensor.flatten: _flattened,
    torch.Tensor.__getitem__: _indexed,
    F.cross_entropy: _cross_entropy,
}
