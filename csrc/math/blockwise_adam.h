// Blockwise Adam (Xie, Mohamadi & Li, arXiv:2410.08198; Adam-mini, arXiv:2406.16793): AdamW with one second moment per
// block b of coordinates, with bias correction, eps outside the root and decoupled decay.
//
//   g <- ± g / grad_scale                    (maximize, loss scaling)
//   m <- b1 m + (1 - b1) g                   v_b <- b2 v_b + (1 - b2) mean over b of g^2
//   p <- p (1 - lr wd) - lr/c1 * m / (sqrt(v_b)/sqrt(c2) + eps),   c_i = 1 - b_i^step
//
// A block's numbers are few, so they are computed in double: squares of float32 can't overflow there, and 12 decades
// of gradients add up without loss. v_b is kept in float32; the step itself uses it before it is rounded. Blocks of one
// coordinate are AdamW, bit for bit (math/adamw.h).
//
// Memory traffic: reads p g m, writes p m = 20 bytes per element in fp32, 10 in bf16; g is read twice, the second time
// from a cache where its block fits one (24 and 12 bytes else).
#pragma once
#include "math/adamw.h"

namespace fusedopt {

struct BlockwiseAdamRole {
  enum { kParam, kGrad, kExpAvg, kBlockSq, kCount };
};

}  // namespace fusedopt

namespace fusedopt::FUSEDOPT_TARGET {

// One block: updates v_b, not yet rounded to float32, from the sum of its squared gradients as they are stored, and
// returns -lr/c1 / (sqrt(v_b)/sqrt(c2) + eps), what m is to be multiplied by. weight: grad_weight / the block's size.
template <typename V>  // double, or a pack of them
HOST_DEVICE FUSEDOPT_INLINE V blockwise_adam_rate(V& v, V sum, V weight, const AdamWScalars<V>& k) {
  v = fma(k.beta2, v, weight * sum);
  return k.rate / fma(sqrt(v), k.inv_sqrt_c2, k.eps);
}

template <typename V>  // one coordinate, its first moment updated
HOST_DEVICE FUSEDOPT_INLINE void blockwise_adam_param(V& p, V m, V rate, V decay) {
  p = fma(rate, m, p * decay);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
