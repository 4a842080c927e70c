// The Newton system (diag(c) + shift - S' diag(1/a) S) v = b - c over the kept blocks, by conjugate gradients.
// One product reads the blocks once: a row's sum and its share in the columns while it is in L1. Per kept entry 8.5
// bytes (one index a pack), two multiply-adds.
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
    entries_ = 0;
    for (int64_t j = 0; j < w_.mp; ++j) w_.diagonal[j] = w_.columns[j] + shift;
    double* const jacobi = w_.jacobi;
    for (int64_t j = 0; j < w_.mp; ++j) jacobi[j] = w_.diagonal[j];
    for (int64_t i = 0; i < p_.n; ++i) {
      const double* const blocks = w_.blocks + i * w_.mp;
      const int32_t* const columns = w_.block_column + i * (w_.mp / kLanes);
      const int32_t count = w_.block_count[i];
      entries_ += count * kLanes;
      if (!count) continue;
      const D negative(-1 / p_.a[i]);
      for (int32_t k = 0; k < count; ++k) {
        const D entry = load(blocks + k * kLanes);
        store(jacobi + columns[k], fma(negative * entry, entry, load(jacobi + columns[k])));
      }
    }
    for (int64_t j = 0; j < w_.mp; ++j) {  // cancellation may leave nothing of it
      const double least = 1e-13 * w_.diagonal[j];
      jacobi[j] = w_.diagonal[j] > 0 ? 1 / (jacobi[j] > least ? jacobi[j] : least) : 0;
    }
  }
  int64_t entries() const { return entries_; }

  // Solves into w_.step. The factor is made where plain scaling needs more than this many iterations; whether it is
  // the better way is remembered for the next system.
  CgResult solve(double relative) {
    for (int64_t j = 0; j < w_.mp; ++j) {
      w_.step[j] = 0;
      w_.residual[j] = j < p_.m && p_.b[j] > 0 ? w_.b[j] - w_.columns[j] : 0;
    }
    const double target = relative * relative * dot(w_.residual, w_.residual);
    CgResult total = {0, false};
    if (!prefer_factor_) total = iterate(target, kPatience, false);
    if (total.converged) return total;
    ApproximateFactor factor(p_, w_);
    const bool factored = entries_ <= kLanes * max_edges(p_.n, p_.m) && factor.build(w_.diagonal);
    prefer_factor_ = factored;
    factor_ = &factor;
    const CgResult rest = iterate(target, kMostIterations, factored);
    factor_ = nullptr;
    return {total.iterations + rest.iterations, rest.converged};
  }

 private:
  static constexpr int64_t kPatience = 120, kMostIterations = 3000;

  double dot(const double* x, const double* y) const {
    D sum0(0.0), sum1(0.0);
    for (int64_t j = 0; j < w_.mp; j += kGroup) {
      sum0 = fma(load(x + j), load(y + j), sum0);
      sum1 = fma(load(x + j + kLanes), load(y + j + kLanes), sum1);
    }
    return sum_lanes(sum0 + sum1);
  }

  // y = system x.
  void product(const double* x, double* y) const {
    for (int64_t j = 0; j < w_.mp; j += kLanes) store(y + j, load(w_.diagonal + j) * load(x + j));
    for (int64_t i = 0; i < p_.n; ++i) {
      const double* const blocks = w_.blocks + i * w_.mp;
      const int32_t* const columns = w_.block_column + i * (w_.mp / kLanes);
      const int32_t count = w_.block_count[i];
      if (!count) continue;
      D sum0(0.0), sum1(0.0);
      int32_t k = 0;
      for (; k + 2 <= count; k += 2) {
        sum0 = fma(load(blocks + k * kLanes), load(x + columns[k]), sum0);
        sum1 = fma(load(blocks + (k + 1) * kLanes), load(x + columns[k + 1]), sum1);
      }
      if (k < count) sum0 = fma(load(blocks + k * kLanes), load(x + columns[k]), sum0);
      const D negative(-sum_lanes(sum0 + sum1) / p_.a[i]);
      for (k = 0; k < count; ++k) store(y + columns[k], fma(negative, load(blocks + k * kLanes), load(y + columns[k])));
    }
  }

  void precondition(bool factored) const {
    if (factored) return factor_->solve(w_.residual, w_.preconditioned);
    for (int64_t j = 0; j < w_.mp; j += kLanes)
      store(w_.preconditioned + j, load(w_.residual + j) * load(w_.jacobi + j));
  }

  // Goes on from w_.step and w_.residual, which belong together.
  CgResult iterate(double target, int64_t most, bool factored) {
    precondition(factored);
    for (int64_t j = 0; j < w_.mp; ++j) w_.direction[j] = w_.preconditioned[j];
    double along = dot(w_.residual, w_.preconditioned);
    for (int64_t k = 0; k < most; ++k) {
      if (!(dot(w_.residual, w_.residual) > target)) return {k, true};
      product(w_.direction, w_.image);
      const double curvature = dot(w_.direction, w_.image);
      if (!(curvature > 0) || !(along > 0)) return {k, true};  // as far as rounding lets it go
      const D forward(along / curvature), back(-along / curvature);
      for (int64_t j = 0; j < w_.mp; j += kLanes) {
        store(w_.step + j, fma(forward, load(w_.direction + j), load(w_.step + j)));
        store(w_.residual + j, fma(back, load(w_.image + j), load(w_.residual + j)));
      }
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
  int64_t entries_ = 0;
  bool prefer_factor_ = false;
  const ApproximateFactor* factor_ = nullptr;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
