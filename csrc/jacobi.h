// One-sided Jacobi SVD (Hestenes; Demmel and Veselić 1992): rotate pairs of columns until all are orthogonal.
//
// The pairs of a round are disjoint, one group of threads each; c - 1 rounds (the circle method) are a sweep. Measured on
// 128 columns: 9 to 12 sweeps for slow spectra, 10 to 20 for clusters, 20 (fp32) and 51 (fp64) where the singular values
// span more than the dtype's digits; at most 21 for the transposed triangle of a QR (Drmač and Veselić 2008), which the
// caller may give.
// Ordering the columns by norm while rotating doubled the sweeps. Dot products are taken in fp64. cuSOLVER's batched routine stops at 32 × 32; this one takes up to
// 128 columns, a block a matrix, every matrix of a batch in one launch.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "team.h"

namespace fastlora {

constexpr int kMaxSweeps = 60;
constexpr int kMaxGroups = 32;
// What jacobi_svd returns where it is not the number of sweeps.
constexpr int32_t kSvdNonFinite = -1;
constexpr int32_t kSvdNotConverged = -2;

template <class T>
constexpr double kEpsilon = sizeof(T) == sizeof(double) ? DBL_EPSILON : static_cast<double>(FLT_EPSILON);

// Memory of one decomposition, besides its results.
template <class T>
struct JacobiMemory {
  T* columns;    // (c, rows): A V, column by column
  T* v;          // (c, c): V, column by column
  double* norms; // (c)
  int* order;    // (c): the column that comes first, second, …
  int* flags;    // (kMaxGroups)
};

template <class T>
struct JacobiProblem {
  const T* a;  // (rows, c), row-major, rows >= c
  T* u;        // (rows, c), row-major, orthonormal columns
  T* s;        // (c), descending
  T* v;        // (c, c), row-major: a = u diag(s) vᵀ
  int64_t rows;
  int c;
};

// The two columns of pair k in a round: each of 2·⌈c/2⌉ meets each other once a sweep. second may be c, which is nobody.
struct Pair {
  int first, second;
};

FASTLORA_HOST_DEVICE Pair pair_of(int k, int round, int c) {
  const int others = (c + 1) / 2 * 2 - 1;
  const int a = k == 0 ? others : (round + k) % others;
  const int b = k == 0 ? round : (round - k + others) % others;
  return a < b ? Pair{a, b} : Pair{b, a};
}

// Makes columns x and y orthogonal; whether they were not. Columns whose squared norms are both at most `negligible` are
// rounding, and their angle means nothing.
template <class T, class Team>
FASTLORA_HOST_DEVICE bool rotate(T* x, T* y, int64_t rows, T* vx, T* vy, int c, double tolerance, double negligible,
                                 const Team& team) {
  double xx = 0, yy = 0, xy = 0;
  for (int64_t i = team.lane(); i < rows; i += team.lanes()) {
    const double p = x[i], q = y[i];
    xx += p * p;
    yy += q * q;
    xy += p * q;
  }
  xx = team.sum(xx);
  yy = team.sum(yy);
  xy = team.sum(xy);
  if (xx <= negligible && yy <= negligible) return false;
  if (!(fabs(xy) > tolerance * sqrt(xx) * sqrt(yy))) return false;
  const double zeta = (yy - xx) / (2 * xy);
  const double tangent = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const double cosine = 1 / sqrt(1 + tangent * tangent), sine = cosine * tangent;
  const T cs = static_cast<T>(cosine), sn = static_cast<T>(sine);
  for (int64_t i = team.lane(); i < rows; i += team.lanes()) {
    const T p = x[i], q = y[i];
    x[i] = cs * p - sn * q;
    y[i] = sn * p + cs * q;
  }
  for (int i = team.lane(); i < c; i += team.lanes()) {
    const T p = vx[i], q = vy[i];
    vx[i] = cs * p - sn * q;
    vy[i] = sn * p + cs * q;
  }
  return true;
}

// Replaces the column at place `done` by a unit vector orthogonal to the `done` columns before it in the order. By one group alone:
// every lane reads and writes its own rows only.
template <class T, class Team>
FASTLORA_HOST_DEVICE void complete(const JacobiMemory<T>& memory, int64_t rows, int done, int64_t& candidate,
                                   const Team& team) {
  T* x = memory.columns + memory.order[done] * rows;
  // A unit vector e_i whose part outside the span is at least half of the average: one exists.
  for (int64_t tried = 0; tried < rows; ++tried, candidate = (candidate + 1) % rows) {
    double inside = 0;
    if (candidate % team.lanes() == team.lane()) {
      for (int k = 0; k < done; ++k) {
        const double value = memory.columns[memory.order[k] * rows + candidate];
        inside += value * value;
      }
    }
    inside = team.sum(inside);
    if (2 * (1 - inside) * rows >= rows - done) break;
  }
  for (int64_t i = team.lane(); i < rows; i += team.lanes()) x[i] = static_cast<T>(i == candidate);
  for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan, Parlett)
    for (int k = 0; k < done; ++k) {
      const T* y = memory.columns + memory.order[k] * rows;
      double dot = 0;
      for (int64_t i = team.lane(); i < rows; i += team.lanes()) dot += static_cast<double>(x[i]) * y[i];
      dot = team.sum(dot);
      for (int64_t i = team.lane(); i < rows; i += team.lanes()) x[i] = static_cast<T>(x[i] - dot * y[i]);
    }
    double squares = 0;
    for (int64_t i = team.lane(); i < rows; i += team.lanes()) squares += static_cast<double>(x[i]) * x[i];
    const double inverse = 1 / sqrt(team.sum(squares));
    for (int64_t i = team.lane(); i < rows; i += team.lanes()) x[i] = static_cast<T>(x[i] * inverse);
  }
  candidate = (candidate + 1) % rows;
}

