// Householder QR in fp64 (Golub and Van Loan, §5.2): orthonormal columns whatever the rank, for when CholeskyQR is not
// safe. Slow on a GPU (one block, through global memory), and rare: fewer tokens than columns, an idle expert.
#pragma once

#include <cmath>
#include <cstdint>

#include "team.h"

namespace fastlora {

// Q (n, c) with orthonormal columns, of which the first span the columns of a; both row-major, n >= c.
// work (c, n): fp64. tau (c): fp64. scale (c): what each column is multiplied by first.
template <class Team>
FASTLORA_HOST_DEVICE void householder_q(const float* a, float* q, int64_t n, int c, const double* scale, double* work,
                                        double* tau, const Team& team) {
  for (int64_t e = team.thread(); e < n * c; e += team.threads()) {
    const int64_t i = e / c, j = e % c;
    work[j * n + i] = a[e] * scale[j];
  }
  team.sync();
  for (int j = 0; j < c; ++j) {
    double* v = work + j * n;
    if (team.group() == 0) {
      double tail = 0;
      for (int64_t i = j + 1 + team.lane(); i < n; i += team.lanes()) tail += v[i] * v[i];
      tail = team.sum(tail);
      const double alpha = v[j], norm = sqrt(alpha * alpha + tail);
      const double beta = alpha > 0 ? -norm : norm;
      for (int64_t i = j + 1 + team.lane(); i < n; i += team.lanes()) v[i] = norm > 0 ? v[i] / (alpha - beta) : 0;
      if (team.lane() == 0) tau[j] = norm > 0 ? (beta - alpha) / beta : 0;
    }
    team.sync();
    for (int k = j + 1 + team.group(); k < c; k += team.groups()) {
      double* column = work + k * n;
      double dot = team.lane() == 0 ? column[j] : 0;  // v[j] stands for 1
      for (int64_t i = j + 1 + team.lane(); i < n; i += team.lanes()) dot += v[i] * column[i];
      dot = tau[j] * team.sum(dot);
      for (int64_t i = j + 1 + team.lane(); i < n; i += team.lanes()) column[i] -= dot * v[i];
      if (team.lane() == 0) column[j] -= dot;
    }
    team.sync();
  }
  // H_0 … H_{c-1} on the first c columns of the identity, the last reflector first, in place.
  for (int j = c - 1; j >= 0; --j) {
    double* v = work + j * n;
    for (int k = j + 1 + team.group(); k < c; k += team.groups()) {
      double* column = work + k * n;
      double dot = 0;
      for (int64_t i = j + 1 + team.lane(); i < n; i += team.lanes()) dot += v[i] * column[i];
      dot = tau[j] * team.sum(dot);
      for (int64_t i = j + 1 + team.lane(); i < n; i += team.lanes()) column[i] -= dot * v[i];
      if (team.lane() == 0) column[j] = -dot;
    }
    team.sync();
    for (int64_t i = team.thread(); i < n; i += team.threads()) {
      v[i] = i < j ? 0 : (i == j ? 1 - tau[j] : -tau[j] * v[i]);
    }
    team.sync();
  }
  for (int64_t e = team.thread(); e < n * c; e += team.threads()) {
    q[e] = static_cast<float>(work[e % c * n + e / c]);
  }
}

}  // namespace fastlora
