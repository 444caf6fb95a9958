// One step of block Golub–Kahan–Lanczos (Golub and Van Loan, §10.4) with full reorthogonalisation, once for every device:
// the engines of sketch.h supply the products and the orthonormal bases.
//
// With U = [U₁ … U_s], V = [V₁ … V_s] of blocks of b columns, step j is
//     U_j = orth(G V_j − U Uᵀ G V_j)      Z_j = Gᵀ U_j      V_{j+1} = orth(Z_j − V Vᵀ Z_j)
// over the blocks so far. Z = GᵀU is kept: the SVD of Zᵀ is all that is left to do.
#pragma once

#include "sketch.h"

namespace fastlora {

// What the steps fill, row-major: u (n, s·b), z and v (m, s·b).
struct Krylov {
  float *u, *z, *v;
  int64_t columns;  // s·b
};

// Scratch of one step: tokens (T, b), core (s·b, b), block and product (max(n, m), b).
struct LanczosBuffers {
  float *tokens, *core, *block, *product;
};

// The first `done` columns of what Krylov holds.
inline Matrix leading(const float* data, int64_t rows, int64_t stride, int64_t done) {
  return {data, torch::headeronly::ScalarType::Float, rows, done, stride, 1};
}

// out (rows, b) = an orthonormal basis of what `product` (rows, b; overwritten) has outside of `basis`. Twice is enough
// (Kahan, Parlett): the first time may leave little but rounding.
template <class Engine>
void orthonormal_against(Engine& engine, const Matrix& basis, float* product, float* core, int b, float* out) {
  const int64_t rows = basis.rows;
  if (basis.columns == 0) return engine.orthonormal(product, rows, b, out);
  engine.multiply(basis.transposed(), product, b, -1.0, core);
  engine.multiply_add(basis, core, b, product, out);
  engine.orthonormal(out, rows, b, product);
  engine.multiply(basis.transposed(), product, b, -1.0, core);
  engine.multiply_add(basis, core, b, product, out);
  engine.orthonormal(out, rows, b, product);
  engine.copy_columns(product, rows, b, out, b);
}

// v (m, b): V_j, which is in krylov.v already; V_{j+1} afterwards, unless this was the last step. G = yᵀ x for x (T, m) and
// y (T, n), or y (n, m) itself where x is null.
template <class Engine>
void lanczos_step(Engine& engine, const LanczosBuffers& buffers, const Matrix* x, const Matrix& y, const Krylov& krylov,
                  float* v, int64_t step, int b) {
  const int64_t n = x ? y.columns : y.rows, m = x ? x->columns : y.columns, stride = krylov.columns;
  const Bases none = {nullptr, nullptr};
  const Buffers inner = {buffers.tokens, nullptr, nullptr, nullptr, nullptr};
  if (x) {
    apply(engine, inner, *x, y, 1.0, none, v, b, buffers.product);
  } else {
    engine.multiply(y, v, b, 1.0, buffers.product);
  }
  orthonormal_against(engine, leading(krylov.u, n, stride, step * b), buffers.product, buffers.core, b, buffers.block);
  engine.copy_columns(buffers.block, n, b, krylov.u + step * b, stride);
  if (x) {
    apply(engine, inner, y, *x, 1.0, none, buffers.block, b, buffers.product);
  } else {
    engine.multiply(y.transposed(), buffers.block, b, 1.0, buffers.product);
  }
  engine.copy_columns(buffers.product, m, b, krylov.z + step * b, stride);
  if ((step + 1) * b >= stride) return;
  orthonormal_against(engine, leading(krylov.v, m, stride, (step + 1) * b), buffers.product, buffers.core, b, v);
  engine.copy_columns(v, m, b, krylov.v + (step + 1) * b, stride);
}

void check_lanczos(const std::optional<Tensor>& x, const Tensor& y, const Tensor& us, const Tensor& zs, const Tensor& vs,
                   const Tensor& v, int64_t step);

template <class Engine>
Tensor lanczos_step_op(const std::optional<Tensor>& x, const Tensor& y, Tensor us, Tensor zs, Tensor vs, Tensor v,
                       int64_t step) {
  check_lanczos(x, y, us, zs, vs, v, step);
  const int64_t n = us.size(0), m = v.size(0), columns = us.size(1), longest = std::max(n, m);
  const int64_t tokens = x.has_value() ? x->size(0) : 0;
  const int b = static_cast<int>(v.size(1));
  Engine engine(v, std::max({longest, tokens, columns}), longest, b);
  Tensor memory = torch::stable::new_empty(v, {tokens + columns + 2 * longest, b});
  LanczosBuffers buffers;
  buffers.tokens = memory.mutable_data_ptr<float>();
  buffers.core = buffers.tokens + tokens * b;
  buffers.block = buffers.core + columns * b;
  buffers.product = buffers.block + longest * b;
  const Krylov krylov = {us.mutable_data_ptr<float>(), zs.mutable_data_ptr<float>(), vs.mutable_data_ptr<float>(), columns};
  const Matrix rows = x.has_value() ? matrix_of(*x) : Matrix{};
  lanczos_step(engine, buffers, x.has_value() ? &rows : nullptr, matrix_of(y), krylov, v.mutable_data_ptr<float>(), step,
               b);
  return engine.status();
}

}  // namespace fastlora
