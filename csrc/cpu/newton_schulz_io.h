// How Newton–Schulz reads a matrix, normalises it and writes the result: O(m n) beside the products' O(m n^2).
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/newton_schulz.h"
#include "cpu/operand.h"
#include "math/newton_schulz.h"
#include "math/value.h"

namespace fusedopt::FUSEDOPT_TARGET {

// A matrix with its short side as rows: tall ones are read and written transposed.
struct Sides {
  int64_t rows, columns;
  int64_t in_row, in_column, out_row, out_column;  // strides

  Sides(const NewtonSchulzMatrix& g, bool turned)
      : rows(turned ? g.columns : g.rows),
        columns(turned ? g.rows : g.columns),
        in_row(turned ? g.in_column_stride : g.in_stride),
        in_column(turned ? g.in_stride : g.in_column_stride),
        out_row(turned ? g.out_column_stride : g.out_stride),
        out_column(turned ? g.out_stride : g.out_column_stride) {}
};

// Square matrices are turned by what they hold, so that one and its transpose become the same: of the first two
// mirrored elements that differ, the larger comes to lie above the diagonal.
enum class Turn { kNo, kTransposed, kSymmetric };

inline Turn turn_of(const NewtonSchulzMatrix& g) {
  if (g.rows != g.columns) return g.rows > g.columns ? Turn::kTransposed : Turn::kNo;
  Turn turn = Turn::kSymmetric;
  with_codec(g.in_dtype, [&](auto codec) {
    using Codec = decltype(codec);
    const auto* const in = static_cast<const typename Codec::Stored*>(g.in);
    for (int64_t i = 0; i < g.rows; ++i)
      for (int64_t j = i + 1; j < g.columns; ++j) {
        const auto above = Codec::decode(in[i * g.in_stride + j * g.in_column_stride]);
        const auto below = Codec::decode(in[j * g.in_stride + i * g.in_column_stride]);
        if (above == below) continue;
        turn = above < below ? Turn::kTransposed : Turn::kNo;
        return;
      }
  });
  return turn;
}

// Calls body(i, j) for some rows' elements, in an order that walks a foreign array with these strides by short strides.
template <typename F>
FUSEDOPT_INLINE void for_elements(int64_t first_row, int64_t last_row, int64_t columns, int64_t row_stride,
                                  int64_t column_stride, const F& body) {
  if (column_stride <= row_stride)
    for (int64_t i = first_row; i < last_row; ++i)
      for (int64_t j = 0; j < columns; ++j) body(i, j);
  else
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = first_row; i < last_row; ++i) body(i, j);
}

// The largest magnitude in some rows; NaN if there is one, for NaNs have the largest bits.
inline double largest_magnitude(const NewtonSchulzMatrix& g, const Sides& s, int64_t first_row, int64_t last_row) {
  double result = 0;
  with_codec(g.in_dtype, [&](auto codec) {
    using Codec = decltype(codec);
    using Stored = typename Codec::Stored;
    using Bits =
        std::conditional_t<sizeof(Stored) == 8, uint64_t, std::conditional_t<sizeof(Stored) == 4, uint32_t, uint16_t>>;
    constexpr Bits kMagnitude = Bits(-1) >> 1;
    const auto* const in = static_cast<const Stored*>(g.in);
    Bits largest = 0;
    const auto look = [&](int64_t i, int64_t j) {
      const Bits bits = bit_cast<Bits>(in[i * s.in_row + j * s.in_column]) & kMagnitude;
      largest = bits > largest ? bits : largest;
    };
    if (s.in_column == 1)
      for (int64_t i = first_row; i < last_row; ++i)
        for (int64_t j = 0; j < s.columns; ++j) {
          const Bits bits = bit_cast<Bits>(in[i * s.in_row + j]) & kMagnitude;
          largest = bits > largest ? bits : largest;
        }
    else
      for_elements(first_row, last_row, s.columns, s.in_row, s.in_column, look);
    result = Codec::decode(bit_cast<Stored>(largest));
  });
  return result;
}

// Copies some rows to x, scaled by 2^exponent and then rounded to dtype.
template <typename T>
void load_rows(const NewtonSchulzMatrix& g, const Sides& s, DType dtype, int exponent, int64_t first_row,
               int64_t last_row, T* x, int64_t stride) {
  with_codec(g.in_dtype, [&](auto codec) {
    using Codec = decltype(codec);
    using V = decltype(Codec::decode({}));
    const auto* const in = static_cast<const typename Codec::Stored*>(g.in);
    // In two steps, since the power itself may be out of range.
    const V first = power_of_two<V>(exponent / 2), second = power_of_two<V>(exponent - exponent / 2);
    const auto load_as = [&](auto rounding) {
      using Rounding = decltype(rounding);
      if (s.in_column == 1) {
        for (int64_t i = first_row; i < last_row; ++i)
          for (int64_t j = 0; j < s.columns; ++j)
            write(x + i * stride + j,
                  Sum<T>(Rounding::decode(encode<Rounding>(Codec::decode(in[i * s.in_row + j]) * first * second))));
        return;
      }
      for_elements(first_row, last_row, s.columns, s.in_row, s.in_column, [&](int64_t i, int64_t j) {
        const V value = Codec::decode(in[i * s.in_row + j * s.in_column]) * first * second;
        write(x + i * stride + j, Sum<T>(Rounding::decode(encode<Rounding>(value))));
      });
    };
    if (dtype == g.in_dtype)
      load_as(Codec());
    else
      with_codec(dtype, load_as);
  });
}

// The same sum whatever the width of the machine's registers.
template <typename T>
double sum_of_squares(const T* row, int64_t columns) {
  double sums[8] = {};
  const auto add = [&](int lane, int64_t j) {
    const double x = read<Sum<T>>(row + j);
    sums[lane] += x * x;
  };
  int64_t j = 0;
  for (; j + 8 <= columns; j += 8)
    for (int l = 0; l < 8; ++l) add(l, j + l);
  for (int l = 0; j + l < columns; ++l) add(l, j + l);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <typename T>
void store_rows(const NewtonSchulzMatrix& g, const Sides& s, int64_t first_row, int64_t last_row, const T* x,
                int64_t stride) {
  with_codec(g.out_dtype, [&](auto codec) {
    using Codec = decltype(codec);
    auto* const out = static_cast<typename Codec::Stored*>(g.out);
    if (s.out_column == 1) {
      for (int64_t i = first_row; i < last_row; ++i)
        for (int64_t j = 0; j < s.columns; ++j)
          out[i * s.out_row + j] = encode<Codec>(read<Sum<T>>(x + i * stride + j));
      return;
    }
    for_elements(first_row, last_row, s.columns, s.out_row, s.out_column, [&](int64_t i, int64_t j) {
      out[i * s.out_row + j * s.out_column] = encode<Codec>(read<Sum<T>>(x + i * stride + j));
    });
  });
}

inline void fill_rows(const NewtonSchulzMatrix& g, const Sides& s, int64_t first_row, int64_t last_row, float value) {
  with_codec(g.out_dtype, [&](auto codec) {
    using Codec = decltype(codec);
    auto* const out = static_cast<typename Codec::Stored*>(g.out);
    for_elements(first_row, last_row, s.columns, s.out_row, s.out_column,
                 [&](int64_t i, int64_t j) { out[i * s.out_row + j * s.out_column] = encode<Codec>(value); });
  });
}

}  // namespace fusedopt::FUSEDOPT_TARGET
