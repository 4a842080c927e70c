// The Newton system (diag(c) + shift - S' diag(1/a) S) v = b - c over the kept blocks, by conjugate gradients.
// One product reads the blocks once: a row's sum and its share in the columns while it is in L1. Per kept entry 8.5
// bytes (one index a pack), two multiply-adds; rows go in chunks, whose shares are added in order.
#pragma once
#include "cpu/sinkhorn_newton_sparse/approximate_factor.h"

namespace fusedopt::FUSEDOPT_TARGET {

struct CgResult {
  int64_t iterations;
  bool converged;
};

class NewtonSystem {
 public:
  NewtonSystem(const TransportProblem& problem, const Workspace& work) : p_(problem), w_(work) {}

  // After a pass that kept blocks. The diagonal is c_j + shift; entries are counted.
  void prepare(double shift) {
    packs_ = 0;
    for (int64_t i = 0; i < p_.n; ++i) packs_ += w_.block_count[i];
    chunks_ = system_chunks();
    over_rows([&](int64_t i, double* sums) {
      const double* const blocks = w_.row_blocks(i);
      const int32_t* const columns = w_.row_columns(i);
      const D negative(-1 / p_.a[i]);
      for (int32_t k = 0; k < w_.block_count[i]; ++k) {
        const D entry = load(blocks + k * kLanes);
        store(sums + columns[k], fma(negative * entry, entry, load(sums + columns[k])));
      }
    });
    for (int64_t j = 0; j < w_.mp; j += kLanes) {
      const D diagonal = load(w_.columns + j) + D(shift);
      store(w_.diagonal + j, diagonal);
      store(w_.jacobi + j, diagonal + partial_sum(j));
    }
    for (int64_t j = 0; j < w_.mp; ++j) {  // cancellation may leave nothing of it
      const double least = 1e-13 * w_.diagonal[j], given = w_.jacobi[j];
      w_.jacobi[j] = w_.diagonal[j] > 0 ? 1 / (given > least ? given : least) : 0;
    }
  }
  int64_t entries() const { return packs_ * kLanes; }

  // Solves into w_.step for the right side in w_.residual. The factor is made where plain scaling needs more than
  // kPatience iterations; whether it is the better way is remembered for the next system.
  CgResult solve(double relative) {
    for (int64_t j = 0; j < w_.mp; ++j) w_.step[j] = 0;
    const double target = relative * relative * dot(w_.residual, w_.residual);
    CgResult total = {0, false};
    if (!prefer_factor_) total = iterate(target, kPatience, false);
    if (total.converged) return total;
    ApproximateFactor factor(p_, w_);
    const bool factored = entries() <= kLanes * w_.edge_room && factor.build(w_.diagonal);
    prefer_factor_ = factored;
    factor_ = &factor;
    const CgResult rest = iterate(target, kMostIterations, factored);
    factor_ = nullptr;
    return {total.iterations + rest.iterations, rest.converged};
  }

  // columns += factor * S' (rows / a).
  void scatter(double factor, const double* rows, double* columns) const {
    over_rows([&](int64_t i, double* sums) { add_row(i, D(factor * rows[i] / p_.a[i]), sums); });
    for (int64_t j = 0; j < w_.mp; j += kLanes) store(columns + j, load(columns + j) + partial_sum(j));
  }

  // (S columns)_i.
  double row_product(int64_t i, const double* columns) const {
    const double* const blocks = w_.row_blocks(i);
    const int32_t* const at = w_.row_columns(i);
    const int32_t count = w_.block_count[i];
    D sum0(0.0), sum1(0.0);
    int32_t k = 0;
    for (; k + 2 <= count; k += 2) {
      sum0 = fma(load(blocks + k * kLanes), load(columns + at[k]), sum0);
      sum1 = fma(load(blocks + (k + 1) * kLanes), load(columns + at[k + 1]), sum1);
    }
    if (k < count) sum0 = fma(load(blocks + k * kLanes), load(columns + at[k]), sum0);
    return sum_lanes(sum0 + sum1);
  }

 private:
  static constexpr int64_t kPatience = 120, kMostIterations = 3000;

