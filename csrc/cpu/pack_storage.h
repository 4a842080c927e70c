// The codecs of math/storage.h for packs. A codec moves a unit, two packs of numbers, between memory and registers.
//
// Order of the lanes: element-wise work does not care, as long as all roles agree. Two bf16 share a 32-bit word, so
// a unit of them opens with one shift and one mask into even and odd elements (kInterleaved); beside 32-bit roles
// they are widened in place (kLinear).
#pragma once
#include "cpu/pack.h"
#include "math/storage.h"

namespace fusedopt::FUSEDOPT_TARGET {

enum class LaneOrder { kLinear, kInterleaved };

typedef uint32_t Words __attribute__((vector_size(kPackBytes)));          // as many as Pack<float> has lanes
typedef uint16_t Halfwords __attribute__((vector_size(kPackBytes / 2)));

template <typename S>
using Unit = Pack<S>[2];

template <typename To>
inline To load_bytes(const void* from) {
  To to;
  memcpy(&to, from, sizeof to);
  return to;
}

inline Words round_to_bf16(Pack<float> x) {  // the result's upper halves; the lower ones are rubbish
  const Words bits = (Words)x.v;
  const Words rounded = bits + 0x7fff + (bits >> 16 & 1);
  return x.v == x.v ? rounded : bits | 0x400000;
}

template <typename S>
struct PackPlain {  // float or double, as they are
  using Stored = S;
  using Value = S;
  static FUSEDOPT_INLINE void load(const S* from, Unit<S>& x) {
    for (int i = 0; i < 2; ++i) x[i] = load_bytes<typename Pack<S>::Raw>(from + i * Pack<S>::kLanes);
  }
  static FUSEDOPT_INLINE void store(S* to, const Unit<S>& x) {
    for (int i = 0; i < 2; ++i) memcpy(to + i * Pack<S>::kLanes, &x[i].v, kPackBytes);
  }
};

template <LaneOrder kOrder>
struct PackBFloat16 {
  using Stored = uint16_t;
  using Value = float;
  static FUSEDOPT_INLINE void load(const uint16_t* from, Unit<float>& x) {
    if constexpr (kOrder == LaneOrder::kInterleaved) {
      const Words words = load_bytes<Words>(from);
      x[0] = (Pack<float>::Raw)(words << 16);
      x[1] = (Pack<float>::Raw)(words & 0xffff0000);
    } else {
      for (int i = 0; i < 2; ++i) {
        const Halfwords half = load_bytes<Halfwords>(from + i * Pack<float>::kLanes);
        x[i] = (Pack<float>::Raw)(__builtin_convertvector(half, Words) << 16);
      }
    }
  }
  static FUSEDOPT_INLINE void store(uint16_t* to, const Unit<float>& x) {
    if constexpr (kOrder == LaneOrder::kInterleaved) {
      const Words words = round_to_bf16(x[0]) >> 16 | (round_to_bf16(x[1]) & 0xffff0000);
      memcpy(to, &words, sizeof words);
    } else {
      for (int i = 0; i < 2; ++i) {
        const Halfwords half = __builtin_convertvector(round_to_bf16(x[i]) >> 16, Halfwords);
        memcpy(to + i * Pack<float>::kLanes, &half, sizeof half);
      }
    }
  }
};

struct PackFloat16 {
  using Stored = uint16_t;
  using Value = float;
  static FUSEDOPT_INLINE void load(const uint16_t* from, Unit<float>& x) {
    for (int i = 0; i < 2; ++i) x[i] = widen(from + i * Pack<float>::kLanes);
  }
  static FUSEDOPT_INLINE void store(uint16_t* to, const Unit<float>& x) {
    for (int i = 0; i < 2; ++i) narrow(to + i * Pack<float>::kLanes, x[i]);
  }

 private:
#if defined(__AVX512F__)
  static Pack<float> widen(const uint16_t* from) {
    return (Pack<float>::Raw)_mm512_cvtph_ps(load_bytes<__m256i>(from));
  }
  static void narrow(uint16_t* to, Pack<float> x) {
    const __m256i half = _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &half, sizeof half);
  }
#elif defined(__F16C__) && FUSEDOPT_PACK_BYTES == 32
  static Pack<float> widen(const uint16_t* from) {
    return (Pack<float>::Raw)_mm256_cvtph_ps(load_bytes<__m128i>(from));
  }
  static void narrow(uint16_t* to, Pack<float> x) {
    const __m128i half = _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &half, sizeof half);
  }
#else
  static Pack<float> widen(const uint16_t* from) {
    Pack<float> x;
    for (int i = 0; i < Pack<float>::kLanes; ++i) x.v[i] = fp16_to_float(from[i]);
    return x;
  }
  static void narrow(uint16_t* to, Pack<float> x) {
    for (int i = 0; i < Pack<float>::kLanes; ++i) to[i] = float_to_fp16(x.v[i]);
  }
#endif
};

}  // namespace fusedopt::FUSEDOPT_TARGET
