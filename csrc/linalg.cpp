// The schemas of fastlora::orthonormal, factored_product, sketch_update and lanczos_step, their checks, and the CPU
// implementations.
// The CUDA ones are in linalg.cu.
#include <memory>
#include <optional>
#include <tuple>

#include "cholesky.h"
#include "householder.h"
#include "lanczos.h"
#include "sketch.h"

namespace fastlora {

using torch::headeronly::ScalarType;

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

Matrix dense(const float* data, int64_t rows, int columns) {
  return {data, ScalarType::Float, rows, columns, columns, 1};
}

namespace {

void check_dense(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), op, ": ",
                  name, ": wanted a contiguous float32 matrix");
  STD_TORCH_CHECK(tensor.size(1) >= 1 && tensor.size(1) <= kMaxColumns, op, ": ", name, " has ", tensor.size(1),
                  " columns; wanted 1 to ", kMaxColumns);
}

void check_device(const char* op, const Tensor& tensor, const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), op,
                  ": the tensors are on several devices; wanted one");
}

bool is_readable(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

}  // namespace

void check_orthonormal(const Tensor& matrix) {
  check_dense("fastlora::orthonormal", "matrix", matrix);
  STD_TORCH_CHECK(matrix.size(0) >= matrix.size(1), "fastlora::orthonormal: matrix is ", matrix.size(0), " x ",
                  matrix.size(1), "; wanted at least as many rows as columns");
}

void check_factors(const char* op, const Tensor& x, const Tensor& dy) {
  STD_TORCH_CHECK(x.dim() == 2 && dy.dim() == 2 && x.size(0) == dy.size(0), op,
                  ": x, dy: wanted matrices (T, m) and (T, n) with one T");
  STD_TORCH_CHECK(x.numel() > 0 && dy.numel() > 0, op, ": x, dy: wanted at least one token and one feature");
  STD_TORCH_CHECK(is_readable(x.scalar_type()) && is_readable(dy.scalar_type()), op,
                  ": x, dy: wanted float32, float16 or bfloat16");
  check_device(op, x, dy);
}

void check_product(const Tensor& x, const Tensor& dy, const Tensor& v) {
  constexpr const char* op = "fastlora::factored_product";
  check_factors(op, x, dy);
  check_dense(op, "v", v);
  check_device(op, v, x);
  STD_TORCH_CHECK(v.size(0) == x.size(1), op, ": v has ", v.size(0), " rows; wanted x's ", x.size(1), " columns");
}

void check_sketch(const Tensor& q, const Tensor& z, const std::optional<Tensor>& start, const Tensor& x,
                  const Tensor& dy) {
  constexpr const char* op = "fastlora::sketch_update";
  check_factors(op, x, dy);
  check_dense(op, "q", q);
  check_dense(op, "z", z);
  check_device(op, q, x);
  check_device(op, z, x);
  const int64_t n = dy.size(1), m = x.size(1), c = q.size(1);
  STD_TORCH_CHECK(q.size(0) == n && z.size(0) == m && z.size(1) == c, op, ": q is ", q.size(0), " x ", c, " and z ",
                  z.size(0), " x ", z.size(1), "; wanted ", n, " x c and ", m, " x c");
  STD_TORCH_CHECK(c <= n && c <= m, op, ": ", c, " columns; wanted at most min(n, m) = ", std::min(n, m));
  if (!start.has_value()) return;
  check_dense(op, "start", *start);
  check_device(op, *start, x);
  STD_TORCH_CHECK(start->size(0) == m && start->size(1) == c, op, ": start is ", start->size(0), " x ", start->size(1),
                  "; wanted z's ", m, " x ", c);
}

void check_lanczos(const std::optional<Tensor>& x, const Tensor& y, const Tensor& us, const Tensor& zs, const Tensor& vs,
                   const Tensor& v, int64_t step) {
  constexpr const char* op = "fastlora::lanczos_step";
  if (x.has_value()) {
    check_factors(op, *x, y);
  } else {
    STD_TORCH_CHECK(y.dim() == 2 && y.numel() > 0 && is_readable(y.scalar_type()), op,
                    ": y: wanted a matrix (n, m) of float32, float16 or bfloat16 that is not empty");
  }
  check_dense(op, "v", v);
  const int64_t n = x.has_value() ? y.size(1) : y.size(0), m = x.has_value() ? x->size(1) : y.size(1), b = v.size(1);
  STD_TORCH_CHECK(v.size(0) == m && b <= std::min(n, m), op, ": v is ", v.size(0), " x ", b, "; wanted ", m,
                  " rows and at most ", std::min(n, m), " columns");
  const int64_t columns = us.dim() == 2 ? us.size(1) : 0;
  for (const auto& [name, tensor, rows] :
       {std::tuple{"us", &us, n}, std::tuple{"zs", &zs, m}, std::tuple{"vs", &vs, m}}) {
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                        tensor->size(0) == rows && tensor->size(1) == columns,
                    op, ": ", name, ": wanted a contiguous float32 matrix of ", rows, " rows and us's columns");
    check_device(op, v, *tensor);
  }
  STD_TORCH_CHECK(step >= 0 && (step + 1) * b <= columns, op, ": step ", step, " of ", b, " columns does not fit in us's ",
                  columns);
  check_device(op, v, y);
}

