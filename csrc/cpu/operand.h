// What a matrix of cpu/gemm.h holds: float, double, or bfloat16, whose products are summed in float.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/pack_storage.h"

namespace fusedopt::FUSEDOPT_TARGET {

struct Brain {  // bfloat16 as an element
  uint16_t bits;
};

template <typename T>
struct Operand {
  using Sum = T;
};
template <>
struct Operand<Brain> {
  using Sum = float;
};
template <typename T>
using Sum = typename Operand<T>::Sum;

template <typename T>
constexpr int kPair = sizeof(Sum<T>) / sizeof(T);  // elements along the depth that share a lane

// One element, or a pack of neighbours, as numbers to compute with; V is Sum<T> or a Pack of it.
template <typename V, typename T>
FUSEDOPT_INLINE V read(const T* from) {
  return load_bytes<V>(from);
}
template <>
FUSEDOPT_INLINE float read<float, Brain>(const Brain* from) {
  return bf16_to_float(from->bits);
}
template <>
FUSEDOPT_INLINE Pack<float> read<Pack<float>, Brain>(const Brain* from) {
  return (Pack<float>::Raw)(widen(load_bytes<Halfwords>(from)) << 16);
}

template <typename T, typename V>
FUSEDOPT_INLINE void write(T* to, V x) {
  memcpy(to, &x, sizeof x);
}
FUSEDOPT_INLINE void write(Brain* to, float x) { to->bits = float_to_bf16(x); }
FUSEDOPT_INLINE void write(Brain* to, Pack<float> x) {
  const Halfwords halves = __builtin_convertvector(round_nan_to_bf16(x) >> 16, Halfwords);
  memcpy(to, &halves, sizeof halves);
}

// Two rows of bfloat16 as pairs.
FUSEDOPT_INLINE Words interleave(const Brain* even, const Brain* odd) {
  return widen(load_bytes<Halfwords>(even)) | widen(load_bytes<Halfwords>(odd)) << 16;
}

// ---- lanes of a product: one element of the left operand in all of them, neighbours of a panel of the right one

template <typename T>
FUSEDOPT_INLINE Pack<T> broadcast(const T* element) {
  return Pack<T>(*element);
}
template <typename T>
FUSEDOPT_INLINE Pack<T> load_lanes(const T* panel) {
  return load_bytes<typename Pack<T>::Raw>(panel);
}
template <typename T>
FUSEDOPT_INLINE Pack<T> multiply_add(Pack<T> left, Pack<T> right, Pack<T> sum) {
  return fma(left, right, sum);
}

#if defined(__AVX512BF16__)
FUSEDOPT_INLINE __m512bh broadcast(const Brain* pair) { return (__m512bh)(load_bytes<uint32_t>(pair) + Words{}); }
FUSEDOPT_INLINE __m512bh load_lanes(const Brain* panel) { return load_bytes<__m512bh>(panel); }
FUSEDOPT_INLINE Pack<float> multiply_add(__m512bh left, __m512bh right, Pack<float> sum) {
  return (Pack<float>::Raw)_mm512_dpbf16_ps((__m512)sum.v, left, right);
}
#endif

}  // namespace fusedopt::FUSEDOPT_TARGET
