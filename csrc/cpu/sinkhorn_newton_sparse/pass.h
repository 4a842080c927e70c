// The fused pass: one read of the cost gives f, the column sums and the plan's larger entries (math/…/.h has the
// formulas). A row is written to cache once as slack, turned into entries in place, and added to the columns.
#pragma once
#include "cpu/sinkhorn_newton_sparse/problem.h"
#include "cpu/sinkhorn_newton_sparse/workspace.h"
#include "cpu/threads.h"
#include "math/sinkhorn_newton_sparse.h"

namespace fusedopt::FUSEDOPT_TARGET {

using D = Pack<double>;
constexpr int kLanes = D::kLanes;
constexpr int kGroup = 2 * kLanes;

FUSEDOPT_INLINE double smaller(double a, double b) { return a < b ? a : b; }
FUSEDOPT_INLINE double larger(double a, double b) { return a > b ? a : b; }

struct PassOptions {
  double reg;
  double keep;   // keep entries from this share of their row's or column's mass on; 0: keep none
  double relax;  // f moves by this much of the way to its exact value; 1: all of it
};

// slack_j = g_j - C_ij for one row, padded with -inf; returns the largest.
template <typename T>
FUSEDOPT_INLINE double row_slack(const T* cost, const double* g, int64_t m, int64_t mp, double* slack) {
  D most0(-__builtin_inf()), most1 = most0;
  int64_t j = 0;
  for (; j + kGroup <= m; j += kGroup) {
    const D s0 = load(g + j) - load(cost + j), s1 = load(g + j + kLanes) - load(cost + j + kLanes);
    store(slack + j, s0);
    store(slack + j + kLanes, s1);
    most0 = larger(s0, most0);
    most1 = larger(s1, most1);
  }
  double most = max_lanes(larger(most0, most1));
  for (; j < m; ++j) {
    slack[j] = g[j] - double(cost[j]);
    most = slack[j] > most ? slack[j] : most;
  }
  for (; j < mp; ++j) slack[j] = -__builtin_inf();
  return most;
}

// Turns slack into entries over the row's largest; lists the groups that have any, and returns their sum.
FUSEDOPT_INLINE double row_entries(double* slack, int64_t mp, double largest, double inverse_reg, int32_t* live,
                                   int64_t* live_count) {
  const D top(largest), scale(inverse_reg), cut(-kCut), zero(0.0);
  D sum0(0.0), sum1(0.0);
  int64_t count = 0;
  for (int64_t j = 0; j < mp; j += kGroup) {
    const D x0 = relative_exponent(load(slack + j), top, scale);
    const D x1 = relative_exponent(load(slack + j + kLanes), top, scale);
    if (!any_at_least(larger(x0, x1), cut)) continue;
    live[count++] = int32_t(j);
    const D e0 = select_less(x0, cut, zero, exp_within_range<double>(larger(x0, cut)));
    const D e1 = select_less(x1, cut, zero, exp_within_range<double>(larger(x1, cut)));
    store(slack + j, e0);
    store(slack + j + kLanes, e1);
    sum0 = sum0 + e0;
    sum1 = sum1 + e1;
  }
  *live_count = count;
  return sum_lanes(sum0 + sum1);
}

class Pass {
 public:
  Pass(const TransportProblem& problem, const Workspace& work) : p_(problem), w_(work) {}

  // Marginals and their logarithms into the workspace, and g (zeros where there is none), padded; returns the mass.
  double load_problem(const double* g) const {
    double mass = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      mass += p_.a[i];
      w_.log_a[i] = log(p_.a[i]);
      w_.f[i] = 0;
    }
    for (int64_t j = 0; j < w_.mp; ++j) {
      w_.b[j] = j < p_.m ? p_.b[j] : 0;
      w_.log_b[j] = log(w_.b[j]);
      w_.g[j] = w_.b[j] > 0 ? (g ? g[j] : 0) : -__builtin_inf();
    }
    return mass;
  }

  // f, w.columns, and the blocks if asked for, at w.g.
  void run(const PassOptions& options) const {
    parallel_for(w_.chunks, p_.threads,
                 [&](int64_t chunk) { p_.single ? rows<float>(options, chunk) : rows<double>(options, chunk); });
    add_partials(w_.columns);
  }

  // Row and column sums, cost and mass of the plan that f and g give, as a user would compute it. Rows' errors add up
  // to the return value; w.columns holds the columns.
  double measure(double reg, double* cost, double* mass) const {
    parallel_for(w_.chunks, p_.threads,
                 [&](int64_t chunk) { p_.single ? plan_rows<float>(reg, chunk) : plan_rows<double>(reg, chunk); });
    add_partials(w_.columns);
    double error = 0;
    *cost = *mass = 0;
    for (int64_t i = 0; i < p_.n; ++i) {  // plan_rows left sum and cost of each row
      const double difference = w_.row_error[i] - p_.a[i];
      error += difference < 0 ? -difference : difference;
      *mass += w_.row_error[i];
      *cost += w_.old_f[i];
    }
    return error;
  }