// 1 / the power of two that is in the largest entry, so that no square overflows; 0 where an entry is not finite.
template <class T, class Team>
FASTLORA_HOST_DEVICE double load_scaled(const JacobiProblem<T>& p, const JacobiMemory<T>& memory, const Team& team) {
  for (int j = team.group(); j < p.c; j += team.groups()) {
    double largest = 0;
    for (int64_t i = team.lane(); i < p.rows; i += team.lanes()) {
      const double value = fabs(static_cast<double>(p.a[i * p.c + j]));
      largest = fmax(largest, std::isfinite(value) ? value : HUGE_VAL);
    }
    largest = team.max(largest);
    if (team.lane() == 0) memory.norms[j] = largest;
  }
  team.sync();
  double largest = 0;
  for (int j = 0; j < p.c; ++j) largest = fmax(largest, memory.norms[j]);
  if (!std::isfinite(largest)) return 0;
  int exponent = 0;
  if (largest > 0) frexp(largest, &exponent);
  const double scale = ldexp(1.0, largest > 0 ? (exponent < -1022 ? 1023 : 1 - exponent) : 0);
  for (int64_t e = team.thread(); e < p.rows * p.c; e += team.threads()) {
    memory.columns[e % p.c * p.rows + e / p.c] = static_cast<T>(p.a[e] * scale);
  }
  for (int e = team.thread(); e < p.c * p.c; e += team.threads()) {
    memory.v[e] = static_cast<T>(e / p.c == e % p.c);
  }
  team.sync();
  return scale;
}

// norms[j] = ‖column j‖.
template <class T, class Team>
FASTLORA_HOST_DEVICE void measure_columns(const JacobiProblem<T>& p, const JacobiMemory<T>& memory, const Team& team) {
  for (int j = team.group(); j < p.c; j += team.groups()) {
    const T* x = memory.columns + j * p.rows;
    double squares = 0;
    for (int64_t i = team.lane(); i < p.rows; i += team.lanes()) squares += static_cast<double>(x[i]) * x[i];
    squares = team.sum(squares);
    if (team.lane() == 0) memory.norms[j] = sqrt(squares);
  }
  team.sync();
}

