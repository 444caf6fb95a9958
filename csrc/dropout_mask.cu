// fastlora::dropout_keep_mask on CUDA. It has been compiled for sm_80, sm_90a and sm_100 but has never run on a GPU.
#include "cuda_stream.h"
#include "dropout_mask_op.h"

#include <algorithm>

namespace fastlora {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// keep (M, K) bool, row-major. One thread makes the eight columns of one Philox call; block x is the row.
// The seed is read on the device: reading it back to the host would stall the stream and break graph capture.
__global__ void __launch_bounds__(kMaxThreads)
    dropout_keep_mask_kernel(const int64_t* __restrict__ seed, bool* __restrict__ keep, int64_t K, uint32_t threshold) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  const int64_t row = blockIdx.x;
  const int64_t calls = (K + kColumnsPerCall - 1) / kColumnsPerCall;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t call = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x; call < calls; call += stride) {
    const Words bits = dropout_bits(key, row, call);
    const int64_t column = call * kColumnsPerCall;
    bool* out = keep + row * K + column;
    if (K % kColumnsPerCall == 0) {
      // Rows begin on 8-byte boundaries: one 8-byte store instead of eight of one byte.
      uint64_t packed = 0;
#pragma unroll
      for (int piece = 0; piece < kColumnsPerCall; ++piece) {
        packed |= static_cast<uint64_t>(dropout_keeps(bits, piece, threshold)) << (8 * piece);
      }
      *reinterpret_cast<uint64_t*>(out) = packed;
    } else {
#pragma unroll
      for (int piece = 0; piece < kColumnsPerCall; ++piece) {
        if (column + piece < K) out[piece] = dropout_keeps(bits, piece, threshold);
      }
    }
  }
}

torch::stable::Tensor dropout_keep_mask_cuda(const torch::stable::Tensor& seed, int64_t M, int64_t K,
                                             int64_t threshold) {
  torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  torch::stable::Tensor out = empty_keep_mask(seed, M, K, threshold);
  if (out.numel() == 0) return out;
  const int64_t calls = (K + kColumnsPerCall - 1) / kColumnsPerCall;
  const int64_t threads = std::min<int64_t>(kMaxThreads, (calls + 31) / 32 * 32);
  const dim3 grid(static_cast<unsigned>(M), static_cast<unsigned>(std::min((calls + threads - 1) / threads, kMaxGridY)));
  dropout_keep_mask_kernel<<<grid, static_cast<unsigned>(threads), 0, current_stream(seed.get_device_index())>>>(
      seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<bool>(), K, static_cast<uint32_t>(threshold));
  check_launch("fastlora::dropout_keep_mask");
  return out;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("dropout_keep_mask", TORCH_BOX(&fastlora::dropout_keep_mask_cuda));
}
