// Transport problems on both instruction sets. Sums have other trees in wider packs, so that potentials agree to what
// rounding moves them by, not bit for bit.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/sinkhorn_newton_sparse/problem.h"

using namespace fusedopt;

namespace {

struct Solution {
  std::vector<double> f, g;
  TransportResult result;
};

Solution solve(const CpuKernels& kernels, const std::vector<double>& cost, int64_t n, int64_t m, double reg) {
  const std::vector<double> a(n, 1.0 / n), b(m, 1.0 / m);
  std::vector<char> memory(kernels.transport_workspace_bytes(n, m, false) + 64);
  Solution solution = {std::vector<double>(n), std::vector<double>(m), {}};
  void* const workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  TransportProblem problem = {};
  problem.cost = cost.data();
  problem.row_stride = m;
  problem.n = n;
  problem.m = m;
  problem.a = a.data();
  problem.b = b.data();
  problem.reg = reg;
  problem.tolerance = 1e-12;
  problem.max_iterations = 500;
  problem.threads = 1;
  std::vector<double> reached(m);
  const CostSummary summary = kernels.transport_inspect(problem, 0, n, reached.data());
  problem.range = summary.most - summary.least;
  solution.result.f = solution.f.data();
  solution.result.g = solution.g.data();
  kernels.transport_solve(problem, &solution.result, workspace);
  return solution;
}

bool near(double x, double y, double by) { return std::fabs(x - y) <= by; }

}  // namespace

int64_t transports_that_differ(int64_t* compared);
int64_t transports_that_differ(int64_t* compared) {
  std::mt19937 rng(5);
  std::uniform_real_distribution<double> uniform;
  const int64_t shapes[][2] = {{1, 1}, {3, 17}, {40, 33}, {64, 64}, {150, 170}};
  int64_t different = 0;
  for (const auto& [n, m] : shapes)
    for (double reg : {0.1, 1e-3, 1e-4}) {
      std::vector<double> cost(n * m);
      for (double& c : cost) c = uniform(rng);
      const Solution x = solve(avx2::kernels, cost, n, m, reg), y = solve(avx512::kernels, cost, n, m, reg);
      bool same = x.result.converged && y.result.converged && near(x.result.value, y.result.value, 1e-13);
      same &= near(x.result.cost, y.result.cost, 1e-10);
      ++*compared;
      if (same) continue;
      ++different;
      printf("transport differs: %ld x %ld, reg %g: %.17g %.17g, errors %g %g\n", long(n), long(m), reg, x.result.value,
             y.result.value, x.result.error, y.result.error);
    }
  return different;
}
