// Marks a function that g++ and nvcc compile from one text, so that what the CPU tests prove of it holds for the GPU.
#pragma once

#ifdef __CUDACC__
#define FASTLORA_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTLORA_UNROLL _Pragma("unroll")
#define FASTLORA_UNROLL_4 _Pragma("unroll 4")
#else
#define FASTLORA_HOST_DEVICE inline
#define FASTLORA_UNROLL
#define FASTLORA_UNROLL_4
#endif
