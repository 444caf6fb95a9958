// fastlora::jacobi_svd on CUDA, one block a matrix. Compiled for sm_80, sm_90a and sm_100; never run on a GPU.
#include "cuda_stream.h"
#include "jacobi_svd_op.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "fastlora::jacobi_svd";
constexpr int kJacobiThreads = 512;  // 16 warps: four pairs each at 128 columns
static_assert(kJacobiThreads / 32 <= kMaxGroups);

// spill: bytes_each of global memory per matrix, or null where shared memory holds them.
template <class T>
__global__ void __launch_bounds__(kJacobiThreads, 1)  // without the 1, 64 registers and spills
    jacobi_kernel(JacobiProblem<T> batch, char* spill, int64_t bytes_each, int32_t* info) {
  extern __shared__ double jacobi_shared[];
  void* memory = spill == nullptr ? static_cast<void*>(jacobi_shared) : spill + blockIdx.x * bytes_each;
  const ThreadBlock team;
  const int32_t result =
      jacobi_svd(problem_of(batch, blockIdx.x), carve<T>(memory, batch.rows, batch.c), team);
  if (team.thread() == 0) info[blockIdx.x] = result;
}

template <class T>
void decompose(const Tensor& a, SvdTensors& out) {
  const JacobiProblem<T> batch = batch_of<T>(a, out);
  const int64_t bytes = (jacobi_bytes<T>(batch.rows, batch.c) + 15) / 16 * 16;
  int most = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, a.get_device_index());
  const bool fits = error == cudaSuccess && bytes <= most;
  if (fits) {
    error = cudaFuncSetAttribute(jacobi_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  }
  STD_TORCH_CHECK(error == cudaSuccess, kOp, ": shared memory: ", cudaGetErrorString(error));
  Tensor spill = torch::stable::new_empty(a, {fits ? 0 : a.size(0) * bytes}, ScalarType::Byte);
  char* memory = fits ? nullptr : static_cast<char*>(spill.mutable_data_ptr());
  jacobi_kernel<T><<<static_cast<unsigned>(a.size(0)), kJacobiThreads, fits ? bytes : 0,
                     current_stream(a.get_device_index())>>>(batch, memory, bytes,
                                                             std::get<3>(out).mutable_data_ptr<int32_t>());
  check_launch(kOp);
}

SvdTensors jacobi_svd_cuda(const Tensor& a) {
  torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  SvdTensors out = empty_svd(a);
  if (a.size(0) == 0) return out;
  if (a.scalar_type() == ScalarType::Double) {
    decompose<double>(a, out);
  } else {
    decompose<float>(a, out);
  }
  return out;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("jacobi_svd", TORCH_BOX(&fastlora::jacobi_svd_cuda));
}
