// Implicit differentiation: the system of TransportAdjoint, by the conjugate gradients of Newton's steps. The rows are
// eliminated as there; what is kept of the plan is all that counts in float64.
#pragma once
#include "cpu/sinkhorn_newton_sparse/system.h"

namespace fusedopt::FUSEDOPT_TARGET {

class AdjointSolver {
 public:
  AdjointSolver(const TransportProblem& problem, void* memory)
      : p_(problem), w_(memory, problem.n, problem.m, false), pass_(p_, w_), system_(p_, w_) {}

  // The plan is that of g, its rows made exact.
  void solve(const double* g, TransportAdjoint* adjoint) {
    pass_.load_problem(g);
    pass_.run({p_.reg, kKeep, 1});
    system_.prepare(0);
    eliminate_rows(*adjoint);
    const double before = norm();
    if (before > 0) system_.solve(kRelative);
    adjoint->residual = before > 0 ? norm() / before : 0;
    for (int64_t i = 0; i < p_.n; ++i)
      adjoint->x[i] = p_.a[i] > 0 ? (adjoint->rows[i] - row_product(i, before)) / p_.a[i] : 0;
    for (int64_t j = 0; j < p_.m; ++j) adjoint->y[j] = before > 0 ? w_.step[j] : 0;
  }

 private:
  static constexpr double kKeep = 1e-18, kRelative = 1e-12;

  double row_product(int64_t i, double before) const { return before > 0 ? system_.row_product(i, w_.step) : 0; }

  // w.residual = columns - P' (rows / a), without what rounding left of a sum that is zero.
  void eliminate_rows(const TransportAdjoint& adjoint) const {
    for (int64_t j = 0; j < w_.mp; ++j) w_.residual[j] = w_.b[j] > 0 ? adjoint.columns[j] : 0;
    system_.scatter(-1, adjoint.rows, w_.residual);
    double sum = 0, mass = 0;
    for (int64_t j = 0; j < p_.m; ++j) {
      sum += w_.residual[j];
      mass += w_.columns[j];
    }
    for (int64_t j = 0; j < p_.m; ++j) w_.residual[j] -= w_.columns[j] * (sum / mass);
  }

  double norm() const {
    double sum = 0;
    for (int64_t j = 0; j < p_.m; ++j) sum += w_.residual[j] * w_.residual[j];
    return sqrt(sum);
  }

  const TransportProblem& p_;
  const Workspace w_;
  const Pass pass_;
  NewtonSystem system_;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
