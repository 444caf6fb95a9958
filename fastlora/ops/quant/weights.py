"""Frozen weights in 4 or 8 bits, and the floating-point matrix that a pass borrows of one.

A layer that multiplies with a quantised weight needs it as numbers twice a step, once a pass, and never in between. So
the matrix is written into a buffer that every layer uses in turn (`materialised`), and only the packed weight is kept
for the backward pass.

`snapshot(base, dtype)` knows bitsandbytes' Linear4bit (NF4 and FP4, with doubly quantised maxima) and Linear8bitLt, and
torchao's weight-only Int8Tensor and IntxUnpackedToInt8Tensor. Neither library is imported here: classes are known by
name, and a model that has them has imported them.

`fully_shard` keeps a weight's numbers and drops its class: while a module runs, its weight is a plain parameter. For 4
bits the layer holds what the numbers mean (`quant_state`), for 8 bits nothing does (`lost`).
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.trust import Trusted

FOUR_BIT = "bitsandbytes.nn.modules.Params4bit"
EIGHT_BIT = "bitsandbytes.nn.modules.Int8Params"
TORCHAO = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Elements written at a time on a CPU: what is made on the way (ATen casts whole operands there) stays in its cache.
PIECE = 1 << 17
NESTED_BLOCK = 256


class QuantisedWeight:
    """The packed tensors of one frozen weight (N, K), as they were when a pass began."""

    shape: tuple[int, int]
    dtype: torch.dtype  # of the matrix that `write` makes
    device: torch.device

    def write(self, out: Tensor) -> None:
        """Writes the weight into `out` (N, K), contiguous, of `dtype`."""
        raise NotImplementedError


class FourBitWeight(QuantisedWeight):
    """bitsandbytes' Params4bit."""

    def __init__(self, weight: Tensor, state: Any, dtype: torch.dtype) -> None:
        self.packed = weight.data
        # A copy, because bitsandbytes changes its own in place when it packs a weight for inference on a CPU.
        self.state = copy.copy(state)
        if not getattr(self.state, "packing_format_for_cpu", False):
            self.state.dtype = dtype
        self.shape, self.dtype, self.device = tuple(self.state.shape), dtype, weight.device

    def write(self, out: Tensor) -> None:
        if out.is_cuda and nf4_kernel_failure(out.device, out.dtype) is None:
            self.write_with_kernel(out)
        elif out.is_cuda:
            _bitsandbytes().dequantize_4bit(self.packed, self.state, out=out)
        else:
            packed, absmax = self._plain()
            _write_blocks(packed, absmax, self.state.blocksize, self.state.quant_type, out)

    def write_with_kernel(self, out: Tensor) -> None:
        """By kernels/nf4.py."""
        from ...kernels.nf4 import dequantise_4bit

        state, inner = self.state, {}
        if state.nested:
            inner = {"code2": state.state2.code, "absmax2": state.state2.absmax, "offset": state.offset}
        packed = self.packed.reshape(-1).view(torch.uint8)
        dequantise_4bit(packed, state.code, state.absmax, out, state.blocksize, **inner)

    def _plain(self) -> tuple[Tensor, Tensor]:
        """(packed bytes, fp32 maxima), on a CPU."""
        functional, state = _bitsandbytes(), self.state
        if getattr(state, "packing_format_for_cpu", False):  # after inference on a CPU with AVX512-BF16
            state = copy.copy(state)
            state.original_nested = False  # the inverse would quantise the maxima again, which are bf16 now
            packed, _ = functional._convert_weight_packed_for_cpu_inverse(self.packed, state)
            return packed.reshape(-1).view(torch.uint8), self.state.absmax.t().reshape(-1).float()
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        return self.packed.reshape(-1).view(torch.uint8), absmax.float()


class RowScaledWeight(QuantisedWeight):
    """int8 numbers (N, K) times one scale a row: bitsandbytes' Int8Params."""

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.numbers, self.scales = numbers, scales.unsqueeze(1) * (1.0 / 127.0)  # bitsandbytes' own order of rounding
        self.shape, self.dtype, self.device = (numbers.shape[0], numbers.shape[1]), dtype, numbers.device

    def write(self, out: Tensor) -> None:
        for rows in _pieces(out):
            torch.mul(self.numbers[rows], self.scales[rows], out=out[rows])


class TorchaoWeight(QuantisedWeight):
    """A tensor that can say what it stands for: torchao's, whose `dequantize` makes as much as it is asked for."""

    def __init__(self, weight: Any, dtype: torch.dtype) -> None:
        self.weight = weight.detach()
        self.shape, self.dtype, self.device = (weight.shape[0], weight.shape[1]), dtype, weight.device

    def write(self, out: Tensor) -> None:
        for rows in _pieces(out):
            out[rows].copy_(self.weight[rows].dequantize())


