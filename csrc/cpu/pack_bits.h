// Packs seen as bits and comparisons: what math/exp.h and the transport kernels need beyond arithmetic.
#pragma once
#include "cpu/pack.h"
#include "math/exp.h"

namespace fusedopt::FUSEDOPT_TARGET {

typedef int32_t IntVector __attribute__((vector_size(kPackBytes)));
typedef int64_t LongVector __attribute__((vector_size(kPackBytes)));

inline Pack<double> scale_by_power(Pack<double> x, Pack<double> shifter) {
  return (DoubleVector)((LongVector)x.v + ((LongVector)shifter.v << 52));
}
inline Pack<float> scale_by_power(Pack<float> x, Pack<float> shifter) {
  return (FloatVector)((IntVector)x.v + ((IntVector)shifter.v << 23));
}

inline Pack<double> split_power(Pack<double> x, Pack<double>* m) {
  const LongVector half = 0x3fe6a09e667f3bcdll - LongVector{};
  const LongVector shifted = (LongVector)x.v - half;
  m->v = (DoubleVector)((shifted & 0x000fffffffffffffll) + half);
  // k as a double without a conversion, which AVX2 lacks: k + 1024 in the last bits of 2^52, then both taken away.
  const LongVector biased = (LongVector)((shifted + (1024ll << 52)) & (0xfffll << 52));
  const LongVector low = (LongVector)((biased >> 52) & 0xfffll);
  return Pack<double>((DoubleVector)(low | 0x4330000000000000ll)) - Pack<double>(0x1p52 + 1024);
}

template <typename S>
inline Pack<S> select_less(Pack<S> x, Pack<S> y, Pack<S> then, Pack<S> otherwise) {
  return Pack<S>(x.v < y.v ? then.v : otherwise.v);
}
template <typename S>
inline Pack<S> where_nan(Pack<S> x, Pack<S> otherwise) {
  return Pack<S>(x.v != x.v ? x.v : otherwise.v);
}

FUSEDOPT_INLINE Pack<double> exp(Pack<double> x) { return exp_of<double>(x); }
FUSEDOPT_INLINE Pack<float> exp(Pack<float> x) { return exp_of<float>(x); }
FUSEDOPT_INLINE Pack<double> log(Pack<double> x) { return log_of(x); }

template <typename S>
FUSEDOPT_INLINE Pack<S> larger(Pack<S> a, Pack<S> b) {  // one instruction; b where either is NaN
  return Pack<S>(a.v > b.v ? a.v : b.v);
}
template <typename S>
FUSEDOPT_INLINE Pack<S> smaller(Pack<S> a, Pack<S> b) {
  return Pack<S>(a.v < b.v ? a.v : b.v);
}

// Whether x >= y in any lane.
FUSEDOPT_INLINE bool any_at_least(Pack<double> x, Pack<double> y) {
  const LongVector mask = x.v >= y.v;
#if defined(__AVX2__)
  __m256d half[kPackBytes / 32];
  memcpy(half, &mask, kPackBytes);
  int any = 0;
  for (const __m256d part : half) any |= _mm256_movemask_pd(part);
  return any;
#else
  int64_t any = 0;
  for (int i = 0; i < Pack<double>::kLanes; ++i) any |= mask[i];
  return any;
#endif
}

// Sum and maximum of the lanes, halves first: a fixed tree.
FUSEDOPT_INLINE double sum_lanes(Pack<double> x) {
  double lane[Pack<double>::kLanes];
  memcpy(lane, &x.v, kPackBytes);
  for (int width = Pack<double>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
FUSEDOPT_INLINE double max_lanes(Pack<double> x) {
  double most = x.v[0];
  for (int i = 1; i < Pack<double>::kLanes; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}

FUSEDOPT_INLINE Pack<double> load(const double* from) {
  Pack<double> p;
  memcpy(&p.v, from, kPackBytes);
  return p;
}
FUSEDOPT_INLINE Pack<double> load(const float* from) {
  typedef float Half __attribute__((vector_size(kPackBytes / 2)));
  Half half;
  memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, DoubleVector);
}
FUSEDOPT_INLINE void store(double* to, Pack<double> p) { memcpy(to, &p.v, kPackBytes); }

}  // namespace fusedopt::FUSEDOPT_TARGET
