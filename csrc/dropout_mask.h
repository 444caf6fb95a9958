// The dropout mask of the Triton kernels (kernels/dropout.py is the specification), for host and device.
//
// One Philox call serves eight neighbouring columns of one row: element (row, column) owns the 16-bit piece number
// column % 8, in little-endian order, of the 128 bits for counter (row, column / 8, 0, 0), and is kept iff that piece is
// at least `threshold` = round(65536 p).
#pragma once

#include "philox.h"

namespace fastlora {

constexpr int kDropoutRounds = 7;
constexpr int kColumnsPerCall = 8;
constexpr int64_t kThresholdRange = 65536;

FASTLORA_HOST_DEVICE Words dropout_bits(uint64_t seed, int64_t row, int64_t call) {
  return philox4x32<kDropoutRounds>(seed, {{static_cast<uint32_t>(row), static_cast<uint32_t>(call), 0, 0}});
}

// Whether column 8 * call + piece is kept. threshold may be 65536 (nothing is), hence the 32-bit comparison.
FASTLORA_HOST_DEVICE bool dropout_keeps(const Words& bits, int piece, uint32_t threshold) {
  return ((bits.w[piece / 2] >> (16 * (piece % 2))) & 0xFFFFu) >= threshold;
}

}  // namespace fastlora
