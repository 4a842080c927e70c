// Many problems of at most 8 x 8, one a lane, their matrices in L1: plain Sinkhorn on exp((least_i - C_ij) / reg), rows
// exact. Whoever is done stands still, so that a problem's bits do not depend on its neighbours. What is not done after
// kMostTiny iterations, or what the range of numbers does not hold, is left to the solver, marked as not converged.
//
// Per iteration and problem n m 2 multiply-adds and n + m divisions; once, two exp per entry and a log per row and
// column.
#pragma once
#include "cpu/sinkhorn_newton_sparse/pass.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int64_t kMostTiny = 100;

// N, M: the shape, or 0 where it is known at run time only.
template <int N, int M, typename T>
class TinyLanes {
 public:
  // Problems [first, first + count), count at most kLanes.
  TinyLanes(const TinyTransports& all, int64_t first, int64_t count)
      : t_(all), first_(first), count_(count), n_(N ? N : all.n), m_(M ? M : all.m) {}

  void solve() {
    load_problems();
    iterate();
    potentials();
    measure();
    store_lines();
  }

 private:
  template <typename S>
  D gather(const S* from, int64_t stride, int64_t at) const {
    double lane[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lane[l] = from[(first_ + (l < count_ ? l : 0)) * stride + at];
    return load(lane);
  }
  void scatter(D values, double* to, int64_t stride, int64_t at) const {
    double lane[kLanes];
    store(lane, values);
    for (int64_t l = 0; l < count_; ++l) to[(first_ + l) * stride + at] = lane[l];
  }

  void load_problems() {
    reg_ = gather(t_.reg, 1, 0);
    mass_ = D(0.0);
    for (int64_t i = 0; i < n_; ++i) mass_ = mass_ + (a_[i] = gather(t_.a, n_, i));
    for (int64_t j = 0; j < m_; ++j) {
      b_[j] = gather(t_.b, m_, j);
      v_[j] = D(1.0);
    }
    const D inverse = D(1.0) / reg_;
    for (int64_t i = 0; i < n_; ++i) {
      least_[i] = D(__builtin_inf());
      for (int64_t j = 0; j < m_; ++j) {
        cost_[i * m_ + j] = gather(static_cast<const T*>(t_.cost), t_.problem_stride, i * t_.row_stride + j);
        least_[i] = smaller(cost_[i * m_ + j], least_[i]);
      }
      for (int64_t j = 0; j < m_; ++j) kernel_[i * m_ + j] = exp((least_[i] - cost_[i * m_ + j]) * inverse);
    }
  }

  void iterate() {
    const D limit(0.8 * t_.tolerance), zero(0.0), one(1.0);
    iterations_ = zero;
    D last(__builtin_inf());
    const int64_t most = t_.max_iterations < kMostTiny ? t_.max_iterations : kMostTiny;
    for (steps_ = 0; steps_ < most;) {
      D sums[kTiny], error = zero;
      for (int64_t i = 0; i < n_; ++i) u_[i] = a_[i] / row_sum(i);
      for (int64_t j = 0; j < m_; ++j) {
        sums[j] = column_sum(j);
        error = error + magnitude(fma(v_[j], sums[j], zero - b_[j]));
      }
      store(errors_[steps_++], error);
      iterations_ = iterations_ + select_less(limit, last, one, zero);
      last = error;
      if (!any_at_least(error, limit)) break;
      for (int64_t j = 0; j < m_; ++j) v_[j] = select_less(limit, error, b_[j] / sums[j], v_[j]);
    }
  }
  FUSEDOPT_INLINE D row_sum(int64_t i) const {
    D sum = kernel_[i * m_] * v_[0];
    for (int64_t j = 1; j < m_; ++j) sum = fma(kernel_[i * m_ + j], v_[j], sum);
    return sum;
  }
  FUSEDOPT_INLINE D column_sum(int64_t j) const {
    D sum = kernel_[j] * u_[0];
    for (int64_t i = 1; i < n_; ++i) sum = fma(kernel_[i * m_ + j], u_[i], sum);
    return sum;
  }
  static FUSEDOPT_INLINE D magnitude(D x) { return larger(x, D(0.0) - x); }

  // u and v become f and g, both shifted so that <f,a> = <g,b>.
  void potentials() {
    const D zero(0.0);
    D from_f = zero, from_g = zero;
    for (int64_t i = 0; i < n_; ++i) {
      u_[i] = fma(reg_, log(u_[i]), least_[i]);
      from_f = from_f + select_less(zero, a_[i], a_[i] * u_[i], zero);
    }
    for (int64_t j = 0; j < m_; ++j) {
      v_[j] = reg_ * log(v_[j]);
      from_g = from_g + select_less(zero, b_[j], b_[j] * v_[j], zero);
    }
    const D shift = (from_g - from_f) / (mass_ + mass_);
    for (int64_t i = 0; i < n_; ++i) scatter(u_[i] = u_[i] + shift, t_.f, n_, i);
    for (int64_t j = 0; j < m_; ++j) scatter(v_[j] = v_[j] - shift, t_.g, m_, j);
    dual_ = from_f + from_g;
  }

  // The plan that f and g give, as a user would compute it.
  void measure() {
    const D zero(0.0), inverse = D(1.0) / reg_;
    D columns[kTiny], error = zero, spent = zero, mass = zero;
    for (int64_t j = 0; j < m_; ++j) columns[j] = zero - b_[j];
    for (int64_t i = 0; i < n_; ++i) {
      D sum = zero;
      for (int64_t j = 0; j < m_; ++j) {
        const D c = cost_[i * m_ + j], entry = exp(((u_[i] - c) + v_[j]) * inverse);
        columns[j] = columns[j] + entry;
        sum = sum + entry;
        spent = spent + select_less(zero, entry, entry * c, zero);  // 0 * inf is 0 here
      }
      mass = mass + sum;
      error = error + magnitude(sum - a_[i]);
    }
    for (int64_t j = 0; j < m_; ++j) error = error + magnitude(columns[j]);
    const D value = fma(reg_, mass_ - mass, dual_);
    const D facts[] = {iterations_, error, spent, mass, value};
    for (int64_t k = 0; k < 5; ++k) scatter(facts[k], t_.facts, 6, k);
    // Last, by the number that is reported; false for NaN.
    for (int64_t l = 0; l < count_; ++l)
      t_.facts[(first_ + l) * 6 + 5] = t_.facts[(first_ + l) * 6 + 1] <= t_.tolerance;
  }

  void store_lines() const {
    for (int64_t l = 0; l < count_; ++l) {
      const int64_t made = int64_t(t_.facts[(first_ + l) * 6]);
      for (int64_t k = 0; k < made && k < t_.trace_room; ++k)
        t_.trace[(first_ + l) * t_.trace_room + k] = {t_.reg[first_ + l], 0, errors_[k][l], 0, 0, 1};
    }
  }

  const TinyTransports& t_;
  const int64_t first_, count_, n_, m_;
  int64_t steps_ = 0;
  D cost_[kTiny * kTiny], kernel_[kTiny * kTiny], a_[kTiny], b_[kTiny], u_[kTiny], v_[kTiny], least_[kTiny];
  D reg_, mass_, dual_, iterations_;
  double errors_[kMostTiny][kLanes];
};

template <typename T>
inline void solve_tiny(const TinyTransports& all, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = end - first < kLanes ? end - first : kLanes;
    if (all.n == 4 && all.m == 4)
      TinyLanes<4, 4, T>(all, first, count).solve();
    else
      TinyLanes<0, 0, T>(all, first, count).solve();
  }
}

}  // namespace fusedopt::FUSEDOPT_TARGET
