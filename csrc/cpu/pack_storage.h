// The codecs of math/storage.h for packs. A codec moves a unit, two packs of numbers, between memory and registers.
//
// Order of the lanes: element-wise work does not care, as long as all roles agree. Two bf16 share a 32-bit word, so
// a unit of them opens with one shift and one mask into even and odd elements (kInterleaved, where every role is bf16);
// beside 32-bit roles they are widened in place (kLinear).
#pragma once
#include "cpu/pack.h"
#include "math/storage.h"

namespace fusedopt::FUSEDOPT_TARGET {

enum class LaneOrder { kLinear, kInterleaved };

typedef uint32_t Words __attribute__((vector_size(kPackBytes)));  // as many as Pack<float> has lanes
typedef uint16_t Halfwords __attribute__((vector_size(kPackBytes / 2)));

template <typename S>
using Unit = Pack<S>[2];

template <typename To>
inline To load_bytes(const void* from) {
  To to;
  memcpy(&to, from, sizeof to);
  return to;
}

// Rounds to nearest even: the result's upper halves; the lower ones are rubbish. A NaN may not carry into infinity:
// whether there is one is asked once for a unit, since that costs less than mending every lane. It can't where every
// role is bf16: arithmetic hands on an operand's NaN or makes the plain one, so its lower half is empty.
FUSEDOPT_INLINE Words round_to_bf16(Pack<float> x) {
  const Words bits = (Words)x.v;
  return bits + 0x7fff - (Words)((bits & 0x10000) == 0x10000);  // a comparison's true is -1; a shift would be dearer
}
FUSEDOPT_INLINE Words round_nan_to_bf16(Pack<float> x) { return x.v == x.v ? round_to_bf16(x) : (Words)x.v | 0x400000; }
FUSEDOPT_INLINE bool has_nan(const Unit<float>& x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x[0].v, (__m512)x[1].v, _CMP_UNORD_Q);
#elif defined(__AVX2__) && FUSEDOPT_PACK_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x[0].v, (__m256)x[1].v, _CMP_UNORD_Q));
#else
  bool nan = false;
  for (int i = 0; i < Pack<float>::kLanes; ++i) nan |= x[0].v[i] != x[0].v[i] || x[1].v[i] != x[1].v[i];
  return nan;
#endif
}

FUSEDOPT_INLINE Words widen(Halfwords half) {
#if defined(__AVX2__) && FUSEDOPT_PACK_BYTES == 32  // GCC 12's own conversion takes three instructions
  return (Words)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Words);
#endif
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
        x[i] = (Pack<float>::Raw)(widen(half) << 16);
      }
    }
  }
  static FUSEDOPT_INLINE void store(uint16_t* to, const Unit<float>& x) {
    if (kOrder == LaneOrder::kLinear && __builtin_expect(has_nan(x), false))
      pack(to, round_nan_to_bf16(x[0]), round_nan_to_bf16(x[1]));
    else
      pack(to, round_to_bf16(x[0]), round_to_bf16(x[1]));
  }

 private:
  static FUSEDOPT_INLINE void pack(uint16_t* to, Words first, Words second) {
    if constexpr (kOrder == LaneOrder::kInterleaved) {
#if defined(__AVX2__) && FUSEDOPT_PACK_BYTES == 32
      const __m256i words = _mm256_blend_epi16((__m256i)(first >> 16), (__m256i)second, 0xaa);
#else
      const Words words = first >> 16 | (second & 0xffff0000);
#endif
      memcpy(to, &words, sizeof words);
    } else {
#if defined(__AVX2__) && FUSEDOPT_PACK_BYTES == 32
      const __m256i halves = _mm256_packus_epi32((__m256i)(first >> 16), (__m256i)(second >> 16));
      _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(halves, 0xd8));
#else
      const Halfwords a = __builtin_convertvector(first >> 16, Halfwords);
      const Halfwords b = __builtin_convertvector(second >> 16, Halfwords);
      memcpy(to, &a, sizeof a);
      memcpy(to + Pack<float>::kLanes, &b, sizeof b);
#endif
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
