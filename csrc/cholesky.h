// A triangular factor's inverse from a Gram matrix: what CholeskyQR multiplies by.
//
// With M (n, c), G = MᵀM, D = diag(G)^(1/2) and RᵀR = D⁻¹ G D⁻¹, the columns of M D⁻¹ R⁻¹ are orthonormal. The columns
// are scaled to norm 1 first because a factor of 1e6 between two of them is no ill-conditioning. In fp64 the loss of
// orthogonality is κ² 2⁻⁵³ (Yamamoto et al. 2015); past κ ≈ kMaxCondition the caller takes householder.h instead.
#pragma once

#include <cmath>
#include <cstdint>

#include "team.h"

namespace fastlora {

constexpr double kMaxCondition = 1e5;  // leaves 1e-6, fp32's own level; fastlora/linalg/orthogonal.py has the same

enum class Gram : int32_t { kGood = 0, kIllConditioned = 1, kNonFinite = 2 };

// w (c, c), row-major: the upper triangle holds G. It is overwritten: above the diagonal with R, below it with R⁻ᵀ, on
// it with the squares of R's diagonal. scale (c): 1 / D, 0 where D is 0. Every thread gets the same answer.
template <class Team>
FASTLORA_HOST_DEVICE Gram invert_factor(double* w, double* scale, int c, const Team& team) {
  bool finite = true;
  for (int j = 0; j < c; ++j) finite = finite && std::isfinite(w[j * c + j]);
  if (!finite) return Gram::kNonFinite;
  for (int j = team.thread(); j < c; j += team.threads()) {
    scale[j] = w[j * c + j] > 0 ? 1 / sqrt(w[j * c + j]) : 0;
  }
  team.sync();
  for (int e = team.thread(); e < c * c; e += team.threads()) {
    const int i = e / c, k = e % c;
    w[e] = k >= i ? w[e] * scale[i] * scale[k] : 0;
  }
  team.sync();
  double smallest = 1e300, largest = 0;
  for (int j = 0; j < c; ++j) {
    // The pivot itself is never overwritten: every thread reads it while others already scale its row.
    const double pivot = w[j * c + j];
    if (!(pivot > 0)) return Gram::kIllConditioned;
    const double root = sqrt(pivot), inverse = 1 / root;
    smallest = fmin(smallest, root);
    largest = fmax(largest, root);
    for (int k = team.thread(); k < c; k += team.threads()) {
      if (k != j) w[j * c + k] *= inverse;
    }
    team.sync();
    // The elimination of column j, on G's rest (k >= i) and on the identity that becomes R⁻ᵀ (k <= j).
    for (int e = team.thread(); e < (c - j - 1) * c; e += team.threads()) {
      const int i = j + 1 + e / c, k = e % c;
      if (k >= i) w[i * c + k] -= w[j * c + i] * w[j * c + k];
      if (k <= j) w[i * c + k] -= w[j * c + i] * (k == j ? inverse : w[j * c + k]);
    }
    team.sync();
  }
  return smallest * kMaxCondition > largest ? Gram::kGood : Gram::kIllConditioned;
}

// out (c, c), row-major: D⁻¹ R⁻¹, from what invert_factor left.
template <class Team>
FASTLORA_HOST_DEVICE void write_inverse(const double* w, const double* scale, int c, double* out, const Team& team) {
  for (int e = team.thread(); e < c * c; e += team.threads()) {
    const int i = e / c, j = e % c;
    const double inverse = i == j ? 1 / sqrt(w[e]) : (i < j ? w[j * c + i] : 0);
    out[e] = scale[i] * inverse;
  }
}

}  // namespace fastlora
