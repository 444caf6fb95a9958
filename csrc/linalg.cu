// fastlora::orthonormal, factored_product, sketch_update and lanczos_step on CUDA. Compiled for sm_80, sm_90a and
// sm_100; never run on a GPU.
#include "cholesky.h"
#include "cuda_stream.h"
#include "householder.h"
#include "lanczos.h"
#include "sketch.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "fastlora: linear algebra";
constexpr int kFactorThreads = 512;
constexpr int kPlainThreads = 256;
constexpr int64_t kMaxPlainBlocks = 1024;

// *route != 0: another kernel has written the result already.
template <int kColumns, class Acc, class A, class B, class Out>
__global__ void __launch_bounds__(kGemmThreads) product_kernel(Product<A, B, Out> p, const int32_t* route) {
  __shared__ alignas(16) Acc shared[kSharedElements<kColumns>];
  if (route != nullptr && *route != 0) return;
  product_tile<kColumns, Acc>(p, blockIdx.x, static_cast<int>(blockIdx.y), blockIdx.z, shared, ThreadBlock());
}

// out (size) = parts[0] + parts[1] + …, in this order.
__global__ void __launch_bounds__(kPlainThreads)
    sum_parts_kernel(const float* __restrict__ parts, int64_t count, int64_t size, float* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; e < size; e += stride) {
    float sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * size + e];
    out[e] = sum;
  }
}

// One block: the Gram matrix from its parts (count, c, c), then D⁻¹ R⁻¹ into inverse (c, c), or Q itself by Householder.
__global__ void __launch_bounds__(kFactorThreads)
    factor_kernel(const float* a, float* q, int64_t n, int c, const double* parts, int64_t count, double* inverse,
                  double* work, int32_t* route, int32_t* status) {
  extern __shared__ double factor_shared[];
  double *w = factor_shared, *scale = w + c * c, *tau = scale + c;
  const ThreadBlock team;
  for (int e = team.thread(); e < c * c; e += team.threads()) {
    double sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * c * c + e];
    w[e] = sum;
  }
  team.sync();
  const Gram kind = invert_factor(w, scale, c, team);
  if (kind == Gram::kGood) write_inverse(w, scale, c, inverse, team);
  if (kind == Gram::kIllConditioned) householder_q(a, q, n, c, scale, work, tau, team);
  if (team.thread() == 0) {
    *route = static_cast<int32_t>(kind);
    if (kind == Gram::kIllConditioned) *status |= kCompleted;
    if (kind == Gram::kNonFinite) *status |= kNonFinite;
  }
}

__global__ void __launch_bounds__(kPlainThreads)
    check_finite_kernel(const float* __restrict__ values, int64_t size, int32_t* status) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; e < size; e += stride) {
    if (!isfinite(values[e])) atomicOr(status, kNonFinite);
  }
}

__global__ void __launch_bounds__(kPlainThreads)
    commit_kernel(const float* __restrict__ values, int64_t size, float* __restrict__ out, const int32_t* status) {
  if (*status & kNonFinite) return;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; e < size; e += stride) {
    out[e] = values[e];
  }
}

unsigned plain_blocks(int64_t size) {
  return static_cast<unsigned>(std::min(kMaxPlainBlocks, (size + kPlainThreads - 1) / kPlainThreads));
}

class CudaEngine {
 public:
  CudaEngine(const Tensor& like, int64_t product_rows, int64_t basis_rows, int c)
      : guard_(like.get_device_index()),
        stream_(current_stream(like.get_device_index())),
        status_(torch::stable::new_zeros(like, {1}, ScalarType::Int)),
        route_(torch::stable::new_empty(like, {1}, ScalarType::Int)),
        // A product's parts have at most kBlocksWanted tiles where there are several; the second product adds a slot.
        parts_(torch::stable::new_empty(
            like, {product_rows ? (kBlocksWanted * kTileRows + 2 * product_rows) * c : 0}, ScalarType::Float)),
        gram_parts_(torch::stable::new_empty(like, {most_parts(basis_rows) * c * c}, ScalarType::Double)),
        inverse_(torch::stable::new_empty(like, {c, c}, ScalarType::Double)),
        work_(torch::stable::new_empty(like, {basis_rows * c}, ScalarType::Double)) {}

  Tensor status() const { return status_; }

  void multiply(const Matrix& a, const float* b, int columns, double alpha, float* out) {
    const Parts parts = split_depth(a.rows, columns, a.columns);
    float* target = parts.count == 1 ? out : parts_.mutable_data_ptr<float>();
    product_of(a, b, columns, alpha, target, parts);
    if (parts.count > 1) sum_parts(parts.count, a.rows * columns, out);
  }

  void multiply_two(const Matrix& a, const float* b, const Matrix* a2, const float* b2, int columns, float* out) {
    if (a2 == nullptr) return multiply(a, b, columns, 1.0, out);
    const Parts parts = split_depth(a.rows, columns, a.columns);
    float* target = parts_.mutable_data_ptr<float>();
    product_of(a, b, columns, 1.0, target, parts);
    product_of(*a2, b2, columns, 1.0, target + parts.count * a.rows * columns, {1, a2->columns});
    sum_parts(parts.count + 1, a.rows * columns, out);
  }

