// out = alpha · a b for a long a (rows, depth) of any strides and a b (depth, columns) of at most 128 columns.
//
// A block makes a tile of kTileRows × kColumns of one part of the depth; the parts are summed in their order afterwards,
// so the result does not depend on which block finishes first. Each operand is cast to the accumulator's type on its
// way into shared memory: x and dY are read as they are, in bf16, fp16 or fp32. FMAs, no tensor cores: at 48 columns an
// element of a is used 48 times, 24 FLOP a byte in bf16, about an H200's ratio of fp32 FMAs to bandwidth.
#pragma once

#include <algorithm>
#include <cstdint>

#include "team.h"

namespace fastlora {

constexpr int kMaxColumns = 128;
constexpr int kTileRows = 64;
constexpr int kTileDepth = 32;
constexpr int kGemmThreads = 128;
constexpr int kRowsPerThread = 8;
constexpr int kRowPadding = 4;  // 4 ways of bank conflicts where a's depth is contiguous, and 16-byte loads all the same
constexpr int64_t kBlocksWanted = 264;  // two on each of an H200's 132 SMs; fixed, so that every GPU sums alike
constexpr int64_t kMinDepthOfPart = 256;
constexpr int64_t kMaxParts = 64;

template <class A, class B, class Out>
struct Product {
  const A* a;  // (rows, depth)
  int64_t a_row_stride, a_depth_stride;
  const B* b;  // (depth, columns), row-major
  Out* out;    // (parts, rows, columns), row-major
  int64_t rows, depth;
  int columns;
  int64_t depth_of_part;
  double alpha;
};

struct Parts {
  int64_t count, depth;
};

constexpr int tile_columns(int columns) {
  if (columns <= 32) return 32;
  return columns <= 48 || (columns > 64 && columns <= 96) ? 48 : 64;
}

inline Parts split_depth(int64_t rows, int columns, int64_t depth) {
  const int64_t tiles =
      (rows + kTileRows - 1) / kTileRows * ((columns + tile_columns(columns) - 1) / tile_columns(columns));
  const int64_t most = std::min(kMaxParts, (depth + kMinDepthOfPart - 1) / kMinDepthOfPart);
  const int64_t wanted = std::max<int64_t>(1, std::min(most, kBlocksWanted / tiles));
  const int64_t each = ((depth + wanted - 1) / wanted + kTileDepth - 1) / kTileDepth * kTileDepth;
  return {(depth + each - 1) / each, each};
}

template <int kColumns>
constexpr int kSharedElements = kTileDepth * (kTileRows + kRowPadding + kColumns);

// One tile of one part. shared: kSharedElements<kColumns> of Acc. The team has kGemmThreads threads.
template <int kColumns, class Acc, class A, class B, class Out, class Team>
FASTLORA_HOST_DEVICE void product_tile(const Product<A, B, Out>& p, int64_t tile_row, int tile_column, int64_t part,
                                       Acc* shared, const Team& team) {
  constexpr int kColumnGroups = kGemmThreads / (kTileRows / kRowsPerThread);
  constexpr int kColumnsPerThread = kColumns / kColumnGroups;
  constexpr int kStride = kTileRows + kRowPadding;
  Acc* a_tile = shared;                         // (kTileDepth, kStride)
  Acc* b_tile = shared + kTileDepth * kStride;  // (kTileDepth, kColumns)
  const int thread = team.thread();
  const int own_row = thread / kColumnGroups * kRowsPerThread;
  const int own_column = thread % kColumnGroups * kColumnsPerThread;
  const int64_t first_row = tile_row * kTileRows;
  const int first_column = tile_column * kColumns;
  const int64_t begin = part * p.depth_of_part;
  const int64_t end = begin + p.depth_of_part < p.depth ? begin + p.depth_of_part : p.depth;
  const bool along_depth = p.a_depth_stride == 1;  // neighbouring threads read neighbouring addresses
  Acc sum[kRowsPerThread][kColumnsPerThread] = {};
  for (int64_t start = begin; start < end; start += kTileDepth) {
    for (int e = thread; e < kTileRows * kTileDepth; e += kGemmThreads) {
      const int d = along_depth ? e % kTileDepth : e / kTileRows;
      const int r = along_depth ? e / kTileDepth : e % kTileRows;
      const int64_t row = first_row + r, k = start + d;
      const bool inside = row < p.rows && k < end;
      a_tile[d * kStride + r] =
          inside ? static_cast<Acc>(p.a[row * p.a_row_stride + k * p.a_depth_stride]) : static_cast<Acc>(0);
    }
    for (int e = thread; e < kTileDepth * kColumns; e += kGemmThreads) {
      const int64_t k = start + e / kColumns;
      const int column = first_column + e % kColumns;
      const bool inside = k < end && column < p.columns;
      b_tile[e] = inside ? static_cast<Acc>(p.b[k * p.columns + column]) : static_cast<Acc>(0);
    }
    team.sync();
    FASTLORA_UNROLL_4  // all 32 at once spill
    for (int d = 0; d < kTileDepth; ++d) {
      Acc a[kRowsPerThread], b[kColumnsPerThread];
      FASTLORA_UNROLL
      for (int i = 0; i < kRowsPerThread; ++i) a[i] = a_tile[d * kStride + own_row + i];
      FASTLORA_UNROLL
      for (int j = 0; j < kColumnsPerThread; ++j) b[j] = b_tile[d * kColumns + own_column + j];
      FASTLORA_UNROLL
      for (int i = 0; i < kRowsPerThread; ++i) {
        FASTLORA_UNROLL
        for (int j = 0; j < kColumnsPerThread; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    team.sync();
  }
  Out* out = p.out + part * p.rows * p.columns;
  FASTLORA_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int64_t row = first_row + own_row + i;
    FASTLORA_UNROLL
    for (int j = 0; j < kColumnsPerThread; ++j) {
      const int column = first_column + own_column + j;
      if (row < p.rows && column < p.columns) {
        out[row * p.columns + column] = static_cast<Out>(static_cast<Acc>(p.alpha) * sum[i][j]);
      }
    }
  }
}

// The whole product by one thread of a CPU, the depth in one part: a panel of rows stays in cache.
template <class Acc, class A, class B, class Out>
void product_on_cpu(const Product<A, B, Out>& p) {
  Acc sum[kTileRows][kMaxColumns];
  for (int64_t first = 0; first < p.rows; first += kTileRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, p.rows - first));
    for (int i = 0; i < rows; ++i) std::fill_n(sum[i], p.columns, static_cast<Acc>(0));
    for (int64_t k = 0; k < p.depth; ++k) {
      const B* b = p.b + k * p.columns;
      for (int i = 0; i < rows; ++i) {
        const Acc a = static_cast<Acc>(p.a[(first + i) * p.a_row_stride + k * p.a_depth_stride]);
        for (int j = 0; j < p.columns; ++j) sum[i][j] += a * static_cast<Acc>(b[j]);
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < p.columns; ++j) {
        p.out[(first + i) * p.columns + j] = static_cast<Out>(static_cast<Acc>(p.alpha) * sum[i][j]);
      }
    }
  }
}

}  // namespace fastlora
