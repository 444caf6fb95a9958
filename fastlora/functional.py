"""`lora_linear` and its form for several adapters: the checks, autocast and the choice of path. The maths is one floor
down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, group_autograd, group_dispatch, reference, segments_autograd
from .kernels.segment_plan import BASE, Segments

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Adapter(NamedTuple):
    """One low-rank term s·(drop(x) Aᵀ) Bᵀ: lora_A (r, K), lora_B (N, r), the scale s and the dropout probability in
    force (0 in eval mode).

    With a magnitude (N,) it is DoRA's, and not only a term: see `dora_linear`. `norm` (N,): the norms of the rows of
    W0 + s·B A where they are known already.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0
    magnitude: Tensor | None = None
    norm: Tensor | None = None


class GroupLayer(NamedTuple):
    """One layer of `lora_group`: weight (N, K), its adapters (any number), bias (N,) or None."""

    weight: Tensor
    adapters: Sequence[Adapter]
    bias: Tensor | None = None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with a low-rank adapter, computed in one piece: y = x W0ᵀ + b + s·(drop(x) Aᵀ) Bᵀ.

    Equivalent to:

        s = F.linear(F.dropout(x, dropout_p, training), lora_A)
        y = F.linear(x, weight, bias) + scaling * F.linear(s, lora_B)

    Args:
        x: (..., K), at least 1-D, float32, float64, bfloat16 or float16, any strides.
        weight: (N, K), x's dtype (any float dtype under autocast), any strides: a Conv1D's weight goes in as
            `weight.t()`.
        lora_A: (r, K). lora_B: (N, r). Both of any float dtype: float32 adapters on a bfloat16 base get float32
            gradients,
            and x is not upcast for them.
        scaling: s, a run-time number: alpha/r, or alpha/√r with rsLoRA (arXiv 2312.03732).
        bias: (N,) or None.
        dropout_p: probability, in [0, 1], of dropping an element of x on the low-rank path; used when `training`.
        backend: "auto", "triton", "cublas" or "torch"; one that cannot take the call falls down to the next.

    Returns:
        (..., N) in x's dtype (autocast's dtype under autocast). Differentiable once in x, weight, bias, lora_A and
        lora_B.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a probability outside [0, 1], an unknown
            backend.

    Example:
        >>> x, weight = torch.randn(4, 32, 64), torch.randn(128, 64)
        >>> lora_A, lora_B = torch.randn(8, 64), torch.zeros(128, 8)
        >>> lora_linear(x, weight, lora_A, lora_B, scaling=2.0).shape
        torch.Size([4, 32, 128])

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685.
    """
    adapter = Adapter(lora_A, lora_B, scaling, dropout_p if training else 0.0)
    _check_probability(dropout_p)
    return _fused(x, weight, adapter, bias, backend)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    bias: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with any number of adapters: y = x W0ᵀ + b + Σ sᵢ·(dropᵢ(x) Aᵢᵀ) Bᵢᵀ.

    Arguments as in `lora_linear`. Without adapters it is the frozen layer. Adapters that drop nothing run as one, of
    rank Σ rᵢ; each of the others has a mask of its own, drawn in the order given (as PEFT does); all but one of those
    add their term in eager PyTorch. Adapters with a magnitude each add what `dora_linear` makes of the frozen layer's
    output.
    """
    if not training:
        for adapter in adapters:
            _check_probability(adapter.dropout_p)
        adapters = [adapter._replace(dropout_p=0.0) for adapter in adapters]
    if len(adapters) == 1 and adapters[0].magnitude is None:
        return _fused(x, weight, adapters[0], bias, backend)
    if not adapters:
        return F.linear(x, weight, bias)
    for adapter in adapters:
        _check(x, weight, adapter, bias)
    if any(adapter.magnitude is not None for adapter in adapters):
        return dora_functional.multi_dora_linear(x, weight, adapters, bias, backend)
    plain = [adapter for adapter in adapters if adapter.dropout_p == 0.0]
    dropped = [adapter for adapter in adapters if adapter.dropout_p > 0.0]
    first = _concatenate(plain) if plain else dropped.pop(0)
    y = _fused(x, weight, first, bias, backend)
    for adapter in dropped:
        y = y + _low_rank_term(x, adapter, y.dtype)
    return y


