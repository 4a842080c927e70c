// One SIMD register of numbers, with the arithmetic of math/value.h. Written in the compiler's vector extensions, so
// one text serves AVX-512, AVX2, SSE2 and NEON; intrinsics stand only where the extensions have no word for it.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "math/value.h"

#ifndef FUSEDOPT_PACK_BYTES
#define FUSEDOPT_PACK_BYTES 16
#endif

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int kPackBytes = FUSEDOPT_PACK_BYTES;

typedef float FloatVector __attribute__((vector_size(kPackBytes)));
typedef double DoubleVector __attribute__((vector_size(kPackBytes)));

template <typename S>
struct Pack {
  static constexpr int kLanes = kPackBytes / sizeof(S);
  using Raw = std::conditional_t<sizeof(S) == 4, FloatVector, DoubleVector>;
  Raw v;

  Pack() = default;
  Pack(Raw raw) : v(raw) {}
  explicit Pack(S scalar) : v(scalar - Raw{}) {}

  friend Pack operator+(Pack a, Pack b) { return a.v + b.v; }
  friend Pack operator-(Pack a, Pack b) { return a.v - b.v; }
  friend Pack operator*(Pack a, Pack b) { return a.v * b.v; }
  friend Pack operator/(Pack a, Pack b) { return a.v / b.v; }
};

#if defined(__AVX512F__)
inline Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  return (Pack<float>::Raw)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
}
inline Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) {
  return (Pack<double>::Raw)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v);
}
inline Pack<float> fms(Pack<float> a, Pack<float> b, Pack<float> c) {
  return (Pack<float>::Raw)_mm512_fmsub_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
}
inline Pack<double> fms(Pack<double> a, Pack<double> b, Pack<double> c) {
  return (Pack<double>::Raw)_mm512_fmsub_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v);
}
inline Pack<float> sqrt(Pack<float> a) { return (Pack<float>::Raw)_mm512_sqrt_ps((__m512)a.v); }
inline Pack<double> sqrt(Pack<double> a) { return (Pack<double>::Raw)_mm512_sqrt_pd((__m512d)a.v); }
#elif defined(__AVX2__) && FUSEDOPT_PACK_BYTES == 32
inline Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  return (Pack<float>::Raw)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
}
inline Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) {
  return (Pack<double>::Raw)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v);
}
inline Pack<float> fms(Pack<float> a, Pack<float> b, Pack<float> c) {
  return (Pack<float>::Raw)_mm256_fmsub_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
}
inline Pack<double> fms(Pack<double> a, Pack<double> b, Pack<double> c) {
  return (Pack<double>::Raw)_mm256_fmsub_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v);
}
inline Pack<float> sqrt(Pack<float> a) { return (Pack<float>::Raw)_mm256_sqrt_ps((__m256)a.v); }
inline Pack<double> sqrt(Pack<double> a) { return (Pack<double>::Raw)_mm256_sqrt_pd((__m256d)a.v); }
#else
template <typename S>
inline Pack<S> fma(Pack<S> a, Pack<S> b, Pack<S> c) {
  for (int i = 0; i < Pack<S>::kLanes; ++i) c.v[i] = fma(S(a.v[i]), S(b.v[i]), S(c.v[i]));
  return c;
}
template <typename S>
inline Pack<S> fms(Pack<S> a, Pack<S> b, Pack<S> c) {
  return fma(a, b, Pack<S>(-c.v));
}
template <typename S>
inline Pack<S> sqrt(Pack<S> a) {
  for (int i = 0; i < Pack<S>::kLanes; ++i) a.v[i] = sqrt(S(a.v[i]));
  return a;
}
#endif

template <typename S>
inline Pack<S> maximum(Pack<S> a, Pack<S> b) {
  return Pack<S>((a.v > b.v) | (a.v != a.v) ? a.v : b.v);
}

template <typename S>
inline Pack<S> where_not_negative(Pack<S> x, Pack<S> a, Pack<S> b) {
  return Pack<S>(x.v >= 0 ? a.v : b.v);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