namespace {

class CpuEngine {
 public:
  CpuEngine(const Tensor& like, int64_t, int64_t, int c)
      : status_(torch::stable::new_zeros(like, {1}, ScalarType::Int)), gram_(new double[2 * c * c + 2 * c]) {}

  Tensor status() const { return status_; }

  void multiply(const Matrix& a, const float* b, int columns, double alpha, float* out) {
    switch (a.type) {
      case ScalarType::Half: return product<torch::headeronly::Half>(a, b, columns, alpha, out);
      case ScalarType::BFloat16: return product<torch::headeronly::BFloat16>(a, b, columns, alpha, out);
      default: return product<float>(a, b, columns, alpha, out);
    }
  }

  void multiply_two(const Matrix& a, const float* b, const Matrix* a2, const float* b2, int columns, float* out) {
    multiply(a, b, columns, 1.0, out);
    if (a2 == nullptr) return;
    std::unique_ptr<float[]> second(new float[a2->rows * columns]);
    multiply(*a2, b2, columns, 1.0, second.get());
    for (int64_t e = 0; e < a2->rows * columns; ++e) out[e] += second[e];
  }

  // out = addend + a b
  void multiply_add(const Matrix& a, const float* b, int columns, const float* addend, float* out) {
    multiply(a, b, columns, 1.0, out);
    for (int64_t e = 0; e < a.rows * columns; ++e) out[e] += addend[e];
  }

  // From (rows, columns) into columns of a wider matrix.
  void copy_columns(const float* from, int64_t rows, int columns, float* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * columns, columns, to + i * stride);
  }

  void orthonormal(const float* a, int64_t n, int c, float* q) {
    double *gram = gram_.get(), *inverse = gram + c * c, *scale = inverse + c * c, *tau = scale + c;
    product_on_cpu<double>(Product<float, float, double>{a, 1, c, a, gram, c, n, c, n, 1.0});
    const Gram kind = invert_factor(gram, scale, c, OneThread());
    if (kind == Gram::kNonFinite) {
      *flags() |= kNonFinite;
      std::fill_n(q, n * c, 0.0f);
    } else if (kind == Gram::kIllConditioned) {
      *flags() |= kCompleted;
      std::unique_ptr<double[]> work(new double[n * c]);
      householder_q(a, q, n, c, scale, work.get(), tau, OneThread());
    } else {
      write_inverse(gram, scale, c, inverse, OneThread());
      product_on_cpu<double>(Product<float, double, float>{a, c, 1, inverse, q, n, c, c, c, 1.0});
    }
  }

  void commit(const float* left, int64_t left_size, float* q, const float* product, int64_t product_size, float* z) {
    for (int64_t e = 0; e < product_size; ++e) {
      if (!std::isfinite(product[e])) *flags() |= kNonFinite;
    }
    if (*flags() & kNonFinite) return;
    std::copy_n(left, left_size, q);
    std::copy_n(product, product_size, z);
  }

 private:
  int32_t* flags() { return status_.mutable_data_ptr<int32_t>(); }

  template <class A>
  void product(const Matrix& a, const float* b, int columns, double alpha, float* out) {
    product_on_cpu<float>(Product<A, float, float>{static_cast<const A*>(a.data), a.row_stride, a.column_stride, b, out,
                                                   a.rows, a.columns, columns, a.columns, alpha});
  }

  Tensor status_;
  std::unique_ptr<double[]> gram_;
};

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora, m) {
  m.def("orthonormal(Tensor matrix) -> (Tensor, Tensor)");
  m.def("factored_product(Tensor x, Tensor dy, Tensor v, float weight) -> Tensor");
  m.def("sketch_update(Tensor(a!) q, Tensor(b!) z, Tensor? start, Tensor x, Tensor dy, float weight) -> Tensor");
  m.def(
      "lanczos_step(Tensor? x, Tensor y, Tensor(a!) us, Tensor(b!) zs, Tensor(c!) vs, Tensor(d!) v, int step) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("orthonormal", TORCH_BOX(&fastlora::orthonormal<fastlora::CpuEngine>));
  m.impl("factored_product", TORCH_BOX(&fastlora::factored_product<fastlora::CpuEngine>));
  m.impl("sketch_update", TORCH_BOX(&fastlora::sketch_update<fastlora::CpuEngine>));
  m.impl("lanczos_step", TORCH_BOX(&fastlora::lanczos_step_op<fastlora::CpuEngine>));
}
