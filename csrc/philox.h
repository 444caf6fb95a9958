// Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for host and device from one text.
//
// g++ and nvcc compile the same functions, so what the CPU tests prove of them holds for the GPU. Word for word what
// Triton's tl.philox computes: key = (low half of seed, high half of seed), and the four counter words as given.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastlora {

struct Words {
  uint32_t w[4];
};

FASTLORA_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// 128 random bits for one counter. Rounds is a template argument so that the loop unrolls into registers.
template <int Rounds>
FASTLORA_HOST_DEVICE Words philox4x32(uint64_t seed, Words counter) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  FASTLORA_UNROLL
  for (int round = 0; round < Rounds; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high2 = multiply_high(0xCD9E8D57u, c2), low2 = 0xCD9E8D57u * c2;
    c0 = high2 ^ c1 ^ key0;
    c1 = low2;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastlora
