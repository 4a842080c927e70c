// Units: kWidth consecutive elements that a thread takes at once, 16 bytes of the narrowest dtype, of dtypes known when
// the kernel runs.
#pragma once
#include "cuda/elementwise.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

__device__ inline int bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

template <typename T>
__device__ inline T* address(const uint64_t* row, int word) {
  return reinterpret_cast<T*>(row[word]);
}

// Calls f(codec) for those of which a unit is some 16 bytes, none wider than S.
template <typename S, int kWidth, typename F>
__device__ inline void with_codec(DType dtype, F f) {
  constexpr bool kNarrow = kWidth * sizeof(uint16_t) >= kVectorBytes;
  switch (dtype) {
    case DType::kFloat64:
      if constexpr (sizeof(S) == sizeof(double)) f(Float64());
      break;
    case DType::kBFloat16:
      if constexpr (kNarrow) f(BFloat16());
      break;
    case DType::kFloat16:
      if constexpr (kNarrow) f(Float16());
      break;
    default: f(Float32());
  }
}
// A unit as it lies in memory, of any dtype no wider than S.
template <typename S, int kWidth>
using RawUnit = Raw<kWidth, sizeof(S)>;

template <typename S, int kWidth>
__device__ inline void load_unit(DType dtype, const char* from, RawUnit<S, kWidth>& raw) {
  switch (bytes_of(dtype)) {
    case 8:
      if constexpr (sizeof(S) == sizeof(double)) raw.template load_vector<kWidth * 8>(from);
      break;
    case 4: raw.template load_vector<kWidth * 4>(from); break;
    default:
      if constexpr (kWidth * sizeof(uint16_t) >= kVectorBytes) raw.template load_vector<kWidth * 2>(from);
  }
}
template <typename S, int kWidth>
__device__ inline void decode_unit(DType dtype, const RawUnit<S, kWidth>& raw, S (&x)[kWidth]) {
  with_codec<S, kWidth>(dtype, [&](auto codec) { raw.template decode<decltype(codec)>(x); });
}
template <typename S, int kWidth>
__device__ inline void store_unit(DType dtype, char* to, const S (&x)[kWidth]) {
  with_codec<S, kWidth>(dtype, [&](auto codec) {
    RawUnit<S, kWidth> raw;
    raw.template encode<decltype(codec)>(x);
    raw.template store_vector<kWidth * sizeof(typename decltype(codec)::Stored)>(to);
  });
}

// A unit of the arithmetic's own numbers, in shared memory or in a workspace, 16 bytes at a time.
template <typename S, int kWidth>
__device__ inline void write_unit(S* to, const S (&x)[kWidth]) {
  uint4 pieces[kWidth * sizeof(S) / kVectorBytes];
  memcpy(pieces, x, sizeof pieces);
#pragma unroll
  for (const uint4& piece : pieces) reinterpret_cast<uint4*>(to)[&piece - pieces] = piece;
}
template <typename S, int kWidth>
__device__ inline void read_unit(const S* from, S (&x)[kWidth]) {
  uint4 pieces[kWidth * sizeof(S) / kVectorBytes];
#pragma unroll
  for (uint4& piece : pieces) piece = reinterpret_cast<const uint4*>(from)[&piece - pieces];
  memcpy(x, pieces, sizeof pieces);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
