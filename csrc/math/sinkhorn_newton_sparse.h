// Entropic optimal transport by Sinkhorn-Newton-Sparse (Tang et al., arXiv:2401.12253), in the form that is solved
// here.
//
//   minimise <C,P> + reg sum P log P,  P 1 = a,  P' 1 = b;   P_ij = exp((f_i + g_j - C_ij) / reg)
//
// f is eliminated: for any g, f_i(g) = reg (log a_i - log sum_j exp((g_j - C_ij) / reg)) makes the rows exact, so that
// what is left is the convex function phi(g) = -<f(g),a> - <g,b> with gradient c - b, c = P' 1, and Hessian
//
//   (diag(c) - P' diag(1/a) P) / reg,      the Laplacian of the columns.
//
//   Sinkhorn   g_j += omega reg log(b_j / c_j)
//   Newton     g   += step reg v,  (diag(c) + shift - S' diag(1/a) S) v = b - c,  S: P without its small entries
//
// One pass over the cost gives f, c, phi and S at once: a row stays on chip between its sum and its share in the column
// sums. Per element and pass: 8 bytes read in fp64, 4 in fp32; a subtraction and a maximum, then a comparison; one exp
// where the entry is above e^-kCut of its row's largest. What is below is less than 4e-44 of it and counts as nothing.
#pragma once
#include "math/exp.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr double kCut = 100.0;

// The row's entry over its largest one, from slack = g_j - C_ij; both in units of the cost, where the difference is
// exact for what matters.
template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V relative_exponent(V slack, V largest, V inverse_reg) {
  return (slack - largest) * inverse_reg;
}

HOST_DEVICE inline double row_potential(double reg, double log_a, double sum, double largest) {
  return reg * (log_a - log(sum)) - largest;
}

}  // namespace fusedopt::FUSEDOPT_TARGET
