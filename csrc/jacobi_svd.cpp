// fastlora::jacobi_svd: the schema and the CPU implementation. The CUDA one is in jacobi_svd.cu.
#include <memory>

#include "jacobi_svd_op.h"

namespace fastlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

SvdTensors empty_svd(const Tensor& a) {
  constexpr const char* op = "fastlora::jacobi_svd: ";
  STD_TORCH_CHECK(a.dim() == 3 && a.is_contiguous(), op, "wanted a contiguous tensor (batch, rows, columns)");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double, op,
                  "wanted float32 or float64");
  const int64_t batch = a.size(0), rows = a.size(1), c = a.size(2);
  STD_TORCH_CHECK(c >= 1 && c <= kMaxColumns && rows >= c, op, "matrices are ", rows, " x ", c, "; wanted 1 to ",
                  kMaxColumns, " columns, and at least as many rows");
  return {torch::stable::empty_like(a), torch::stable::new_empty(a, {batch, c}),
          torch::stable::new_empty(a, {batch, c, c}), torch::stable::new_empty(a, {batch}, ScalarType::Int)};
}

namespace {

template <class T>
void decompose(const Tensor& a, SvdTensors& out) {
  const JacobiProblem<T> batch = batch_of<T>(a, out);
  int32_t* info = std::get<3>(out).mutable_data_ptr<int32_t>();
  std::unique_ptr<double[]> memory(new double[(jacobi_bytes<T>(batch.rows, batch.c) + 7) / 8]);
  for (int64_t index = 0; index < a.size(0); ++index) {
    info[index] = jacobi_svd(problem_of(batch, index), carve<T>(memory.get(), batch.rows, batch.c), OneThread());
  }
}

SvdTensors jacobi_svd_cpu(const Tensor& a) {
  SvdTensors out = empty_svd(a);
  if (a.scalar_type() == ScalarType::Double) {
    decompose<double>(a, out);
  } else {
    decompose<float>(a, out);
  }
  return out;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora, m) {
  m.def("jacobi_svd(Tensor a) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("jacobi_svd", TORCH_BOX(&fastlora::jacobi_svd_cpu));
}