def kind_of(base: nn.Module) -> str | None:
    """The quantised weight's class, where `snapshot` knows it; None for any other layer."""
    weight = base._parameters.get("weight")
    if weight is None:
        return None
    if type(weight) is nn.Parameter:
        return FOUR_BIT if is_gathered(base) else None
    name = f"{type(weight).__module__}.{type(weight).__name__}"
    known = name in (FOUR_BIT, EIGHT_BIT) or (name.startswith("torchao.") and type(weight).__name__ in TORCHAO)
    return name if known else None


def is_gathered(base: Any) -> bool:
    """Whether the weight is a 4-bit one that `fully_shard` has put together, for as long as its module runs."""
    return type(base._parameters.get("weight")) is nn.Parameter and getattr(base, "quant_state", None) is not None


def lost(base: Any) -> str | None:
    """Why the numbers that `fully_shard` has put together stand for nothing, in any library; None where they do."""
    weight, kind = base._parameters.get("weight"), type(base).__name__
    if type(weight) is not nn.Parameter:
        return None
    if kind == "Linear8bitLt" and weight.dtype == torch.int8 and not hasattr(weight, "CB"):
        return "fully_shard has dropped the scales of its int8 weight; want 4 bits, or DistributedDataParallel"
    if is_gathered(base) and weight.dtype != base.quant_storage:
        return (
            f"its 4-bit weight is stored as {base.quant_storage}, and MixedPrecisionPolicy's param_dtype cast it to "
            f"{weight.dtype}; want quant_storage torch.uint8, or param_dtype's"
        )
    return None


def why_not(base: nn.Module) -> str | None:
    """None where `snapshot` gives the layer's weight now, or why it cannot."""
    kind = kind_of(base)
    if kind is None:
        return f"weight of class {type(base._parameters.get('weight')).__name__}: not a quantised one that is known"
    weight: Any = base._parameters["weight"]
    if weight.is_meta:
        return "its weight is not materialised"
    if kind == FOUR_BIT:
        return _why_not_four_bit(weight, _state(base))
    if kind == EIGHT_BIT:
        if weight.dtype != torch.int8:
            return "its weight is not quantised: it keeps 16 bits, or has not been moved to its device yet"
        return None if _scales(base) is not None else "its weight has no scales"
    if getattr(weight, "act_quant_kwargs", None) is not None or getattr(weight, "act_pre_scale", None) is not None:
        return "its inputs are quantised or scaled too"
    return "its inputs are quantised too" if getattr(weight, "activation_quantization", None) is not None else None


def snapshot(base: nn.Module, dtype: torch.dtype) -> QuantisedWeight:
    """The weight of a layer for which `why_not` is None, to be written out in `dtype`."""
    kind, weight = kind_of(base), base._parameters["weight"]
    assert weight is not None
    if kind == FOUR_BIT:
        return FourBitWeight(weight, _state(base), dtype)
    if kind == EIGHT_BIT:
        scales = _scales(base)
        assert scales is not None
        return RowScaledWeight(weight.data, scales.to(weight.device), dtype)
    return TorchaoWeight(weight, dtype)