  // As many as the work is worth: each costs a walk over the columns, and waking a thread some microseconds.
  int64_t system_chunks() const {
    const int64_t by_size = packs_ / 2048, by_columns = packs_ * kLanes / (8 * w_.mp);
    const int64_t wanted = by_size < by_columns ? by_size : by_columns;
    return wanted < 1 ? 1 : wanted < w_.chunks ? wanted : w_.chunks;
  }

  // body(row, sums) for every row that has blocks; sums start at zero and belong to the row's chunk.
  template <typename F>
  void over_rows(const F& body) const {
    parallel_for(chunks_, p_.threads, [&](int64_t chunk) {
      double* const sums = w_.partial + chunk * w_.mp;
      for (int64_t j = 0; j < w_.mp; j += kLanes) store(sums + j, D(0.0));
      for (int64_t i = chunk * p_.n / chunks_; i < (chunk + 1) * p_.n / chunks_; ++i)
        if (w_.block_count[i]) body(i, sums);
    });
  }
  FUSEDOPT_INLINE D partial_sum(int64_t j) const {
    D sum = load(w_.partial + j);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) sum = sum + load(w_.partial + chunk * w_.mp + j);
    return sum;
  }

  FUSEDOPT_INLINE void add_row(int64_t i, D factor, double* sums) const {
    const double* const blocks = w_.row_blocks(i);
    const int32_t* const columns = w_.row_columns(i);
    for (int32_t k = 0; k < w_.block_count[i]; ++k)
      store(sums + columns[k], fma(factor, load(blocks + k * kLanes), load(sums + columns[k])));
  }

  double dot(const double* x, const double* y) const {
    D sum0(0.0), sum1(0.0);
    for (int64_t j = 0; j < w_.mp; j += kGroup) {
      sum0 = fma(load(x + j), load(y + j), sum0);
      sum1 = fma(load(x + j + kLanes), load(y + j + kLanes), sum1);
    }
    return sum_lanes(sum0 + sum1);
  }

  // image = system direction; returns <direction, image>.
  double product() const {
    const double* const x = w_.direction;
    over_rows([&](int64_t i, double* sums) { add_row(i, D(-row_product(i, x) / p_.a[i]), sums); });
    D sum(0.0);
    for (int64_t j = 0; j < w_.mp; j += kLanes) {
      const D image = fma(load(w_.diagonal + j), load(x + j), partial_sum(j));
      store(w_.image + j, image);
      sum = fma(image, load(x + j), sum);
    }
    return sum_lanes(sum);
  }

  void precondition(bool factored) const {
    if (factored) return factor_->solve(w_.residual, w_.preconditioned);
    for (int64_t j = 0; j < w_.mp; j += kLanes)
      store(w_.preconditioned + j, load(w_.residual + j) * load(w_.jacobi + j));
  }

  // Moves the solution by `length` along the direction; returns the residual's square.
  double advance(double length) const {
    const D forward(length), back(-length);
    D sum(0.0);
    for (int64_t j = 0; j < w_.mp; j += kLanes) {
      store(w_.step + j, fma(forward, load(w_.direction + j), load(w_.step + j)));
      const D residual = fma(back, load(w_.image + j), load(w_.residual + j));
      store(w_.residual + j, residual);
      sum = fma(residual, residual, sum);
    }
    return sum_lanes(sum);
  }

  // Goes on from w_.step and w_.residual, which belong together.
  CgResult iterate(double target, int64_t most, bool factored) {
    precondition(factored);
    for (int64_t j = 0; j < w_.mp; ++j) w_.direction[j] = w_.preconditioned[j];
    double along = dot(w_.residual, w_.preconditioned), left = dot(w_.residual, w_.residual);
    for (int64_t k = 0; k < most; ++k) {
      if (!(left > target)) return {k, true};
      const double curvature = product();
      if (!(curvature > 0) || !(along > 0)) return {k, true};  // as far as rounding lets it go
      left = advance(along / curvature);
      precondition(factored);
      const double next = dot(w_.residual, w_.preconditioned);
      const D ratio(next / along);
      for (int64_t j = 0; j < w_.mp; j += kLanes)
        store(w_.direction + j, fma(ratio, load(w_.direction + j), load(w_.preconditioned + j)));
      along = next;
    }
    return {most, false};
  }

  const TransportProblem& p_;
  const Workspace& w_;
  int64_t packs_ = 0, chunks_ = 1;
  bool prefer_factor_ = false;
  const ApproximateFactor* factor_ = nullptr;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
