// The algorithms of csrc/'s headers, run by threads of the host as a CUDA block would run them: `groups` warps of
// `lanes` lanes each, with barriers where a block has them. tests/linalg/test_native.py calls these functions; with main()
// it is a program for -fsanitize=thread, which sees a missing sync().
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#include "cholesky.h"
#include "householder.h"
#include "jacobi.h"
#include "skinny_gemm.h"

namespace {

struct Shared {
  Shared(int groups, int lanes) : groups(groups), lanes(lanes), all(groups * lanes), slots(groups * lanes) {
    for (int group = 0; group < groups; ++group) warps.push_back(std::make_unique<std::barrier<>>(lanes));
  }
  int groups, lanes;
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<double> slots;
};

class HostTeam {
 public:
  HostTeam(Shared* shared, int index) : shared(shared), index(index) {}

  int thread() const { return index; }
  int threads() const { return shared->groups * shared->lanes; }
  int group() const { return index / shared->lanes; }
  int groups() const { return shared->groups; }
  int lane() const { return index % shared->lanes; }
  int lanes() const { return shared->lanes; }
  void sync() const { shared->all.arrive_and_wait(); }
  double sum(double value) const {
    return over_lanes(value, [](double a, double b) { return a + b; });
  }
  double max(double value) const {
    return over_lanes(value, [](double a, double b) { return std::fmax(a, b); });
  }

 private:
  template <class Join>
  double over_lanes(double value, Join join) const {
    std::barrier<>& warp = *shared->warps[group()];
    shared->slots[index] = value;
    warp.arrive_and_wait();
    double result = shared->slots[group() * lanes()];
    for (int lane = 1; lane < lanes(); ++lane) result = join(result, shared->slots[group() * lanes() + lane]);
    warp.arrive_and_wait();
    return result;
  }

  Shared* shared;
  int index;
};

template <class Work>
void run(int groups, int lanes, Work work) {
  Shared shared(groups, lanes);
  std::vector<std::thread> threads;
  for (int index = 0; index < groups * lanes; ++index) {
    threads.emplace_back([&, index] { work(HostTeam(&shared, index)); });
  }
  for (std::thread& thread : threads) thread.join();
}

template <int kColumns, class Acc, class B, class Out>
void product_as(fastlora::Product<float, B, Out> p, int64_t parts) {
  std::vector<Acc> memory(fastlora::kSharedElements<kColumns>);
  run(fastlora::kGemmThreads / 32, 32, [&](const HostTeam& team) {
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t row = 0; row * fastlora::kTileRows < p.rows; ++row) {
        for (int column = 0; column * kColumns < p.columns; ++column) {
          fastlora::product_tile<kColumns, Acc>(p, row, column, part, memory.data(), team);
          team.sync();  // between blocks
        }
      }
    }
  });
}

}  // namespace

extern "C" {

// 0, 1 or 2 (fastlora::Gram); inverse only where it is 0.
int invert_factor(double* w, double* scale, int c, double* inverse, int groups, int lanes) {
  std::vector<int> kinds(groups * lanes);
  run(groups, lanes, [&](const HostTeam& team) {
    const fastlora::Gram kind = fastlora::invert_factor(w, scale, c, team);
    kinds[team.thread()] = static_cast<int>(kind);
    if (kind == fastlora::Gram::kGood) fastlora::write_inverse(w, scale, c, inverse, team);
  });
  for (int kind : kinds) {
    if (kind != kinds[0]) return -1;
  }
  return kinds[0];
}

void householder_q(const float* a, float* q, int64_t n, int c, const double* scale, int groups, int lanes) {
  std::vector<double> work(n * c), tau(c);
  run(groups, lanes, [&](const HostTeam& team) {
    fastlora::householder_q(a, q, n, c, scale, work.data(), tau.data(), team);
  });
}

int64_t part_count(int64_t rows, int columns, int64_t depth) {
  return fastlora::split_depth(rows, columns, depth).count;
}

// out (parts, rows, columns) = alpha a b, by the tiles that CUDA blocks make.
void product(const float* a, int64_t row_stride, int64_t depth_stride, const float* b, float* out, int64_t rows,
             int64_t depth, int columns, double alpha) {
  const fastlora::Parts parts = fastlora::split_depth(rows, columns, depth);
  const fastlora::Product<float, float, float> p{a,     row_stride, depth_stride, b,           out,
                                                 rows, depth,      columns,      parts.depth, alpha};
  switch (fastlora::tile_columns(columns)) {
    case 32: return product_as<32, float>(p, parts.count);
    case 48: return product_as<48, float>(p, parts.count);
    default: return product_as<64, float>(p, parts.count);
  }
}

int jacobi_svd(const float* a, float* u, float* s, float* v, int64_t rows, int c, int groups, int lanes) {
  std::vector<float> columns(rows * c), rotations(c * c);
  std::vector<double> norms(c);
  std::vector<int> order(c), flags(fastlora::kMaxGroups), results(groups * lanes);
  run(groups, lanes, [&](const HostTeam& team) {
    const fastlora::JacobiMemory<float> memory{columns.data(), rotations.data(), norms.data(), order.data(), flags.data()};
    results[team.thread()] = fastlora::jacobi_svd(fastlora::JacobiProblem<float>{a, u, s, v, rows, c}, memory, team);
  });
  for (int result : results) {
    if (result != results[0]) return -100;
  }
  return results[0];
}

}  // extern "C"

#ifdef WITH_MAIN
int main() {
  const int n = 70, c = 33;
  std::vector<float> a(n * c), q(n * c), out(4 * n * c);
  for (int e = 0; e < n * c; ++e) a[e] = static_cast<float>(e * 2654435761u % 1000) / 1000 - 0.5f;
  std::vector<double> gram(c * c), scale(c, 1.0), inverse(c * c);
  for (int i = 0; i < c; ++i) {
    for (int j = 0; j < c; ++j) {
      for (int k = 0; k < n; ++k) gram[i * c + j] += static_cast<double>(a[k * c + i]) * a[k * c + j];
    }
  }
  const int kind = invert_factor(gram.data(), scale.data(), c, inverse.data(), 4, 2);
  householder_q(a.data(), q.data(), n, c, scale.data(), 4, 2);
  product(a.data(), 1, c, a.data(), out.data(), c, n, c, 1.0);
  std::vector<float> u(n * c), s(c), v(c * c);
  for (int k = 0; k < n; ++k) a[k * c + 5] = a[k * c + 7] = 0;  // two columns of U to be made up
  const int sweeps = jacobi_svd(a.data(), u.data(), s.data(), v.data(), n, c, 3, 2);
  return kind != 0 || sweeps <= 0;
}
#endif
