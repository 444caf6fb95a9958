// The host side that the CPU and the CUDA implementation of fastlora::jacobi_svd share.
#pragma once

#include <tuple>

#include "jacobi.h"
#include "ops.h"
#include "skinny_gemm.h"

namespace fastlora {

// (u, s, v, info) for a (batch, rows, c): uninitialised, after the checks.
using SvdTensors = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

SvdTensors empty_svd(const torch::stable::Tensor& a);

// Matrix number `index` of a batch.
template <class T>
FASTLORA_HOST_DEVICE JacobiProblem<T> problem_of(const JacobiProblem<T>& batch, int64_t index) {
  const int64_t size = batch.rows * batch.c, square = static_cast<int64_t>(batch.c) * batch.c;
  return {batch.a + index * size, batch.u + index * size,  batch.s + index * batch.c,
          batch.v + index * square, batch.rows, batch.c};
}

template <class T>
JacobiProblem<T> batch_of(const torch::stable::Tensor& a, SvdTensors& out) {
  return {a.const_data_ptr<T>(),
          std::get<0>(out).mutable_data_ptr<T>(),
          std::get<1>(out).mutable_data_ptr<T>(),
          std::get<2>(out).mutable_data_ptr<T>(),
          a.size(1),
          static_cast<int>(a.size(2))};
}

// The bytes of JacobiMemory: norms first, for their alignment.
template <class T>
int64_t jacobi_bytes(int64_t rows, int c) {
  return static_cast<int64_t>(sizeof(double)) * c + sizeof(T) * (rows + c) * c + sizeof(int) * (c + kMaxGroups);
}

template <class T>
FASTLORA_HOST_DEVICE JacobiMemory<T> carve(void* memory, int64_t rows, int c) {
  double* norms = static_cast<double*>(memory);
  T* columns = reinterpret_cast<T*>(norms + c);
  T* v = columns + rows * c;
  int* order = reinterpret_cast<int*>(v + static_cast<int64_t>(c) * c);
  return {columns, v, norms, order, order + c};
}

}  // namespace fastlora