  // out = addend + a b: the addend is one more part.
  void multiply_add(const Matrix& a, const float* b, int columns, const float* addend, float* out) {
    const Parts parts = split_depth(a.rows, columns, a.columns);
    const int64_t size = a.rows * columns;
    float* target = parts_.mutable_data_ptr<float>();
    product_of(a, b, columns, 1.0, target, parts);
    copy_columns(addend, a.rows, columns, target + parts.count * size, columns);
    sum_parts(parts.count + 1, size, out);
  }

  // From (rows, columns) into columns of a wider matrix.
  void copy_columns(const float* from, int64_t rows, int columns, float* to, int64_t stride) {
    const cudaError_t error = cudaMemcpy2DAsync(to, stride * sizeof(float), from, columns * sizeof(float),
                                                columns * sizeof(float), rows, cudaMemcpyDeviceToDevice, stream_);
    STD_TORCH_CHECK(error == cudaSuccess, kOp, ": a copy failed: ", cudaGetErrorString(error));
  }

  void orthonormal(const float* a, int64_t n, int c, float* q) {
    const Parts parts = split_depth(c, c, n);
    double *gram_parts = gram_parts_.mutable_data_ptr<double>(), *inverse = inverse_.mutable_data_ptr<double>();
    int32_t *route = route_.mutable_data_ptr<int32_t>(), *flags = status_.mutable_data_ptr<int32_t>();
    launch<64, double>(Product<float, float, double>{a, 1, c, a, gram_parts, c, n, c, parts.depth, 1.0}, parts.count);
    const int bytes = (c * c + 2 * c) * static_cast<int>(sizeof(double));
    // The default limit is 48 KiB; 128 columns need 130.
    const cudaError_t error =
        cudaFuncSetAttribute(factor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    STD_TORCH_CHECK(error == cudaSuccess, kOp, ": ", c, " columns need ", bytes,
                    " bytes of shared memory: ", cudaGetErrorString(error));
    factor_kernel<<<1, kFactorThreads, bytes, stream_>>>(a, q, n, c, gram_parts, parts.count, inverse,
                                                         work_.mutable_data_ptr<double>(), route, flags);
    check_launch(kOp);
    launch<64, double>(Product<float, double, float>{a, c, 1, inverse, q, n, c, c, c, 1.0}, 1, route);
  }

  void commit(const float* left, int64_t left_size, float* q, const float* product, int64_t product_size, float* z) {
    int32_t* flags = status_.mutable_data_ptr<int32_t>();
    check_finite_kernel<<<plain_blocks(product_size), kPlainThreads, 0, stream_>>>(product, product_size, flags);
    commit_kernel<<<plain_blocks(left_size), kPlainThreads, 0, stream_>>>(left, left_size, q, flags);
    commit_kernel<<<plain_blocks(product_size), kPlainThreads, 0, stream_>>>(product, product_size, z, flags);
    check_launch(kOp);
  }

 private:
  static int64_t most_parts(int64_t rows) {
    return std::min(kMaxParts, (rows + kMinDepthOfPart - 1) / kMinDepthOfPart);
  }

  template <int kColumns, class Acc, class A, class B, class Out>
  void launch(const Product<A, B, Out>& p, int64_t parts, const int32_t* route = nullptr) {
    const dim3 grid(static_cast<unsigned>((p.rows + kTileRows - 1) / kTileRows),
                    static_cast<unsigned>((p.columns + kColumns - 1) / kColumns), static_cast<unsigned>(parts));
    product_kernel<kColumns, Acc><<<grid, kGemmThreads, 0, stream_>>>(p, route);
    check_launch(kOp);
  }

  void product_of(const Matrix& a, const float* b, int columns, double alpha, float* out, Parts parts) {
    switch (a.type) {
      case ScalarType::Half: return product_in<torch::headeronly::Half>(a, b, columns, alpha, out, parts);
      case ScalarType::BFloat16: return product_in<torch::headeronly::BFloat16>(a, b, columns, alpha, out, parts);
      default: return product_in<float>(a, b, columns, alpha, out, parts);
    }
  }

  template <class A>
  void product_in(const Matrix& a, const float* b, int columns, double alpha, float* out, Parts parts) {
    const Product<A, float, float> p{static_cast<const A*>(a.data), a.row_stride, a.column_stride, b, out, a.rows,
                                     a.columns, columns, parts.depth, alpha};
    switch (tile_columns(columns)) {
      case 32: return launch<32, float>(p, parts.count);
      case 48: return launch<48, float>(p, parts.count);
      default: return launch<64, float>(p, parts.count);
    }
  }

  void sum_parts(int64_t count, int64_t size, float* out) {
    sum_parts_kernel<<<plain_blocks(size), kPlainThreads, 0, stream_>>>(parts_.const_data_ptr<float>(), count, size, out);
    check_launch(kOp);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  Tensor status_, route_, parts_, gram_parts_, inverse_, work_;
};

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("orthonormal", TORCH_BOX(&fastlora::orthonormal<fastlora::CudaEngine>));
  m.impl("factored_product", TORCH_BOX(&fastlora::factored_product<fastlora::CudaEngine>));
  m.impl("sketch_update", TORCH_BOX(&fastlora::sketch_update<fastlora::CudaEngine>));
  m.impl("lanczos_step", TORCH_BOX(&fastlora::lanczos_step_op<fastlora::CudaEngine>));
}
