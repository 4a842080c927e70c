// Sinkhorn-Knopp with a fixed number of iterations, and its derivative (Sinkhorn and Knopp 1967; as the residual map of
// hyper-connections: Xie et al., arXiv:2512.24880).
//
//   K = exp(L),  v = 1;   each iteration: u_i = 1 / (K v)_i,  v_j = (n / m) / (K' u)_j;   P = diag(u) K diag(v)
//
// P's columns sum to n / m exactly, its rows to 1 as far as the iterations got. P is the same for a row of L shifted by
// a number, so that a row's largest is taken off first; what is below it by more than the range of exp counts as
// nothing.
//
// Backward, in logarithms: with G = dF/dP, W = G P enters log K, its row sums log u, its column sums log v. Then back
// through the iterations; with shares Q_ij = u_i K_ij v_j (m / n) of a column's sum and R_ij = u_i K_ij v_j of a row's,
//
//   dF/dlogK -= Q diag(dv),  du -= Q dv;       dF/dlogK -= diag(du) R,  dv = -R' du
//
// Per iteration and entry: 2 multiply-adds forward, 8 backward; n + m divisions a matrix.
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
    V du[kMost], dv[kMost];
    for (int j = 0; j < columns(); ++j) dv[j] = V(S(0));
    for (int i = 0; i < rows(); ++i) {
      du[i] = V(S(0));
      for (int j = 0; j < columns(); ++j) {
        V& w = up[i * columns() + j];
        w = w * entry(i, j, u, v);
        du[i] = du[i] + w;
        dv[j] = dv[j] + w;
      }
    }
    for (int64_t k = 0; k < iterations; ++k, u -= 2 * kMost, v -= 2 * kMost) {
      through_columns(up, du, dv, u, v);
      through_rows(up, du, dv, u, v - 2 * kMost);
    }
  }

 private:
  HOST_DEVICE FUSEDOPT_INLINE void through_columns(V* up, V* du, const V* dv, const V* u, const V* v) const {
    for (int j = 0; j < columns(); ++j) {
      const V back = dv[j] * (v[j] / column_mass());
      for (int i = 0; i < rows(); ++i) {
        const V share = u[i] * kernel[i * columns() + j] * back;
        up[i * columns() + j] = up[i * columns() + j] - share;
        du[i] = du[i] - share;
      }
    }
  }
  HOST_DEVICE FUSEDOPT_INLINE void through_rows(V* up, V* du, V* dv, const V* u, const V* v) const {
    for (int j = 0; j < columns(); ++j) dv[j] = V(S(0));
    for (int i = 0; i < rows(); ++i) {
      const V back = du[i] * u[i];
      for (int j = 0; j < columns(); ++j) {
        const V share = back * kernel[i * columns() + j] * v[j];
        up[i * columns() + j] = up[i * columns() + j] - share;
        dv[j] = dv[j] - share;
      }
      du[i] = V(S(0));
    }
  }
};

}  // namespace fusedopt::FUSEDOPT_TARGET