def lora_group(
    x: Tensor,
    layers: Sequence[GroupLayer],
    training: bool = True,
    backend: str = "auto",
    shared_mask: bool = False,
) -> tuple[Tensor, ...]:
    """Several LoRA layers on the same x, as q, k and v or gate and up are: x is read once for the S of all of them and
    once for every dA, and dX is accumulated instead of made once a layer and added.

    Equivalent to:

        tuple(multi_lora_linear(x, layer.weight, layer.adapters, layer.bias, training) for layer in layers)

    Args:
        x: (..., K). layers: `GroupLayer`s with weight (Nᵢ, K) and adapters as in `lora_linear`; ranks, scales, dropout
            probabilities and the adapters' dtypes may differ.
        training, backend: as in `lora_linear`.
        shared_mask: one dropout mask for all adapters, which then need one probability; otherwise each has its own, as
            in PEFT.

    Returns:
        A tuple of (..., Nᵢ). One whose gradient is not asked for costs nothing in the backward pass.

    Layers without adapters, or with several that drop something, run alone; so do all of them where sharing cannot help
    or be right: small x on a CPU, inside torch.compile and torch.func, tensor subclasses, layers that run on different
    backends.

    Raises:
        ValueError: as `lora_linear`; with `shared_mask`, probabilities that differ, or an adapter with a magnitude.
    """
    layers = [
        layer if training else layer._replace(adapters=[a._replace(dropout_p=0.0) for a in layer.adapters])
        for layer in layers
    ]
    for layer in layers:
        for adapter in layer.adapters:
            _check(x, layer.weight, adapter, layer.bias)
            if shared_mask and adapter.magnitude is not None:
                raise ValueError("lora_group: shared_mask: got True and an adapter with a magnitude (DoRA), want False")
    probabilities = {adapter.dropout_p for layer in layers for adapter in layer.adapters}
    if shared_mask and len(probabilities) > 1:
        raise ValueError(
            f"lora_group: shared_mask: got dropout probabilities {sorted(probabilities)}, want one for all"
        )
    shared_mask = shared_mask and probabilities != {0.0}
    merged = [as_one_adapter(layer.adapters) for layer in layers]
    members = {
        i: group_dispatch.Member(layer.weight, layer.bias, *adapter[:2], adapter.dropout_p, backend)
        for i, (layer, adapter) in enumerate(zip(layers, merged, strict=True))
        if adapter is not None
    }
    whole = len(members) == len(layers) or not shared_mask
    shared = open_group(x, list(members.values()), shared_mask) if whole else None
    if shared is None and shared_mask:
        return tuple(_with_one_mask(x, layers, probabilities.pop()))
    outputs = []
    seats = {i: seat for seat, i in enumerate(members)}
    for i, (layer, adapter) in enumerate(zip(layers, merged, strict=True)):
        if shared is None or adapter is None:
            outputs.append(multi_lora_linear(x, layer.weight, layer.adapters, layer.bias, backend=backend))
        else:
            outputs.append(shared.call(seats[i], layer.weight, layer.bias, adapter.lora_B, adapter.scaling))
    return tuple(outputs)


