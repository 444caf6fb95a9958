"""Quantised weights: what they stand for, and the buffer that they are written to."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from numerics import poisoned_empty
from quantised_models import bnb, quantised_linear
from torch import Tensor, nn

from fastlora.ops.quant import weights
from fastlora.ops.quant.weights import FourBitWeight, dequantised, materialised, snapshot

INT4: Any = getattr(torch, "int4", None)  # torch's own type stubs do not know it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _no_buffers():
    weights.release_buffers()
    yield
    weights.release_buffers()


def linear(n: int, k: int) -> nn.Linear:
    torch.manual_seed(n + k)
    return nn.Linear(k, n)


def written(base: nn.Module, dtype: torch.dtype) -> Tensor:
    known = snapshot(base, dtype)
    out = poisoned_empty(*known.shape, dtype=dtype)
    known.write(out)
    return out


def expected_4bit(layer: Any, dtype: torch.dtype) -> Tensor:
    """code · maximum in fp32, block by block."""
    packed, state = layer.weight.data, layer.weight.quant_state
    n = torch.Size(state.shape).numel()
    absmax = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * outer + state.offset
    packed = packed.reshape(-1).view(torch.uint8)
    nibbles = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n]
    values = state.code[nibbles.long()] * absmax.repeat_interleave(state.blocksize)[:n]
    return values.view(state.shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, k, options",
    [
        (48, 128, {}),
        (48, 128, {"compress_statistics": False}),
        (48, 128, {"quant_type": "fp4"}),
        (48, 128, {"quant_storage": torch.bfloat16}),
        (16, 96, {}),  # bitsandbytes' own CPU function has this one wrong
        (10, 30, {}),  # the last block is not full
        (300, 1024, {}),  # more than one piece, and more than 256 blocks
    ],
)
def test_4bit_weights(n, k, options, dtype):
    layer = quantised_linear(linear(n, k), 4, **options)
    got = written(layer, dtype)
    assert torch.equal(got, expected_4bit(layer, dtype))
    if k % 128 == 0:
        state = copy.copy(layer.weight.quant_state)
        state.dtype = dtype
        assert torch.equal(got, bnb.functional.dequantize_4bit(layer.weight.data, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_weights(dtype):
    layer = quantised_linear(linear(300, 1001), 8)
    for _ in range(2):  # before a forward, and after it: the layer moves its scales
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        want = layer.weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))  # as MatMul8bitFp does
        assert torch.equal(written(layer, dtype), want)
        layer(torch.randn(2, 1001))


def test_snapshot_is_of_the_weight_as_it_was():
    """bitsandbytes packs a weight, in place, when it infers on a CPU with AVX512-BF16."""
    layer = quantised_linear(linear(32, 64), 4)
    before, want = snapshot(layer, torch.float32), written(layer, torch.float32)
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    with materialised(before) as matrix:
        assert torch.equal(matrix, want)
    # What is packed has its maxima in bfloat16.
    now = written(layer, torch.float32)
    assert not torch.equal(now, want) and (now - want).abs().max() <= 2**-8 * want.abs().max()
    assert layer.weight.quant_state.packing_format_for_cpu


def test_what_is_not_known_is_named():
    plain = linear(4, 6)
    assert weights.kind_of(plain) is None and "class Parameter" in str(weights.why_not(plain))
    assert dequantised(plain).data_ptr() == plain.weight.data_ptr()
    fresh = bnb.nn.Linear4bit(64, 32)
    assert "not quantised yet" in str(weights.why_not(fresh))
    wide = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)
    assert "keeps 16 bits" in str(weights.why_not(wide))
    sharded = quantised_linear(linear(32, 64), 4)
    sharded.weight.data = sharded.weight.data[:7]
    assert "sharded" in str(weights.why_not(sharded))


# The buffer.
def test_one_buffer_for_all_layers():
    small, large = (snapshot(quantised_linear(linear(n, 64), 4), torch.float32) for n in (8, 32))
    places, storages = [], set()
    for weight in (large, small, large):
        with materialised(weight) as matrix:
            assert tuple(matrix.shape) == weight.shape and matrix.is_contiguous()
            places.append(matrix.data_ptr())
            storages.add(matrix.untyped_storage().nbytes())
    assert len(set(places)) == 1 and storages == {4 * 32 * 64}
    (kept,) = weights._buffers.free.values()
    assert kept.numel() == 32 * 64
    weights.release_buffers()
    assert not weights._buffers.free


def test_a_larger_weight_replaces_the_buffer():
    small, large = (snapshot(quantised_linear(linear(n, 64), 4), torch.float32) for n in (8, 32))
    for weight in (small, large):
        with materialised(weight):
            pass
    assert [buffer.numel() for buffer in weights._buffers.free.values()] == [32 * 64]


def test_a_buffer_is_lent_once_at_a_time():
    """Nested or in another thread, a second borrower writes elsewhere."""
    weight = snapshot(quantised_linear(linear(32, 64), 4), torch.float32)
    other = snapshot(quantised_linear(linear(16, 64), 4), torch.float32)
    with materialised(weight) as matrix:
        before = matrix.clone()

        def borrow():
            with materialised(other) as second:
                assert second.data_ptr() != matrix.data_ptr()

        thread = threading.Thread(target=borrow)
        thread.start()
        thread.join()
        borrow()
        assert torch.equal(matrix, before)
    assert [buffer.numel() for buffer in weights._buffers.free.values()] == [32 * 64]


def test_buffers_made_in_inference_mode_are_of_use_outside():
    weight = snapshot(quantised_linear(linear(32, 64), 4), torch.float32)
    with torch.inference_mode(), materialised(weight):
        pass
    with materialised(weight) as matrix:
        matrix.add_(1)


def test_a_buffer_comes_back_after_an_error():
    weight = snapshot(quantised_linear(linear(32, 64), 4), torch.float32)
    with pytest.raises(KeyError), materialised(weight):
        raise KeyError
    assert len(weights._buffers.free) == 1


def test_the_kernel_is_compared_before_it_is_used(monkeypatch):
    """On a GPU; here with a stand-in for the kernel, once right and once wrong by one bit of one number."""

    def right(self: FourBitWeight, out: Tensor) -> None:
        packed, absmax = self._plain()
        weights._write_blocks(packed, absmax, self.state.blocksize, self.state.quant_type, out)

    def wrong(self: FourBitWeight, out: Tensor) -> None:
        right(self, out)
        out.view(-1)[-1] *= 1 + 2**-7

    monkeypatch.setattr(FourBitWeight, "write_with_kernel", right)
    assert weights.compare_kernel(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(FourBitWeight, "write_with_kernel", wrong)
    assert "other numbers" in str(weights.compare_kernel(torch.device("cpu"), torch.bfloat16))


# torchao.
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weights(bits, dtype):
    torchao: Any = pytest.importorskip("torchao.quantization", reason="torchao is optional")
    layer = linear(300, 512).to(dtype)
    if bits == 8:
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    else:
        group = torchao.PerGroup(32)
        torchao.quantize_(layer, torchao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=group))
    assert weights.why_not(layer) is None
    weight: Any = layer.weight
    assert torch.equal(written(layer, dtype), weight.dequantize())
