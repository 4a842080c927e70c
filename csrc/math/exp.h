// exp and log of our own: the same text for numbers and SIMD packs, no call into libm, no branch.
//
// exp(x) = 2^k (1 + r + r^2 q(r)), k = round(x / ln 2), |r| <= ln(2) / 2, with q the minimax polynomial of relative
// error 4e-18 (double) and 3e-9 (float). Within 1.1 ulp everywhere, subnormal results included (tests/test_exp.py holds
// it to that), with a fused multiply-add or without. exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
//
// log(x) = k ln 2 + 2 atanh(s), s = (m - 1) / (m + 1), x = 2^k m, sqrt(1/2) <= m < sqrt(2). Below 2 ulp for every
// positive normal number; log(0) = -inf, log(inf) = inf. Subnormal and negative numbers are not for it.
//
// Per double: exp 17 multiply-adds and 6 others (13 + 3 within_range), log 14, a division and 8 others.
#pragma once
#include <cstdint>
#include <cstring>

#include "math/value.h"

namespace fusedopt::FUSEDOPT_TARGET {

// What the formulas need beside arithmetic; packs overload these in cpu/pack_bits.h.
// x 2^k, where shifter = k + kMagic and the result is a normal number.
HOST_DEVICE inline double scale_by_power(double x, double shifter) {
  uint64_t bits, k;
  memcpy(&bits, &x, 8);
  memcpy(&k, &shifter, 8);
  bits += k << 52;
  memcpy(&x, &bits, 8);
  return x;
}
HOST_DEVICE inline float scale_by_power(float x, float shifter) {
  uint32_t bits, k;
  memcpy(&bits, &x, 4);
  memcpy(&k, &shifter, 4);
  bits += k << 23;
  memcpy(&x, &bits, 4);
  return x;
}
// Splits a positive normal x = 2^k m, sqrt(1/2) <= m < sqrt(2); returns k.
HOST_DEVICE inline double split_power(double x, double* m) {
  const uint64_t kHalf = 0x3fe6a09e667f3bcdull;  // sqrt(1/2)
  uint64_t bits;
  memcpy(&bits, &x, 8);
  const uint64_t shifted = bits - kHalf, rest = (shifted & 0x000fffffffffffffull) + kHalf;
  memcpy(m, &rest, 8);
  return double(int64_t(shifted) >> 52);
}
HOST_DEVICE inline double select_less(double x, double y, double then, double otherwise) {
  return x < y ? then : otherwise;
}
HOST_DEVICE inline float select_less(float x, float y, float then, float otherwise) { return x < y ? then : otherwise; }
HOST_DEVICE inline double where_nan(double x, double otherwise) { return x != x ? x : otherwise; }
HOST_DEVICE inline float where_nan(float x, float otherwise) { return x != x ? x : otherwise; }

template <typename S>
struct ExpConstants;
template <>
struct ExpConstants<double> {
  static constexpr double kMagic = 0x1.8p52, kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 1.9082149292705877e-10;  // k * high is exact
  static constexpr double kLowest = -746.0, kHighest = 710.0;                            // results are 0 and inf there
};
template <>
struct ExpConstants<float> {
  static constexpr float kMagic = 0x1.8p23f, kLog2e = 0x1.715476p0f;
  static constexpr float kLn2High = 0.693115234375f, kLn2Low = 3.1946184945309415e-05f;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;
};

// q: even and odd powers apart, which halves the chain of dependent operations.
template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V exp_tail(V r, V r2, double) {
  V even = fma(V(2.763030624035685e-07), r2, V(2.4801492949750686e-05));
  even = fma(even, r2, V(0.001388888894375978));
  even = fma(even, r2, V(0.04166666666652973));
  even = fma(even, r2, V(0.5000000000000011));
  V odd = fma(V(2.5000023940315812e-08), r2, V(2.7557586783278443e-06));
  odd = fma(odd, r2, V(0.00019841269505802478));
  odd = fma(odd, r2, V(0.008333333333494961));
  odd = fma(odd, r2, V(0.1666666666666641));
  return fma(odd, r, even);
}
template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V exp_tail(V r, V r2, float) {
  V even = fma(V(0.0013814535729759897f), r2, V(0.041668390865111864f));
  even = fma(even, r2, V(0.49999993431811696f));
  const V odd = fma(V(0.008368745149348863f), r2, V(0.16666520398731471f));
  return fma(odd, r, even);
}

// exp(x - k ln 2).
template <typename S, typename V>
HOST_DEVICE FUSEDOPT_INLINE V exp_reduced(V x, V k) {
  using C = ExpConstants<S>;
  const V r = fma(k, V(-C::kLn2Low), fma(k, V(-C::kLn2High), x));
  const V r2 = r * r;
  return fma(exp_tail(r, r2, S()), r2, r) + V(S(1));
}

// For results that are normal numbers: |x| <= 708, in float 87. Whatever else gives nonsense.
template <typename S, typename V>
HOST_DEVICE FUSEDOPT_INLINE V exp_within_range(V x) {
  using C = ExpConstants<S>;
  const V shifter = fma(x, V(C::kLog2e), V(C::kMagic));
  return scale_by_power(exp_reduced<S>(x, shifter - V(C::kMagic)), shifter);
}

template <typename S, typename V>
HOST_DEVICE FUSEDOPT_INLINE V exp_of(V given) {
  using C = ExpConstants<S>;
  const V low = select_less(given, V(C::kLowest), V(C::kLowest), given);
  const V x = select_less(V(C::kHighest), low, V(C::kHighest), low);
  const V k = fma(x, V(C::kLog2e), V(C::kMagic)) - V(C::kMagic);
  // 2^k in two factors: one alone would be no normal number at the ends.
  const V first = fma(k, V(S(0.5)), V(C::kMagic));
  const V rest = (k - (first - V(C::kMagic))) + V(C::kMagic);
  return where_nan(given, scale_by_power(exp_reduced<S>(x, k), first) * scale_by_power(V(S(1)), rest));
}
HOST_DEVICE inline double exp(double x) { return exp_of<double>(x); }
HOST_DEVICE inline float exp(float x) { return exp_of<float>(x); }

template <typename V>
HOST_DEVICE FUSEDOPT_INLINE V log_of(V x) {
  V m;
  const V k = split_power(x, &m);
  const V s = (m - V(1.0)) / (m + V(1.0)), z = s * s, w = z * z;
  V even = fma(V(1.0 / 19), w, V(1.0 / 15));
  even = fma(even, w, V(1.0 / 11));
  even = fma(even, w, V(1.0 / 7));
  even = fma(even, w, V(1.0 / 3));
  V odd = fma(V(1.0 / 21), w, V(1.0 / 17));
  odd = fma(odd, w, V(1.0 / 13));
  odd = fma(odd, w, V(1.0 / 9));
  odd = fma(odd, w, V(1.0 / 5));
  const V tail = (s + s) * z * fma(odd, z, even);
  const V low = fma(k, V(ExpConstants<double>::kLn2Low), tail);
  const V main = fma(k, V(ExpConstants<double>::kLn2High), (s + s) + low);
  const V ended = select_less(V(1.7976931348623157e308), x, x, main);
  return select_less(x, V(2.2250738585072014e-308), V(-__builtin_inf()), ended);
}
HOST_DEVICE inline double log(double x) { return log_of(x); }

}  // namespace fusedopt::FUSEDOPT_TARGET
