// Sums of squares, in double: there those of float32 can't overflow, and 12 decades of them add up without loss. 2
// conversions and 2 fma for 8 elements of AVX2, which loads from memory hide.
#pragma once
#include "cpu/blocks.h"
#include "cpu/pack_storage.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int64_t kSquaresAhead = 64;  // elements

using Double = Pack<double>;
constexpr int kDoubles = Double::kLanes;

FUSEDOPT_INLINE void widen(Pack<double> x, Double (&wide)[1]) { wide[0] = x; }
FUSEDOPT_INLINE void widen(Pack<float> x, Double (&wide)[2]) {
#if defined(__AVX2__) && FUSEDOPT_PACK_BYTES == 32
  wide[0] = (Double::Raw)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x.v));
  wide[1] = (Double::Raw)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x.v, 1));
#else
  typedef float Half __attribute__((vector_size(kPackBytes / 2)));
  Half half[2];
  memcpy(half, &x.v, sizeof half);
  for (int i = 0; i < 2; ++i) wide[i] = __builtin_convertvector(half[i], Double::Raw);
#endif
}

// Element i goes to sum i % kSumLanes, in every instruction set.
struct LaneSums {
  static constexpr int kPacks = kSumLanes / kDoubles;
  Double at[kPacks];

  LaneSums() {
    for (Double& sum : at) sum = Double(0.0);
  }

  template <typename Codec>
  FUSEDOPT_INLINE void add_lanes(const typename Codec::Stored* from) {
    using S = typename Codec::Value;
    constexpr int kWide = sizeof(double) / sizeof(S), kUnit = 2 * Pack<S>::kLanes;
    Unit<S> x;
    Double wide[kWide];
#pragma GCC unroll 8
    for (int i = 0; i < kPacks; ++i) {
      if (i % (2 * kWide) == 0) Codec::load(from + i / (2 * kWide) * kUnit, x);
      if (i % kWide == 0) widen(x[i / kWide % 2], wide);
      at[i] = fma(wide[i % kWide], wide[i % kWide], at[i]);
    }
  }

  // Beside each line that it reads it fetches one that lies `ahead` bytes further; 0: none.
  template <typename Codec>
  void add(const typename Codec::Stored* from, int64_t n, int64_t ahead) {
    LaneSums sums = *this;  // a copy that stays in registers
    int64_t i = 0;
    for (; i + kSumLanes <= n; i += kSumLanes) {
      for (int64_t line = 0; line < int64_t(kSumLanes * sizeof *from); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from + i) + line + ahead, 0, 0);
      sums.add_lanes<Codec>(from + i);
    }
    if (i < n) {
      typename Codec::Stored padded[kSumLanes] = {};
      memcpy(padded, from + i, (n - i) * sizeof *from);
      sums.add_lanes<Codec>(padded);
    }
    *this = sums;
  }

  double total() const {
    LaneSums sums = *this;
    for (int half = kPacks / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums.at[i] = sums.at[i] + sums.at[i + half];
    double lanes[kDoubles];
    memcpy(lanes, &sums.at[0].v, sizeof lanes);
    for (int half = kDoubles / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

// Adds the squares of a unit of elements in each of kRows rows to the sums of their columns. What comes next in each
// row is asked for: rows that lie far apart keep more of memory busy than one stream could.
template <typename Codec, int kRows>
FUSEDOPT_INLINE void add_unit(double* sums, const typename Codec::Stored* from, int64_t stride) {
  using S = typename Codec::Value;
  constexpr int kWide = sizeof(double) / sizeof(S), kPacks = 2 * kWide;
  Double sum[kPacks];
#pragma GCC unroll 4
  for (int i = 0; i < kPacks; ++i) sum[i] = load_bytes<Double::Raw>(sums + i * kDoubles);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    Unit<S> x;
    Double wide[kWide];
    __builtin_prefetch(from + r * stride + kSquaresAhead, 0, 3);  // to stay: the update reads it again
    Codec::load(from + r * stride, x);
#pragma GCC unroll 4
    for (int i = 0; i < kPacks; ++i) {
      if (i % kWide == 0) widen(x[i / kWide], wide);
      sum[i] = fma(wide[i % kWide], wide[i % kWide], sum[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPacks; ++i) memcpy(sums + i * kDoubles, &sum[i].v, sizeof sum[i].v);
}

// The same for n elements of each row.
template <typename Codec, int kRows>
void add_squares(double* sums, const typename Codec::Stored* from, int64_t stride, int64_t n) {
  constexpr int kUnit = 2 * Pack<typename Codec::Value>::kLanes;
  int64_t i = 0;
  for (; i + kUnit <= n; i += kUnit) add_unit<Codec, kRows>(sums + i, from + i, stride);
  if (i == n) return;
  typename Codec::Stored padded[kRows * kUnit] = {};
  for (int r = 0; r < kRows; ++r) memcpy(padded + r * kUnit, from + r * stride + i, (n - i) * sizeof *from);
  add_unit<Codec, kRows>(sums + i, padded, kUnit);
}

inline double sum_of(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}
// Of four runs of n, in the same order, side by side.
inline void four_sums_of(const double* x, int64_t n, double* sums) {
  double s[4] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int j = 0; j < 4; ++j) s[j] += x[j * n + i];
  memcpy(sums, s, sizeof s);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
