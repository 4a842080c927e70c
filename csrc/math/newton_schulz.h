// How Newton–Schulz scales a matrix before anything is multiplied: by a power of two, and one rounding.
#pragma once
#include <cstdint>

#include "math/storage.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int kTopExponent = 14;  // the largest element is scaled to [2^14, 2^15): float16 has the most room below

#ifdef __CUDACC__
#pragma nv_exec_check_disable  // the body's side, host or device, is its caller's
#endif
template <typename F>
HOST_DEVICE void with_codec(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kFloat64: return body(Float64());
    case DType::kBFloat16: return body(BFloat16());
    case DType::kFloat16: return body(Float16());
    default: return body(Float32());
  }
}

// One rounding from arithmetic's numbers to memory's.
template <typename Codec, typename S>
HOST_DEVICE FUSEDOPT_INLINE typename Codec::Stored encode(S x) {
  if constexpr (sizeof(typename Codec::Stored) == 2 && sizeof(S) == 8)
    return Codec::encode(round_to_odd(x));
  else
    return typename Codec::Stored(Codec::encode(x));
}

template <typename V>
HOST_DEVICE V power_of_two(int exponent) {
  if constexpr (sizeof(V) == 4)
    return bit_cast<float>(uint32_t(127 + exponent) << 23);
  else
    return bit_cast<double>(uint64_t(1023 + exponent) << 52);
}

// Of a finite number above zero: the largest e with 2^e <= x.
HOST_DEVICE inline int exponent_of(double x) {
  const double normal = x < 0x1p-1022 ? x * 0x1p64 : x;
  return int(bit_cast<uint64_t>(normal) >> 52) - 1023 - (x < 0x1p-1022 ? 64 : 0);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
