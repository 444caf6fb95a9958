// Who runs an algorithm: the threads of a CUDA block, or the one thread of a CPU implementation.
//
// The algorithms (cholesky.h, householder.h, jacobi.h, skinny_gemm.h) are templates over a team: `threads` threads in
// `groups` of `lanes`. sync() makes what every thread wrote visible to all; sum() and max() go over the lanes of a
// group and give every lane the same value, but make nothing in memory visible. The tests add a third team, threads of the host with a barrier.
#pragma once

#include "host_device.h"

namespace fastlora {

struct OneThread {
  int thread() const { return 0; }
  int threads() const { return 1; }
  int group() const { return 0; }
  int groups() const { return 1; }
  int lane() const { return 0; }
  int lanes() const { return 1; }
  double sum(double value) const { return value; }
  double max(double value) const { return value; }
  void sync() const {}
};

#ifdef __CUDACC__

// One-dimensional blocks of whole warps; a group is a warp. On the host its functions are never called.
struct ThreadBlock {
  FASTLORA_HOST_DEVICE int thread() const {
#ifdef __CUDA_ARCH__
    return static_cast<int>(threadIdx.x);
#else
    return 0;
#endif
  }
  FASTLORA_HOST_DEVICE int threads() const {
#ifdef __CUDA_ARCH__
    return static_cast<int>(blockDim.x);
#else
    return 1;
#endif
  }
  FASTLORA_HOST_DEVICE int group() const { return thread() / lanes(); }
  FASTLORA_HOST_DEVICE int groups() const { return threads() / lanes(); }
  FASTLORA_HOST_DEVICE int lane() const { return thread() % lanes(); }
  FASTLORA_HOST_DEVICE int lanes() const { return 32; }

  // The butterfly adds in the same order in every lane and every run.
  FASTLORA_HOST_DEVICE double sum(double value) const {
#ifdef __CUDA_ARCH__
    FASTLORA_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
#endif
    return value;
  }

  FASTLORA_HOST_DEVICE double max(double value) const {
#ifdef __CUDA_ARCH__
    FASTLORA_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) value = fmax(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
#endif
    return value;
  }

  FASTLORA_HOST_DEVICE void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
};

#endif

}  // namespace fastlora
