// fastlora::dropout_keep_mask: the schema and the CPU implementation. The CUDA one is in dropout_mask.cu.
#include "dropout_mask_op.h"

#include <algorithm>

namespace fastlora {

torch::stable::Tensor empty_keep_mask(const torch::stable::Tensor& seed, int64_t M, int64_t K, int64_t threshold) {
  constexpr const char* op = "fastlora::dropout_keep_mask: ";
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == torch::headeronly::ScalarType::Long, op,
                  "seed has ", seed.numel(), " elements; wanted an int64 tensor of one");
  STD_TORCH_CHECK(M >= 0 && M <= INT32_MAX, op, "M is ", M, "; wanted 0 to 2^31 - 1");
  STD_TORCH_CHECK(K >= 0 && K <= INT32_MAX, op, "K is ", K, "; wanted 0 to 2^31 - 1");
  STD_TORCH_CHECK(threshold >= 0 && threshold <= kThresholdRange, op, "threshold is ", threshold,
                  "; wanted 0 to 65536, which is round(65536 p)");
  return torch::stable::new_empty(seed, {M, K}, torch::headeronly::ScalarType::Bool);
}

namespace {

torch::stable::Tensor dropout_keep_mask_cpu(const torch::stable::Tensor& seed, int64_t M, int64_t K,
                                            int64_t threshold) {
  torch::stable::Tensor out = empty_keep_mask(seed, M, K, threshold);
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  bool* keep = out.mutable_data_ptr<bool>();
  for (int64_t row = 0; row < M; ++row) {
    for (int64_t column = 0; column < K; column += kColumnsPerCall) {
      const Words bits = dropout_bits(key, row, column / kColumnsPerCall);
      const int pieces = static_cast<int>(std::min<int64_t>(kColumnsPerCall, K - column));
      for (int piece = 0; piece < pieces; ++piece) {
        keep[row * K + column + piece] = dropout_keeps(bits, piece, static_cast<uint32_t>(threshold));
      }
    }
  }
  return out;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora, m) {
  m.def("dropout_keep_mask(Tensor seed, SymInt M, SymInt K, int threshold) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("dropout_keep_mask", TORCH_BOX(&fastlora::dropout_keep_mask_cpu));
}
