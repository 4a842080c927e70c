// Codecs for one number: how it lies in memory, and how arithmetic reads and writes it. Packs of numbers have the
// same codecs in cpu/pack_storage.h; both round to nearest even and keep subnormals, infinities and NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "math/target.h"

namespace fusedopt::FUSEDOPT_TARGET {

template <typename To, typename From>
HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// bfloat16 is the upper half of a float.
HOST_DEVICE inline float bf16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }
HOST_DEVICE inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);  // a NaN's payload may not round up to infinity
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A double on its way to bf16 rounds once: first to a float that is odd where it was inexact, so no tie is invented.
HOST_DEVICE inline float round_to_odd(double value) {
  const float nearest = float(value);
  if (double(nearest) == value || value != value) return nearest;
  const uint32_t bits = bit_cast<uint32_t>(nearest);
  const bool grew = (nearest < 0 ? -double(nearest) : double(nearest)) > (value < 0 ? -value : value);
  return bit_cast<float>((grew ? bits - 1 : bits) | 1);
}

// float16, through the float whose exponent field the half's bits become when shifted into place.
HOST_DEVICE inline float fp16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | magnitude << 13);
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(uint32_t(127 + 112) << 23);  // * 2^112
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}
HOST_DEVICE inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: adding 1/2 lines the subnormal's bits up
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

struct Float32 {
  using Stored = float;
  static constexpr DType kDType = DType::kFloat32;
  HOST_DEVICE static float decode(float x) { return x; }
  HOST_DEVICE static float encode(float x) { return x; }
  HOST_DEVICE static float encode(double x) { return float(x); }
};
struct Float64 {
  using Stored = double;
  static constexpr DType kDType = DType::kFloat64;
  HOST_DEVICE static double decode(double x) { return x; }
  HOST_DEVICE static double encode(double x) { return x; }
};
struct BFloat16 {
  using Stored = uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  HOST_DEVICE static float decode(uint16_t x) { return bf16_to_float(x); }
  HOST_DEVICE static uint16_t encode(float x) { return float_to_bf16(x); }
  HOST_DEVICE static uint16_t encode(double x) { return float_to_bf16(round_to_odd(x)); }
};
struct Float16 {
  using Stored = uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  HOST_DEVICE static float decode(uint16_t x) { return fp16_to_float(x); }
  HOST_DEVICE static uint16_t encode(float x) { return float_to_fp16(x); }
};

}  // namespace fusedopt::FUSEDOPT_TARGET
