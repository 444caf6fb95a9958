# pyright: reportArgumentType=false
# Triton types a constexpr parameter as `constexpr` and takes an int for it.

import math

import pytest
import torch
import triton
import triton.language as tl

from fastlora.kernels import dropout


@triton.jit
def _mask_kernel(
    seed_ptr, out_ptr, M, K, stride_m, threshold, row_offset, column_offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS
    seed = tl.load(seed_ptr)
    mask = dropout.keep_mask(seed, row_offset + row, column_offset + column, threshold, ROWS, COLUMNS)
    rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + rows * stride_m + columns, mask.to(tl.int8), mask=(rows < M) & (columns < K))


def mask_of_kernel(
    seed: int, M: int, K: int, p: float, tile: tuple[int, int] = (32, 64), start: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    out = torch.full((M, K), -1, dtype=torch.int8)
    threshold, _ = dropout.threshold_and_scale(p)
    grid = (triton.cdiv(M, tile[0]), triton.cdiv(K, tile[1]))
    _mask_kernel[grid](torch.tensor([seed]), out, M, K, K, threshold, *start, ROWS=tile[0], COLUMNS=tile[1])
    assert out.min() >= 0
    return out.bool()


def reference_bits(seed: int, row: int, column: int) -> int:
    """The 16 bits of one element, in Python integers, straight from Salmon et al., section 3.3."""
    c, k = [row, column // 8, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(7):
        product_0, product_2 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product_2 >> 32) ^ c[1] ^ k[0],
            product_2 & 0xFFFFFFFF,
            (product_0 >> 32) ^ c[3] ^ k[1],
            product_0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return int.from_bytes(b"".join(word.to_bytes(4, "little") for word in c), "little") >> (column % 8 * 16) & 0xFFFF


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 0x123456789ABCDEF])
def test_reference_is_philox_as_published(seed):
    mask = dropout.reference_keep_mask(torch.tensor([seed]), 5, 21, 0.3)
    threshold = round(0.3 * 65536)
    expected = [[reference_bits(seed, row, column) >= threshold for column in range(21)] for row in range(5)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("tile", [(16, 8), (32, 64), (64, 32)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_kernel_gives_the_reference_mask_for_every_tiling(tile, p):
    seed = 0xFEDCBA987654321
    mask = mask_of_kernel(seed, 67, 101, p, tile)
    assert torch.equal(mask, dropout.reference_keep_mask(torch.tensor([seed]), 67, 101, p))
    assert mask.any()
    assert not mask.all()


def test_mask_depends_on_the_position_and_not_on_the_tile():
    whole = mask_of_kernel(7, 64, 96, 0.5)
    assert torch.equal(mask_of_kernel(7, 32, 32, 0.5, (16, 32), start=(32, 64)), whole[32:, 64:])


def test_kept_fraction_is_within_four_sigma():
    for p in (0.05, 0.1, 0.5, 0.9):
        mask = dropout.reference_keep_mask(torch.tensor([1234]), 1000, 1000, p)
        sigma = math.sqrt(p * (1 - p) / mask.numel())
        assert abs(mask.double().mean().item() - (1 - p)) < 4 * sigma, p


def test_rows_columns_and_seeds_are_uncorrelated():
    size = 512
    masks = [dropout.reference_keep_mask(torch.tensor([seed]), size, size, 0.5).double() - 0.5 for seed in (5, 6)]
    # The product of two independent fair ±1/2 signs has mean 0 and standard deviation 1/4.
    bound = 4 * 0.25 / math.sqrt(size * size)
    assert abs((masks[0] * masks[1]).mean().item()) < bound, "neighbouring seeds"
    for shift in (1, 2, 3, 4, 7, 8, 16):
        for axis in (0, 1):
            neighbours = masks[0] * masks[0].roll(shift, axis)
            assert abs(neighbours.mean().item()) < bound, f"elements {shift} apart along axis {axis}"
    # No row and no column is special: the largest of 512 standard normals stays below 4.9 but once in a thousand.
    for axis in (0, 1):
        assert masks[0].mean(axis).abs().max().item() < 4.9 * 0.5 / math.sqrt(size)


def test_nothing_dropped_at_0_and_everything_at_1():
    assert mask_of_kernel(3, 33, 40, 0.0).all()
    assert not mask_of_kernel(3, 33, 40, 1.0).any()
    assert dropout.threshold_and_scale(0.0) == (0, 1.0)
    assert dropout.threshold_and_scale(1.0) == (65536, 0.0)


def test_the_scale_belongs_to_the_quantised_probability():
    for p in (1e-6, 0.1, 1 / 3, 0.999999):
        threshold, scale = dropout.threshold_and_scale(p)
        assert abs(threshold / 65536 - p) <= 2**-17
        assert scale == (65536 / (65536 - threshold) if threshold < 65536 else 0.0)


def test_new_seed_follows_torchs_generator():
    torch.manual_seed(11)
    first, second = dropout.new_seed(torch.device("cpu")), dropout.new_seed(torch.device("cpu"))
    torch.manual_seed(11)
    assert torch.equal(first, dropout.new_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
