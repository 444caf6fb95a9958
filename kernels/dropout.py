"""Dropout's mask, made again wherever it is needed instead of being stored.

Element (row, column) of x (M, K) is kept iff its 16 random bits are at least `threshold`:

    words     = Philox4x32, 7 rounds: key     = (seed & 0xffffffff, seed >> 32)
                                      counter = (row, column // 8, 0, 0)
    bits      = 16-bit piece number column % 8 of the 128 random bits, in little-endian order:
                word (column % 8) // 2, its low half where column % 2 == 0 and its high half where it is 1
    kept      iff bits >= threshold, threshold = round(65536·p)
    scale     = 65536 / (65536 - threshold), or 0 where threshold is 65536

The scale belongs to the quantised probability, so that the expectation of drop(x) is exactly x. One Philox call
serves eight neighbouring columns of one row, and nothing in the counter depends on a tile: every kernel, whatever its
blocks, sees the same mask. `seed` is an int64 tensor of one element that stays on the device; nothing is read back to
the host.

Seven rounds are the fewest with which Philox4x32 passes BigCrush (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011, table 2); the customary ten cost 40 % more integer work for a margin that dropout has no use for.
"""

import torch
import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)

_RANGE = 1 << 16


@triton.jit
def keep_mask(seed, row_start, column_start, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """True where elements [row_start, row_start + ROWS) × [column_start, column_start + COLUMNS) are kept.

    seed: the int64 scalar loaded from the seed tensor; column_start and COLUMNS: multiples of 8.
    """
    CALLS: tl.constexpr = COLUMNS // 8  # 128 random bits are eight times 16
    zero = tl.zeros((ROWS, CALLS), dtype=tl.int32)
    rows = zero + (row_start + tl.arange(0, ROWS))[:, None]
    calls = zero + (column_start // 8 + tl.arange(0, CALLS))[None, :]
    w0, w1, w2, w3 = tl.philox(seed, rows, calls, zero, zero, PHILOX_ROUNDS)
    # tl.join adds an innermost axis of two: the first join is the outermost bit of column % 8, the last the innermost.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (ROWS, COLUMNS)).to(tl.int32) >= threshold


def threshold_and_scale(p: float) -> tuple[int, float]:
    """What the kernels need of a dropout probability: an element is kept iff its 16 bits are >= threshold."""
    threshold = round(p * _RANGE)
    return threshold, _RANGE / (_RANGE - threshold) if threshold < _RANGE else 0.0


def new_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed from torch's generator on `device`, left there: (1,) int64."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def _multiply(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a·constant, held in int64. The product wraps modulo 2^64, so its 64 bits are right."""
    product = a * constant
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def reference_keep_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """The same mask in plain torch: (M, K) bool on seed's device. The specification the kernels are compared with."""
    calls = -(-K // 8)
    zero = torch.zeros(M, calls, dtype=torch.int64, device=seed.device)
    c0 = zero + torch.arange(M, device=seed.device)[:, None]
    c1 = zero + torch.arange(calls, device=seed.device)[None, :]
    c2, c3 = zero, zero
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS.value):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(M, -1)[:, :K]
    return bits >= threshold_and_scale(p)[0]