def dequantised(base: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a quantised layer as floating-point numbers, in a tensor of its own; of any other layer, or one
    that is not quantised yet, its own weight. Of `dtype`, or the one it was quantised from (8-bit: float32)."""
    weight: Any = base._parameters["weight"]
    if kind_of(base) is None or why_not(base) is not None:
        return weight.detach()
    if dtype is None:
        dtype = _own_dtype(base)
    with torch.no_grad():
        known = snapshot(base, dtype)
        out = torch.empty(known.shape, dtype=dtype, device=known.device)
        known.write(out)
    return out


def _own_dtype(base: nn.Module) -> torch.dtype:
    weight: Any = base._parameters["weight"]
    if kind_of(base) == FOUR_BIT:
        return getattr(_state(base), "original_dtype", None) or _state(base).dtype
    return torch.float32 if kind_of(base) == EIGHT_BIT else weight.dtype


def _state(base: Any) -> Any:
    """What a 4-bit layer's packed numbers mean."""
    return base.quant_state if is_gathered(base) else base.weight.quant_state


def _why_not_four_bit(weight: Tensor, state: Any) -> str | None:
    if state is None:
        return "its weight is not quantised yet: that is done on the way to its device"
    if state.quant_type not in ("nf4", "fp4") or len(state.shape) != 2:
        return f"its weight is {state.quant_type} of shape {tuple(state.shape)}"
    if state.nested and state.state2.blocksize != NESTED_BLOCK:
        return f"its maxima are quantised in blocks of {state.state2.blocksize}"
    if 2 * weight.numel() * weight.element_size() < torch.Size(state.shape).numel():
        return "its weight is sharded or offloaded"
    return None


def _scales(base: Any) -> Tensor | None:
    return base.state.SCB if base.state.SCB is not None else base.weight.SCB  # the first forward moves them


def _write_blocks(packed: Tensor, absmax: Tensor, block: int, kind: str, out: Tensor) -> None:
    """bitsandbytes' CPU kernel, some blocks at a time, each as a row: for rows of the weight that are no whole number
    of blocks it is wrong (0.50.2)."""
    flat = out.view(-1)
    n = flat.numel()
    whole = n - n % block
    step = max(1, PIECE // block) * block
    dequantise = torch.ops.bitsandbytes.dequantize_4bit
    for start in range(0, whole, step):
        end = min(start + step, whole)
        shape = [(end - start) // block, block]
        part = dequantise(
            packed[start // 2 : end // 2], absmax[start // block : end // block], block, kind, shape, out.dtype
        )
        flat[start:end].view(shape).copy_(part)
    if whole < n:
        rest = dequantise(packed[whole // 2 :], absmax[whole // block :], block, kind, [1, n - whole], out.dtype)
        flat[whole:].copy_(rest.view(-1))


def _pieces(out: Tensor) -> Iterator[slice]:
    """All rows of `out`, some at a time on a CPU."""
    rows = len(out) if out.device.type != "cpu" else max(1, PIECE // max(1, out.shape[1]))
    for start in range(0, len(out), rows or 1):
        yield slice(start, start + rows)


def _bitsandbytes() -> Any:
    return sys.modules["bitsandbytes.functional"]


# Where the matrix lives.
class _Buffers:
    """One flat buffer for each device, stream and dtype, as large as the largest weight so far, lent to one borrower at
    a time: another thread that asks while it is out gets a new one, and the larger of the two is kept.

    On a GPU a buffer is handed to the next layer while the last one's product may still be running: work on one stream
    is done in order, so the key has the stream. While a CUDA graph is captured nothing is lent or kept, since what is
    allocated then belongs to the graph.
    """

    def __init__(self) -> None:
        self.free: dict[tuple, Tensor] = {}
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def lend(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        n = shape[0] * shape[1]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield torch.empty(shape, dtype=dtype, device=device)
            return
        key = (device, dtype, stream_of(device))
        with self.lock:
            buffer = self.free.pop(key, None)
        if buffer is None or buffer.numel() < n:
            del buffer  # before the larger one is there
            with torch.inference_mode(False):  # a tensor made within it could not be written to outside
                buffer = torch.empty(n, dtype=dtype, device=device)
        try:
            yield buffer[:n].view(shape)
        finally:
            with self.lock:
                kept = self.free.get(key)
                if kept is None or kept.numel() < buffer.numel():
                    self.free[key] = buffer

    def release(self) -> None:
        with self.lock:
            self.free.clear()


_buffers = _Buffers()


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU; 0 elsewhere."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextlib.contextmanager
def materialised(weight: QuantisedWeight) -> Iterator[Tensor]:
    """The weight as a matrix (N, K), for as long as the context lasts: kept longer, it holds another layer's."""
    with room_for(weight) as out:
        weight.write(out)
        yield out


def room_for(weight: QuantisedWeight) -> contextlib.AbstractContextManager[Tensor]:
    """A matrix (N, K) such as the weight would be written to, with anything in it."""
    return _buffers.lend(weight.shape, weight.dtype, weight.device)


def release_buffers() -> None:
    """Frees the buffers that dequantised weights are written to; the next pass allocates again."""
    _buffers.release()


_trusted = Trusted("the 4-bit kernel", "bitsandbytes' function runs instead")


def nf4_kernel_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where kernels/nf4.py has given bitsandbytes' own bits on this device; otherwise why it is not used."""
    return _trusted.why_not((device, dtype), lambda: compare_kernel(device, dtype))


def compare_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Both kinds of code and of maxima, on a weight that ends within a block: None, or what differs."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(77, 130, generator=generator).mul_(torch.rand(77, 1, generator=generator))
    with torch.inference_mode(False), torch.no_grad():
        for kind, nested in (("nf4", True), ("nf4", False), ("fp4", True)):
            functional = _bitsandbytes()
            packed, state = functional.quantize_4bit(
                numbers.to(device), blocksize=64, compress_statistics=nested, quant_type=kind
            )
            state.dtype = dtype
            out = torch.full((77, 130), float("nan"), dtype=dtype, device=device)
            FourBitWeight(packed, state, dtype).write_with_kernel(out)
            want = functional.dequantize_4bit(packed, state)
            if not torch.equal(out, want):
                return f"{kind}, {'doubly quantised' if nested else 'plain'} maxima: other numbers than bitsandbytes'"
    return None