def lora_mixed_batch(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    adapter_ids: Sequence[int] | Tensor | Segments,
    bias: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer on a batch whose sequences use different adapters, or none: the frozen layer runs once for the
    whole batch, and every pass over the adapters is one launch whatever their number.

    Equivalent to:

        for i, adapter_id in enumerate(adapter_ids):
            chosen = [] if adapter_id == -1 else [adapters[adapter_id]]
            y[i] = multi_lora_linear(x[i], weight, chosen, bias, training)

    Args:
        x: (batch, ..., K), dtypes as in `lora_linear`. weight: (N, K). bias: (N,) or None.
        adapters: `Adapter`s; ranks, scales and dropout probabilities may differ. Where their dtypes differ they are
            cast to the widest, and their gradients back.
        adapter_ids: an adapter's number for each sequence of x, -1 for none. A list costs no synchronisation; an
            integer tensor on a GPU is read back to the host once. Several layers on one batch, and CUDA graphs, take
            `functional.Segments(ids, tokens)`, sorted and sent to the device once.
        training, backend: as in `lora_linear` ("triton" and "cublas" are the same here).

    Returns:
        (batch, ..., N) in x's dtype. Differentiable once in x, weight, bias and every adapter that has a sequence; the
        others get no gradient (None), as modules that are not called.

    Raises:
        ValueError: as `lora_linear`; as many ids as sequences, each from -1 to len(adapters) - 1.

    Source: the batching is that of Punica (Chen et al. 2023, arXiv 2310.18547) and S-LoRA (Sheng et al. 2023, arXiv
    2311.03285), here with a backward pass.
    """
    tokens = math.prod(x.shape[1:-1])
    if isinstance(adapter_ids, Segments):
        segments = adapter_ids
    else:
        ids = adapter_ids.tolist() if isinstance(adapter_ids, Tensor) else adapter_ids
        segments = Segments([int(i) for i in ids], tokens)
    if x.dim() < 2 or (segments.batch, segments.tokens) != (x.shape[0], tokens):
        raise ValueError(
            f"lora_mixed_batch: adapter_ids: got {segments.batch} (for {segments.tokens} rows each) for x "
            f"{tuple(x.shape)}, want x (batch, ..., K) and one id for each sequence of the batch"
        )
    if any(not BASE <= i < len(adapters) for i in segments.adapters):
        raise ValueError(
            f"lora_mixed_batch: adapter_ids: got {list(segments.adapters)}, want numbers of the {len(adapters)} "
            f"adapters, or {BASE} for none"
        )
    if not training:
        adapters = [adapter._replace(dropout_p=0.0) for adapter in adapters]
    return run_segments(x, weight, [adapters[i] for i in segments.adapters], segments, bias, backend)


def run_segments(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    segments: Segments,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`lora_mixed_batch` where the batch is sorted already: one adapter for each of the segments."""
    for adapter in adapters:
        _check(x, weight, adapter, bias)
    if segments.num_positions == 0:  # no adapter, or no row
        return F.linear(x, weight, bias)
    if autograd.autocast_enabled(x):
        x, weight, bias = _autocast(x, weight, bias)
    _check_one_dtype(x, weight, bias)
    if any(adapter.magnitude is not None for adapter in adapters):
        raise ValueError(
            "lora_mixed_batch: adapters: got one with a magnitude (DoRA), want plain ones: run its "
            "sequences in a batch of their own"
        )
    columns = zip(*(adapter[:4] for adapter in adapters), strict=True)
    lora_As, lora_Bs, scalings, dropout_ps = (list(several) for several in columns)
    fused = _takes_fused_path(x, weight, bias, *lora_As, *lora_Bs) and not torch.compiler.is_compiling()
    if not fused or weight.numel() == 0 or x.is_nested:
        return reference.mixed_batch_lora_linear(x, weight, adapters, segments.sequences, bias)
    widest = lora_As[0].dtype
    for factor in (*lora_As, *lora_Bs):
        widest = torch.promote_types(widest, factor.dtype)
    lora_As, lora_Bs = ([f.to(widest) for f in factors] for factors in (lora_As, lora_Bs))
    scales, ps = tuple(map(float, scalings)), tuple(dropout_ps)
    return segments_autograd.mixed_batch(x, weight, bias, lora_As, lora_Bs, scales, ps, segments, backend)


def open_group(
    x: Tensor, members: Sequence[group_dispatch.Member], shared_mask: bool = False
) -> group_autograd.SharedInput | None:
    """The shared part of a group, ready for its members to be called; None where they should run one by one (or where
    running one of them will say what is wrong)."""
    if len(members) < 2 or torch.compiler.is_compiling() or x.is_nested or x.dim() < 1:
        return None
    if x.device.type == "cpu" and x.numel() < group_autograd.SMALL * autograd.SMALL:
        return None
    tensors = [tensor for member in members for tensor in member[:4]]
    if not _takes_fused_path(x, *tensors):
        return None
    dtypes = {tensor.dtype for member in members for tensor in member[:2] if tensor is not None}
    dtype = x.dtype
    if autograd.autocast_enabled(x):
        if torch.float64 in dtypes or dtype == torch.float64:
            return None
        dtype = torch.get_autocast_dtype(x.device.type)
    elif dtypes != {dtype}:
        return None
    if any(member.weight.numel() == 0 or member.weight.shape[1] != x.shape[-1] for member in members):
        return None
    if any(tensor is not None and tensor.device != x.device for tensor in tensors):
        return None
    cast = x.to(dtype)
    choice = group_dispatch.select(cast.reshape(-1, cast.shape[-1]), members)
    if isinstance(choice, str):
        return None
    terms = [group_autograd.Term(member.lora_A, member.dropout_p) for member in members]
    return group_autograd.SharedInput(cast, terms, choice, shared_mask)


def as_one_adapter(adapters: Sequence[Adapter]) -> Adapter | None:
    """A layer's adapters as a single one, where its term is one product: not without adapters, nor where one of several
    drops something, nor with a magnitude."""
    if not adapters or (len(adapters) > 1 and any(adapter.dropout_p > 0.0 for adapter in adapters)):
        return None
    if any(adapter.magnitude is not None for adapter in adapters):
        return None
    return _concatenate(adapters)


def _with_one_mask(x: Tensor, layers: Sequence[GroupLayer], dropout_p: float) -> Iterator[Tensor]:
    dropped = F.dropout(x, dropout_p)
    for layer in layers:
        y = F.linear(x, layer.weight, layer.bias)
        for adapter in layer.adapters:
            s = F.linear(dropped.to(y.dtype), adapter.lora_A.to(y.dtype))
            y = y + F.linear(s, adapter.lora_B.to(y.dtype)) * adapter.scaling
        yield y


def _fused(x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, backend: str) -> Tensor:
    lora_A, lora_B, scaling, dropout_p, _, _ = adapter
    _check(x, weight, adapter, bias)
    if autograd.autocast_enabled(x):
        x, weight, bias = _autocast(x, weight, bias)
    _check_one_dtype(x, weight, bias)
    if weight.numel() == 0 or x.is_nested or not _takes_fused_path(x, weight, bias, lora_A, lora_B):
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    return autograd.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, backend)