template <class T, class Team>
FASTLORA_HOST_DEVICE double frobenius_norm(const JacobiProblem<T>& p, const JacobiMemory<T>& memory, const Team& team) {
  measure_columns(p, memory, team);
  double squares = 0;
  for (int j = 0; j < p.c; ++j) squares += memory.norms[j] * memory.norms[j];
  return sqrt(squares);
}

// Sorts, normalises, completes U where singular values are zero, and writes the results.
template <class T, class Team>
FASTLORA_HOST_DEVICE void write_svd(const JacobiProblem<T>& p, const JacobiMemory<T>& memory, double scale,
                                    double null, const Team& team) {
  measure_columns(p, memory, team);
  for (int j = team.thread(); j < p.c; j += team.threads()) {
    int place = 0;
    for (int k = 0; k < p.c; ++k) {
      place += memory.norms[k] > memory.norms[j] || (memory.norms[k] == memory.norms[j] && k < j);
    }
    memory.order[place] = j;
    p.s[place] = static_cast<T>(memory.norms[j] / scale);
  }
  team.sync();
  for (int j = team.group(); j < p.c; j += team.groups()) {
    T* x = memory.columns + j * p.rows;
    if (!(memory.norms[j] > null)) continue;
    for (int64_t i = team.lane(); i < p.rows; i += team.lanes()) x[i] = static_cast<T>(x[i] / memory.norms[j]);
  }
  team.sync();
  if (team.group() == 0) {
    int64_t candidate = 0;
    for (int k = 0; k < p.c; ++k) {
      if (!(memory.norms[memory.order[k]] > null)) complete(memory, p.rows, k, candidate, team);
    }
  }
  team.sync();
  for (int64_t e = team.thread(); e < p.rows * p.c; e += team.threads()) {
    p.u[e] = memory.columns[memory.order[e % p.c] * p.rows + e / p.c];
  }
  for (int e = team.thread(); e < p.c * p.c; e += team.threads()) {
    p.v[e] = memory.v[memory.order[e % p.c] * p.c + e / p.c];
  }
}

// The number of sweeps, or one of the constants above; NaN results where the input was not finite.
template <class T, class Team>
FASTLORA_HOST_DEVICE int32_t jacobi_svd(const JacobiProblem<T>& p, const JacobiMemory<T>& memory, const Team& team) {
  const double scale = load_scaled(p, memory, team);
  if (scale == 0) {
    const T nan = static_cast<T>(NAN);
    for (int64_t e = team.thread(); e < p.rows * p.c; e += team.threads()) p.u[e] = nan;
    for (int e = team.thread(); e < p.c * p.c; e += team.threads()) p.v[e] = nan;
    for (int e = team.thread(); e < p.c; e += team.threads()) p.s[e] = nan;
    return kSvdNonFinite;
  }
  const double tolerance = kEpsilon<T> * sqrt(static_cast<double>(p.rows));
  // Below, a column is the rounding of longer ones, and its direction is made up in the end.
  const double null = 4 * kEpsilon<T> * frobenius_norm(p, memory, team), negligible = null * null;
  const int pairs = (p.c + 1) / 2;
  int sweep = 0;
  bool rotated = true;
  for (; rotated && sweep < kMaxSweeps; ++sweep) {
    bool own = false;
    for (int round = 0; round < 2 * pairs - 1; ++round) {
      for (int k = team.group(); k < pairs; k += team.groups()) {
        const Pair pair = pair_of(k, round, p.c);
        if (pair.second >= p.c) continue;
        own |= rotate(memory.columns + pair.first * p.rows, memory.columns + pair.second * p.rows, p.rows,
                      memory.v + pair.first * p.c, memory.v + pair.second * p.c, p.c, tolerance, negligible, team);
      }
      team.sync();
    }
    if (team.lane() == 0) memory.flags[team.group()] = own;
    team.sync();
    rotated = false;
    for (int group = 0; group < team.groups(); ++group) rotated |= memory.flags[group] != 0;
  }
  write_svd(p, memory, scale, null, team);
  return rotated ? kSvdNotConverged : sweep;
}

}  // namespace fastlora
