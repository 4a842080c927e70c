// AdamW, one coordinate (Loshchilov & Hutter, arXiv:1711.05101; decay as in torch.optim.AdamW).
//
//   g <- ± g / grad_scale                    (maximize, loss scaling)
//   m <- b1 m + (1 - b1) g                   v <- b2 v + (1 - b2) g^2
//   p <- p (1 - lr wd) - lr/c1 * m / (sqrt(v)/sqrt(c2) + eps),   c_i = 1 - b_i^step
//   amsgrad: the root is taken of u <- max(u, v) instead (Reddi et al., arXiv:1904.09237)
//
// Memory traffic: reads p g m v, writes p m v = 28 bytes per element in fp32, 14 in bf16 (amsgrad: 36, 18).
#pragma once
#include "math/power.h"
#include "math/value.h"

namespace fusedopt {

struct AdamWRole {
  enum { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kCount };
};

struct AdamWOptions {  // one tensor's hyperparameters, as the user gave them
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;

  bool operator==(const AdamWOptions& o) const {
    return lr == o.lr && beta1 == o.beta1 && beta2 == o.beta2 && eps == o.eps && weight_decay == o.weight_decay &&
           maximize == o.maximize;
  }
};

template <typename S>
struct AdamWScalars {  // the same for every coordinate of one tensor; computed in double, then rounded once to S
  S lerp_weight;       // 1 - b1, or -b1 where the gradient is the nearer end (b1 < 1/2)
  S beta2, eps;
  S grad_weight;  // (1 - b2) / grad_scale^2
  S decay;        // 1 - lr * weight_decay
  S rate;         // -lr / c1
  S inv_sqrt_c2;
  S grad_factor;  // ±1 / grad_scale
  bool lerp_from_grad;

  template <typename T>
  HOST_DEVICE AdamWScalars<T> as() const {
    return {T(lerp_weight), T(beta2),       T(eps),         T(grad_weight), T(decay),
            T(rate),        T(inv_sqrt_c2), T(grad_factor), lerp_from_grad};
  }
};

}  // namespace fusedopt

namespace fusedopt::FUSEDOPT_TARGET {

HOST_DEVICE inline AdamWScalars<double> adamw_scalars(const AdamWOptions& o, int64_t step, double inv_grad_scale) {
  const bool from_grad = o.beta1 < 0.5;
  return {from_grad ? -o.beta1 : 1.0 - o.beta1,
          o.beta2,
          o.eps,
          (1.0 - o.beta2) * inv_grad_scale * inv_grad_scale,
          1.0 - o.lr * o.weight_decay,
          -o.lr / bias_correction(o.beta1, step),
          1.0 / sqrt(bias_correction(o.beta2, step)),
          o.maximize ? -inv_grad_scale : inv_grad_scale,
          from_grad};
}

template <typename V, typename Scalars>  // V: float, double, or a pack of them
HOST_DEVICE FUSEDOPT_INLINE void adamw_first_moment(V g, V& m, const Scalars& k) {
  const V difference = fms(k.grad_factor, g, m);
  m = fma(k.lerp_weight, difference, k.lerp_from_grad ? k.grad_factor * g : m);  // so that m = g stays put exactly
}

template <typename V>  // u is left alone without amsgrad
HOST_DEVICE FUSEDOPT_INLINE void adamw_moments(V g, V& m, V& v, V& u, bool amsgrad, const AdamWScalars<V>& k) {
  adamw_first_moment(g, m, k);
  v = fma(k.beta2, v, (k.grad_weight * g) * g);  // in this order: g * g overflows where the product need not
  if (amsgrad) u = maximum(u, v);
}

// The parameter's update in three parts, for kernels that have several elements under way.
template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V adamw_root(V v, V u, bool amsgrad) {
  return sqrt(amsgrad ? u : v);
}

template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V adamw_direction(V m, V root, const AdamWScalars<V>& k) {
  return m / fma(root, k.inv_sqrt_c2, k.eps);
}

template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V adamw_param(V p, V direction, const AdamWScalars<V>& k) {
  return fma(k.rate, direction, p * k.decay);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