def _check_one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        got = f"x {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ValueError(f"lora_linear: x, weight and bias: got {got}, want one dtype (adapters may have another)")


def _takes_fused_path(*tensors: Tensor | None) -> bool:
    """False for what sees into operations: tensor subclasses (DTensor, quantised weights), torch.func transforms,
    torch.jit.trace."""
    if torch.compiler.is_compiling():
        return not torch._C._are_functorch_transforms_active()
    for tensor in tensors:  # a loop: a generator costs every call half a microsecond
        if tensor is not None and type(tensor) not in _PLAIN_TENSORS:
            return False
    return not (torch._C._are_functorch_transforms_active() or torch.jit.is_tracing())


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to F.linear's arguments: floats, but not doubles, go to its dtype. Adapters are cast further
    down, in their kernels."""
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in (x, weight, bias)
    ]
    return cast[0], cast[1], cast[2]  # type: ignore[return-value]


def _concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """Several adapters without dropout as one of rank Σ rᵢ; scales that differ go into B."""
    if len(adapters) == 1:
        return adapters[0]
    scaling = adapters[0].scaling
    lora_A = torch.cat([adapter.lora_A for adapter in adapters])
    if all(adapter.scaling == scaling for adapter in adapters):
        return Adapter(lora_A, torch.cat([adapter.lora_B for adapter in adapters], dim=1), scaling)
    return Adapter(lora_A, torch.cat([adapter.lora_B * adapter.scaling for adapter in adapters], dim=1), 1.0)


def _low_rank_term(x: Tensor, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    dropped = F.dropout(x, adapter.dropout_p).to(dtype)
    return F.linear(F.linear(dropped, adapter.lora_A.to(dtype)), adapter.lora_B.to(dtype)) * adapter.scaling


def _check_probability(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"lora_linear: dropout_p: got {dropout_p}, want a probability in [0, 1]")


def _check(x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None) -> None:
    """Raises ValueError for what no backend could mean; cheap enough for every call (about 2 µs)."""
    lora_A, lora_B = adapter.lora_A, adapter.lora_B
    _check_probability(adapter.dropout_p)
    if x.dim() < 1 or weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            "lora_linear: dimensions: got "
            f"x {x.dim()}-D, weight {weight.dim()}-D, lora_A {lora_A.dim()}-D, lora_B {lora_B.dim()}-D, "
            "want x at least 1-D and the others 2-D"
        )
    n, k = weight.shape
    r = lora_A.shape[0]
    if x.size(-1) != k or lora_A.shape[1] != k or lora_B.shape[0] != n or lora_B.shape[1] != r or r < 1:
        raise ValueError(
            f"lora_linear: shapes: got x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_A {tuple(lora_A.shape)}, "
            f"lora_B {tuple(lora_B.shape)}, want x (..., K), weight (N, K), lora_A (r, K), lora_B (N, r) with r >= 1"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        raise ValueError(
            f"lora_linear: bias: got shape {tuple(bias.shape)}, want ({n},) to match weight {tuple(weight.shape)}"
        )
    device = x.device
    if (
        weight.device != device
        or lora_A.device != device
        or lora_B.device != device
        or (bias is not None and bias.device != device)
    ):
        raise ValueError(
            f"lora_linear: devices: got x on {device}, weight on {weight.device}, lora_A on {lora_A.device}, "
            f"lora_B on {lora_B.device}{'' if bias is None else f', bias on {bias.device}'}, want all on one: move the "
            "model, adapters included, with model.to(device)"
        )
    if not (x.is_floating_point() and lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise ValueError(
            f"lora_linear: dtypes: got x {x.dtype}, lora_A {lora_A.dtype}, lora_B {lora_B.dtype}, "
            "want floating-point tensors"
        )


# Below, because it is made of what is above.
from . import dora_functional  # noqa: E402
from .dora_functional import dora_linear as dora_linear  # noqa: E402
from .mlp_functional import lora_activated_linear as lora_activated_linear  # noqa: E402
from .mlp_functional import lora_mlp as lora_mlp  # noqa: E402
