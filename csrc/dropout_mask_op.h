// The host side that the CPU and the CUDA implementation of fastlora::dropout_keep_mask share.
#pragma once

#include "dropout_mask.h"
#include "ops.h"

namespace fastlora {

// Checks the arguments; returns an uninitialised (M, K) bool tensor on seed's device.
torch::stable::Tensor empty_keep_mask(const torch::stable::Tensor& seed, int64_t M, int64_t K, int64_t threshold);

}  // namespace fastlora
