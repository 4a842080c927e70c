// Muon (Jordan 2024; torch.optim.Muon's conventions) and NorMuon (Li et al., arXiv:2510.05491, as released): what is
// done before and after a matrix is orthogonalised.
//
//   g <- ± g / grad_scale                    (maximize, loss scaling)
//   m <- mu m + (1 - mu) g                   u = mu m + (1 - mu) g with Nesterov's step ahead, else m
//   sum form: m <- mu m + g, u = mu m + g    (Newton-Schulz does not see the scale; the buffer is 1/(1 - mu) larger)
//   o = Newton-Schulz(u)
//   NorMuon, for every row i of the r x c matrix:
//     v_i <- b2 v_i + (1 - b2) mean(o_i^2)   o_i <- s o_i / (sqrt(v_i) + 1e-10),   s such that |o| stays (to 1e-10)
//   p <- p (1 - lr wd) - lr a(r, c) o        cautious: only where o p >= 0 does p decay
//
// Memory traffic in fp32, beside the products: before reads g m, writes m u; after reads p o, writes p = 28 bytes per
// element (20 with bf16 storage); NorMuon reads o once more.
#pragma once
#include "math/value.h"

namespace fusedopt {

struct MuonRole {
  enum { kParam, kGrad, kMomentum, kRowSq, kCount };
};

enum class MuonScale { kOriginal, kMatchRmsAdamW, kSpectral, kNone };  // a(r, c)

struct MuonOptions {  // one tensor's hyperparameters, as the user gave them
  double lr, weight_decay, momentum, beta2;
  bool nesterov, sum_form, maximize, cautious;

  bool operator==(const MuonOptions& o) const {
    return lr == o.lr && weight_decay == o.weight_decay && momentum == o.momentum && beta2 == o.beta2 &&
           nesterov == o.nesterov && sum_form == o.sum_form && maximize == o.maximize && cautious == o.cautious;
  }
};

template <typename S>
struct MuonScalars {  // the same for every coordinate of one tensor; computed in double, then rounded once to S
  S lerp_weight;      // 1 - mu, or -mu where the gradient is the nearer end (mu < 1/2)
  S momentum;
  S grad_factor;  // ±1 / grad_scale
  S decay;        // 1 - lr * weight_decay
  bool lerp_from_grad, nesterov, sum_form, cautious;
  double beta2;
  double rate;  // -lr

  template <typename T>
  HOST_DEVICE MuonScalars<T> as() const {
    return {T(lerp_weight), T(momentum), T(grad_factor), T(decay), lerp_from_grad,
            nesterov,       sum_form,    cautious,       beta2,    rate};
  }
};

// NorMuon's sums have one order on every backend. A line of statistics is cut into pieces: of so many elements of a
// row, added up by lanes in turn; of so many rows of a column, one after the other. The pieces are added in order.
// Norms are added up by lanes of lines. Lanes are added by halves.
struct NorMuonOrder {
  enum { kRowPiece = 2048, kRowLanes = 16, kColumnPiece = 128, kLineLanes = 256 };
};

}  // namespace fusedopt

namespace fusedopt::FUSEDOPT_TARGET {

constexpr double kNorMuonEps = 1e-10;  // beside a root and beside a norm, as released

HOST_DEVICE inline MuonScalars<double> muon_scalars(const MuonOptions& o, double inv_grad_scale) {
  const bool from_grad = o.momentum < 0.5;
  return {from_grad ? -o.momentum : 1.0 - o.momentum,
          o.momentum,
          o.maximize ? -inv_grad_scale : inv_grad_scale,
          1.0 - o.lr * o.weight_decay,
          from_grad,
          o.nesterov,
          o.sum_form,
          o.cautious,
          o.beta2,
          -o.lr};
}

// a(r, c) of a matrix with so many outputs and inputs.
inline double muon_scale(MuonScale scale, double outputs, double inputs) {
  const double ratio = outputs / inputs, larger = ratio > 1 ? outputs : inputs;
  switch (scale) {
    case MuonScale::kOriginal: return sqrt(ratio > 1 ? ratio : 1.0);
    case MuonScale::kMatchRmsAdamW: return 0.2 * sqrt(larger);
    case MuonScale::kSpectral: return sqrt(ratio);
    default: return 1.0;
  }
}

template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V muon_lerp(V g, V m, const MuonScalars<V>& k) {
  return fma(k.lerp_weight, g - m, k.lerp_from_grad ? g : m);  // so that m = g stays put exactly
}

// Updates the momentum; returns what is to be orthogonalised.
template <typename V>  // V: float, double, or a pack of them
HOST_DEVICE FUSEDOPT_INLINE V muon_momentum(V grad, V& m, const MuonScalars<V>& k) {
  const V g = k.grad_factor * grad;
  m = k.sum_form ? fma(k.momentum, m, g) : muon_lerp(g, m, k);
  if (!k.nesterov) return m;
  return k.sum_form ? fma(k.momentum, m, g) : muon_lerp(g, m, k);
}

template <typename V>  // rate: -lr a(r, c), times NorMuon's scale of the row
HOST_DEVICE FUSEDOPT_INLINE V muon_param(V p, V o, V rate, const MuonScalars<V>& k) {
  const V decayed = p * k.decay;
  return fma(rate, o, k.cautious ? where_not_negative(o * p, decayed, p) : decayed);
}

// NorMuon, one row: updates v, not yet rounded to float32, and returns 1 / (sqrt(v) + eps).
HOST_DEVICE inline double normuon_row(double& v, double sum, double count, double beta2) {
  v = fma(beta2, v, (1.0 - beta2) * (sum / count));
  return 1.0 / (sqrt(v) + kNorMuonEps);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
