// Sinkhorn-Knopp with a fixed number of iterations, and its derivative (Sinkhorn and Knopp 1967; as the residual map of
// hyper-connections: Xie et al., arXiv:2512.24880).
//
//   K = exp(L),  v = 1;   each iteration: u_i = 1 / (K v)_i,  v_j = (n / m) / (K' u)_j;   P = diag(u) K diag(v)
//
// P's columns sum to n / m exactly, its rows to 1 as far as the iterations got. P is the same for a row of L shifted by
// a number, so that a row's largest is taken off first; what is below it by more than the range of exp counts as
// nothing.
//
// Backward, in logarithms: with G = dF/dP, W = G P enters log K, its row sums log u, its column sums log v
// (zero after a number is taken off each column of G, which changes nothing). Back
// through the iterations, where x_j = dv_j v_j m / n and y_i = du_i u_i, and v' is the v before:
//
//   du -= u (K x),  dv = -v' (K' y),  dF/dlog K = W - K sum over iterations (u x' + y v'')
//
// Per iteration and entry: 2 multiply-adds forward, 6 backward with the forward pass before it; n + m divisions a
// matrix.
#pragma once
#include "math/exp.h"

namespace fusedopt::FUSEDOPT_TARGET {

// V: a number or a pack of matrices side by side. N, M: the shape, or 0 where it is known at run time only.
template <typename S, typename V, int N, int M>
struct SinkhornKnopp {
  static constexpr int kMost = 8;
  int n, m;
  V kernel[kMost * kMost];

  HOST_DEVICE int rows() const { return N ? N : n; }
  HOST_DEVICE int columns() const { return M ? M : m; }
  HOST_DEVICE V column_mass() const { return V(S(rows()) / S(columns())); }

  HOST_DEVICE void load(const V* logits) {
    for (int i = 0; i < rows(); ++i) {
      V most = logits[i * columns()];
      for (int j = 1; j < columns(); ++j) most = maximum(most, logits[i * columns() + j]);
      for (int j = 0; j < columns(); ++j) kernel[i * columns() + j] = exp(logits[i * columns() + j] - most);
    }
  }

  HOST_DEVICE FUSEDOPT_INLINE void scale_rows(V* u, const V* v) const {
    for (int i = 0; i < rows(); ++i) {
      V sum = kernel[i * columns()] * v[0];
      for (int j = 1; j < columns(); ++j) sum = fma(kernel[i * columns() + j], v[j], sum);
      u[i] = V(S(1)) / sum;
    }
  }
  HOST_DEVICE FUSEDOPT_INLINE void scale_columns(const V* u, V* v) const {
    for (int j = 0; j < columns(); ++j) {
      V sum = kernel[j] * u[0];
      for (int i = 1; i < rows(); ++i) sum = fma(kernel[i * columns() + j], u[i], sum);
      v[j] = column_mass() / sum;
    }
  }
  HOST_DEVICE FUSEDOPT_INLINE V entry(int i, int j, const V* u, const V* v) const {
    return u[i] * kernel[i * columns() + j] * v[j];
  }

  HOST_DEVICE void forward(int64_t iterations, V* plan) const {
    V u[kMost], v[kMost];
    for (int j = 0; j < columns(); ++j) v[j] = V(S(1));
    for (int64_t k = 0; k < iterations; ++k) {
      scale_rows(u, v);
      scale_columns(u, v);
    }
    for (int i = 0; i < rows(); ++i)
      for (int j = 0; j < columns(); ++j) plan[i * columns() + j] = entry(i, j, u, v);
  }

  // Replaces `up` (dF/dP) by dF/dL. `history` holds 2 kMost values for each iteration and one more.
  HOST_DEVICE void backward(int64_t iterations, V* up, V* history) const {
    V *u = history, *v = history + kMost;
    for (int j = 0; j < columns(); ++j) v[j] = V(S(1));
    for (int64_t k = 0; k < iterations; ++k) {
      V* const before = v;
      u += 2 * kMost;
      v += 2 * kMost;
      scale_rows(u, before);
      scale_columns(u, v);
    }
    V du[kMost], dv[kMost], sum[kMost * kMost];
    enter_plan(u, v, up, du, dv, sum);
    for (int64_t k = 0; k < iterations; ++k, u -= 2 * kMost, v -= 2 * kMost)
      step_back(u, v, v - 2 * kMost, du, dv, sum);
    for (int k = 0; k < rows() * columns(); ++k) up[k] = up[k] - kernel[k] * sum[k];
  }

 private:
  // Columns of P have a fixed sum, so that a column's mean can be taken off G, and with it what would cancel later.
  HOST_DEVICE FUSEDOPT_INLINE void enter_plan(const V* u, const V* v, V* up, V* du, V* dv, V* sum) const {
    for (int i = 0; i < rows(); ++i) du[i] = V(S(0));
    for (int j = 0; j < columns(); ++j) {
      V mean = V(S(0));
      for (int i = 0; i < rows(); ++i) mean = fma(entry(i, j, u, v), up[i * columns() + j], mean);
      mean = mean / column_mass();
      dv[j] = V(S(0));
      for (int i = 0; i < rows(); ++i) {
        V& w = up[i * columns() + j];
        w = entry(i, j, u, v) * (w - mean);
        du[i] = du[i] + w;
        sum[i * columns() + j] = V(S(0));
      }
    }
  }
  HOST_DEVICE FUSEDOPT_INLINE void step_back(const V* u, const V* v, const V* before, V* du, V* dv, V* sum) const {
    V x[kMost];
    for (int j = 0; j < columns(); ++j) {
      x[j] = dv[j] * v[j] / column_mass();
      dv[j] = V(S(0));
    }
    for (int i = 0; i < rows(); ++i) {
      V row = kernel[i * columns()] * x[0];
      for (int j = 1; j < columns(); ++j) row = fma(kernel[i * columns() + j], x[j], row);
      const V y = (du[i] - u[i] * row) * u[i];
      for (int j = 0; j < columns(); ++j) {
        const int at = i * columns() + j;
        sum[at] = fma(u[i], x[j], fma(y, before[j], sum[at]));
        dv[j] = fma(kernel[at], y, dv[j]);
      }
      du[i] = V(S(0));
    }
    for (int j = 0; j < columns(); ++j) dv[j] = V(S(0)) - before[j] * dv[j];
  }
};

}  // namespace fusedopt::FUSEDOPT_TARGET
