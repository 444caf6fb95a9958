// One micro-batch of the streaming subspace iteration (fastlora/init/streaming.py is the specification), once for every
// device: an engine supplies the products, the orthonormal bases and the memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "ops.h"
#include "skinny_gemm.h"

namespace fastlora {

// What the ops report, as int32 (1,) on the tensors' device: 0, or these bits.
constexpr int32_t kCompleted = 1;  // columns were dependent: a basis came from Householder QR, completed
constexpr int32_t kNonFinite = 2;  // NaN or infinity: the results are not to be used, and nothing was written in place

// A read-only matrix of any strides.
struct Matrix {
  const void* data;
  torch::headeronly::ScalarType type;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, type, columns, rows, column_stride, row_stride}; }
};

Matrix matrix_of(const torch::stable::Tensor& tensor);
Matrix dense(const float* data, int64_t rows, int columns);

// Buffers of one update, (rows, c) fp32 each.
struct Buffers {
  float *tokens, *core, *left, *right, *product;
};

// The running sum's part that the bases hold: G ≈ Q Zᵀ. Null pointers where there is none.
struct Bases {
  const float *q, *z;
};

// out (n, c) = Q (Zᵀ v) + weight · dYᵀ (X v), for x (T, m), dy (T, n), v (m, c). G itself is never formed.
//
// An engine has multiply(a, b, columns, alpha, out): out = alpha · a b, and
// multiply_two(a, b, a2, b2, columns, out): out = a b + a2 b2, with a2 left out where it is null.
template <class Engine>
void apply(Engine& engine, const Buffers& buffers, const Matrix& x, const Matrix& dy, double weight, Bases bases,
           const float* v, int c, float* out) {
  engine.multiply(x, v, c, weight, buffers.tokens);
  if (bases.z == nullptr) {
    engine.multiply_two(dy.transposed(), buffers.tokens, nullptr, nullptr, c, out);
    return;
  }
  engine.multiply(dense(bases.z, x.columns, c).transposed(), v, c, 1.0, buffers.core);
  const Matrix q = dense(bases.q, dy.columns, c);
  engine.multiply_two(dy.transposed(), buffers.tokens, &q, buffers.core, c, out);
}

// start (m, c): what V's columns span at first; null for G⁺ᵀQ, which costs a fifth product. q (n, c) and z (m, c), zeros before the first micro-batch, are
// read here and written by engine.commit(), unless something was not finite.
template <class Engine>
void update_sketch(Engine& engine, const Buffers& buffers, float* q, float* z, const float* start, const Matrix& x,
                   const Matrix& dy, double weight, int c) {
  const int64_t n = dy.columns, m = x.columns;
  const Bases forward = {q, z}, backward = {z, q};
  if (start == nullptr) apply(engine, buffers, dy, x, weight, backward, q, c, buffers.product);
  engine.orthonormal(start == nullptr ? buffers.product : start, m, c, buffers.right);
  apply(engine, buffers, x, dy, weight, forward, buffers.right, c, buffers.product);
  engine.orthonormal(buffers.product, n, c, buffers.left);
  apply(engine, buffers, dy, x, weight, backward, buffers.left, c, buffers.product);
  engine.orthonormal(buffers.product, m, c, buffers.right);
  apply(engine, buffers, x, dy, weight, forward, buffers.right, c, buffers.product);
  engine.orthonormal(buffers.product, n, c, buffers.left);
  apply(engine, buffers, dy, x, weight, backward, buffers.left, c, buffers.product);
  engine.commit(buffers.left, n * c, q, buffers.product, m * c, z);
}

// The ops, over an engine made from a tensor of the device, the most rows of a product, the most rows of a basis, and c.
using torch::stable::Tensor;

void check_orthonormal(const Tensor& matrix);
void check_factors(const char* op, const Tensor& x, const Tensor& dy);
void check_product(const Tensor& x, const Tensor& dy, const Tensor& v);
void check_sketch(const Tensor& q, const Tensor& z, const std::optional<Tensor>& start, const Tensor& x,
                  const Tensor& dy);

template <class Engine>
std::tuple<Tensor, Tensor> orthonormal(const Tensor& matrix) {
  check_orthonormal(matrix);
  const int64_t n = matrix.size(0);
  const int c = static_cast<int>(matrix.size(1));
  Engine engine(matrix, 0, n, c);
  Tensor q = torch::stable::new_empty(matrix, {n, c});
  engine.orthonormal(matrix.const_data_ptr<float>(), n, c, q.mutable_data_ptr<float>());
  return {q, engine.status()};
}

template <class Engine>
Tensor factored_product(const Tensor& x, const Tensor& dy, const Tensor& v, double weight) {
  check_product(x, dy, v);
  const int64_t tokens = x.size(0), n = dy.size(1);
  const int c = static_cast<int>(v.size(1));
  Engine engine(v, std::max(tokens, n), 0, c);
  Tensor inner = torch::stable::new_empty(v, {tokens, c});
  Tensor out = torch::stable::new_empty(v, {n, c});
  const Buffers buffers = {inner.mutable_data_ptr<float>(), nullptr, nullptr, nullptr, nullptr};
  apply(engine, buffers, matrix_of(x), matrix_of(dy), weight, {nullptr, nullptr}, v.const_data_ptr<float>(), c,
        out.mutable_data_ptr<float>());
  return out;
}

template <class Engine>
Tensor sketch_update(Tensor q, Tensor z, const std::optional<Tensor>& start, const Tensor& x, const Tensor& dy,
                     double weight) {
  check_sketch(q, z, start, x, dy);
  const int64_t n = q.size(0), m = z.size(0), tokens = x.size(0), longest = std::max(n, m);
  const int c = static_cast<int>(q.size(1));
  Engine engine(q, std::max(longest, tokens), longest, c);
  Tensor memory = torch::stable::new_empty(q, {tokens + c + n + m + longest, c});
  Buffers buffers;
  buffers.tokens = memory.mutable_data_ptr<float>();
  buffers.core = buffers.tokens + tokens * c;
  buffers.left = buffers.core + static_cast<int64_t>(c) * c;
  buffers.right = buffers.left + n * c;
  buffers.product = buffers.right + m * c;
  const float* first = start.has_value() ? start->const_data_ptr<float>() : nullptr;
  update_sketch(engine, buffers, q.mutable_data_ptr<float>(), z.mutable_data_ptr<float>(), first, matrix_of(x),
                matrix_of(dy), weight, c);
  return engine.status();
}

}  // namespace fastlora