  // The largest of f_i - C_ij in a column.
  double column_top(int64_t j) const {
    double most = -__builtin_inf();
    for (int64_t i = 0; i < p_.n; ++i) {
      const int64_t at = i * p_.row_stride + j;
      const double c =
          p_.single ? double(static_cast<const float*>(p_.cost)[at]) : static_cast<const double*>(p_.cost)[at];
      if (w_.f[i] - c > most) most = w_.f[i] - c;
    }
    return most;
  }

 private:
  int64_t first_row(int64_t chunk) const { return chunk * p_.n / w_.chunks; }

  template <typename T>
  void rows(const PassOptions& options, int64_t chunk) const {
    double* const slack = w_.slack + chunk * w_.mp;
    double* const columns = w_.partial + chunk * w_.mp;
    int32_t* const live = w_.live + chunk * w_.mp;
    for (int64_t j = 0; j < w_.mp; ++j) columns[j] = 0;
    const double inverse_reg = 1 / options.reg;
    for (int64_t i = first_row(chunk); i < first_row(chunk + 1); ++i) {
      w_.block_count[i] = 0;
      if (!(p_.a[i] > 0)) {
        w_.f[i] = -__builtin_inf();
        continue;
      }
      const T* const cost = static_cast<const T*>(p_.cost) + i * p_.row_stride;
      const double largest = row_slack(cost, w_.g, p_.m, w_.mp, slack);
      int64_t count;
      const double sum = row_entries(slack, w_.mp, largest, inverse_reg, live, &count);
      const double exact = row_potential(options.reg, w_.log_a[i], sum, largest);
      double scale = p_.a[i] / sum;
      if (options.relax == 1) {
        w_.f[i] = exact;
      } else {
        double further = (options.relax - 1) * (exact - w_.f[i]) * inverse_reg;
        further = further > kFurthest ? kFurthest : further < -kFurthest ? -kFurthest : further;
        w_.f[i] = exact + further * options.reg;
        scale *= exp(further);
      }
      add_row(slack, live, count, scale, columns);
      if (options.keep > 0) keep_row(i, slack, live, count, scale, options.keep);
    }
  }
  static constexpr double kFurthest = 10;  // beyond it over-relaxation is no help

  FUSEDOPT_INLINE void add_row(const double* entries, const int32_t* live, int64_t count, double scale,
                               double* columns) const {
    const D factor(scale);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t j = live[k];
      store(columns + j, fma(factor, load(entries + j), load(columns + j)));
      store(columns + j + kLanes, fma(factor, load(entries + j + kLanes), load(columns + j + kLanes)));
    }
  }

  // A row that has more than there is room for (with low_memory) keeps its larger entries.
  void keep_row(int64_t i, const double* entries, const int32_t* live, int64_t count, double scale, double keep) const {
    for (int tries = 0; tries < kMostTries; ++tries, keep *= 10)
      if (fill_row(i, entries, live, count, scale, keep)) return;
    w_.block_count[i] = 0;
  }
  static constexpr int kMostTries = 20;

  FUSEDOPT_INLINE bool fill_row(int64_t i, const double* entries, const int32_t* live, int64_t count, double scale,
                                double keep) const {
    const D factor(scale), row_least(keep * p_.a[i]), share(keep);
    double* const blocks = w_.row_blocks(i);
    int32_t* const columns = w_.row_columns(i);
    int64_t kept = 0;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = live[k]; j < live[k] + kGroup; j += kLanes) {
        const D entry = factor * load(entries + j);
        if (!any_at_least(entry, smaller(row_least, share * load(w_.b + j)))) continue;
        if (kept == w_.row_room) return false;
        store(blocks + kept * kLanes, entry);
        columns[kept++] = int32_t(j);
      }
    w_.block_count[i] = int32_t(kept);
    return true;
  }

  template <typename T>
  void plan_rows(double reg, int64_t chunk) const {
    double* const columns = w_.partial + chunk * w_.mp;
    double* const row = w_.slack + chunk * w_.mp;
    for (int64_t j = 0; j < w_.mp; ++j) columns[j] = 0;
    for (int64_t i = first_row(chunk); i < first_row(chunk + 1); ++i) {
      const T* const cost = static_cast<const T*>(p_.cost) + i * p_.row_stride;
      const D f(w_.f[i]), inverse_reg(1 / reg), zero(0.0);
      for (int64_t j = 0; j < p_.m; ++j) row[j] = double(cost[j]);
      for (int64_t j = p_.m; j < w_.mp; ++j) row[j] = __builtin_inf();
      D sum(0.0), spent(0.0);
      for (int64_t j = 0; j < w_.mp; j += kLanes) {
        const D c = load(row + j), entry = exp(((f - c) + load(w_.g + j)) * inverse_reg);
        store(columns + j, load(columns + j) + entry);
        sum = sum + entry;
        spent = spent + select_less(zero, entry, entry * c, zero);  // 0 * inf is 0 here
      }
      w_.row_error[i] = sum_lanes(sum);
      w_.old_f[i] = sum_lanes(spent);
    }
  }

  void add_partials(double* columns) const {
    for (int64_t j = 0; j < w_.mp; j += kLanes) {
      D sum = load(w_.partial + j);
      for (int64_t chunk = 1; chunk < w_.chunks; ++chunk) sum = sum + load(w_.partial + chunk * w_.mp + j);
      store(columns + j, sum);
    }
  }

  const TransportProblem& p_;
  const Workspace& w_;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
