// The AVX-512 intrinsics that csrc/cpu uses, lane by lane, so that the AVX-512 source runs on a CPU without them.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

template <typename To, typename From>
inline To bits_as(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename S>
struct Lanes {
  S at[64 / sizeof(S)];
};

template <typename S, typename V, typename F>
inline V each_lane(V a, V b, V c, F f) {
  auto x = bits_as<Lanes<S>>(a), y = bits_as<Lanes<S>>(b), z = bits_as<Lanes<S>>(c);
  for (size_t i = 0; i < 64 / sizeof(S); ++i) x.at[i] = f(x.at[i], y.at[i], z.at[i]);
  return bits_as<V>(x);
}

inline __m512 twin_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each_lane<float>(a, b, c, [](float x, float y, float z) { return std::fma(x, y, z); });
}
inline __m512d twin_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return each_lane<double>(a, b, c, [](double x, double y, double z) { return std::fma(x, y, z); });
}
inline __m512 twin_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return each_lane<float>(a, b, c, [](float x, float y, float z) { return std::fma(x, y, -z); });
}
inline __m512d twin_fmsub_pd(__m512d a, __m512d b, __m512d c) {
  return each_lane<double>(a, b, c, [](double x, double y, double z) { return std::fma(x, y, -z); });
}
inline __m512 twin_sqrt_ps(__m512 a) {
  return each_lane<float>(a, a, a, [](float x, float, float) { return std::sqrt(x); });
}
inline __m512d twin_sqrt_pd(__m512d a) {
  return each_lane<double>(a, a, a, [](double x, double, double) { return std::sqrt(x); });
}
inline __m512 twin_cvtph_ps(__m256i half) {
  uint16_t in[16];
  Lanes<float> out;
  memcpy(in, &half, sizeof in);
  for (int i = 0; i < 16; ++i) out.at[i] = _cvtsh_ss(in[i]);
  return bits_as<__m512>(out);
}
inline __m256i twin_cvtps_ph(__m512 x, int) {
  const auto in = bits_as<Lanes<float>>(x);
  uint16_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = uint16_t(_cvtss_sh(in.at[i], _MM_FROUND_TO_NEAREST_INT));
  return bits_as<__m256i>(out);
}
inline uint16_t twin_unordered(__m512 a, __m512 b) {
  const auto x = bits_as<Lanes<float>>(a), y = bits_as<Lanes<float>>(b);
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint16_t(x.at[i] != x.at[i] || y.at[i] != y.at[i]) << i;
  return mask;
}
// Two products a lane, the upper ones first. (The instruction takes subnormal numbers for zeros; this does not.)
inline __m512 twin_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  auto total = bits_as<Lanes<float>>(sum);
  const auto x = bits_as<Lanes<uint32_t>>(a), y = bits_as<Lanes<uint32_t>>(b);
  for (int i = 0; i < 16; ++i) {
    total.at[i] += bits_as<float>(x.at[i] & 0xffff0000) * bits_as<float>(y.at[i] & 0xffff0000);
    total.at[i] += bits_as<float>(x.at[i] << 16) * bits_as<float>(y.at[i] << 16);
  }
  return bits_as<__m512>(total);
}

#undef _mm512_cvtps_ph
#undef _mm512_cmp_ps_mask
#define _mm512_fmadd_ps twin_fmadd_ps
#define _mm512_fmadd_pd twin_fmadd_pd
#define _mm512_fmsub_ps twin_fmsub_ps
#define _mm512_fmsub_pd twin_fmsub_pd
#define _mm512_sqrt_ps twin_sqrt_ps
#define _mm512_sqrt_pd twin_sqrt_pd
#define _mm512_cvtph_ps twin_cvtph_ps
#define _mm512_cvtps_ph twin_cvtps_ph
#define _mm512_dpbf16_ps twin_dpbf16_ps
#define _mm512_cmp_ps_mask(a, b, predicate) twin_unordered(a, b)
#define __AVX512F__ 1
