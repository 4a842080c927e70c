// Matrix products for matrices that live in one workspace: C <- alpha L R + beta C0, where the result may be known to
// be symmetric. Then only the tiles that reach the lower triangle are computed, and each is stored twice.
//
// A register tile is kTileRows rows of the left matrix, read as they lie (row-major, one broadcast per element), times
// a panel of kTileColumns columns of the right one, packed as [depth][kTileColumns]. A block of tiles is one unit of
// work: its sums stay in L2 while slices of kDepth pass by, so each element is written once, by whoever computed it,
// and no result depends on the number of threads. 2 flops for each element, depth and (for symmetric ones half of it)
// result.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/pack.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int kTileRows = kPackBytes == 64 ? 8 : 6;  // 16 or 12 sums in registers, of 32 or 16
constexpr int kBlockRows = 96, kBlockColumns = 192;  // multiples of every tile
constexpr int64_t kDepth = 256;                      // a panel's slice is 16 KiB with AVX2, half of L1

template <typename S>
constexpr int kTileColumns = 2 * Pack<S>::kLanes;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <typename S>
FUSEDOPT_INLINE Pack<S> load_pack(const S* from) {
  typename Pack<S>::Raw raw;
  memcpy(&raw, from, sizeof raw);
  return raw;
}
template <typename S>
FUSEDOPT_INLINE void store_pack(S* to, Pack<S> x) {
  memcpy(to, &x.v, sizeof x.v);
}

// Panels of `columns` columns in all rows of a matrix: the right operand L R, or, since it is its own transpose, of a
// symmetric one. The last panel is filled up with zeros.
template <typename S>
void pack_columns(const S* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel, S* to) {
  constexpr int kWidth = kTileColumns<S>;
  const int64_t first = panel * kWidth, count = columns - first < kWidth ? columns - first : kWidth;
  to += first * rows;
  from += first;
  if (count == kWidth) {
    for (int64_t t = 0; t < rows; ++t)
      for (int i = 0; i < 2; ++i)
        store_pack(to + t * kWidth + i * Pack<S>::kLanes, load_pack(from + t * stride + i * Pack<S>::kLanes));
    return;
  }
  for (int64_t t = 0; t < rows; ++t)
    for (int i = 0; i < kWidth; ++i) to[t * kWidth + i] = i < count ? from[t * stride + i] : S(0);
}

// The same panels of the transpose of a matrix of `columns` rows and `rows` columns.
template <typename S>
void pack_rows(const S* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel, S* to) {
  constexpr int kWidth = kTileColumns<S>;
  const int64_t first = panel * kWidth, count = columns - first < kWidth ? columns - first : kWidth;
  to += first * rows;
  from += first * stride;
  for (int64_t t = 0; t < rows; ++t)
    for (int i = 0; i < kWidth; ++i) to[t * kWidth + i] = i < count ? from[i * stride + t] : S(0);
}

// One tile's sums over `depth`, stored to or added to `sums`.
template <typename S>
FUSEDOPT_INLINE void multiply_tile(const S* left, int64_t stride, const S* panel, int64_t depth, S* sums, bool add) {
  using P = Pack<S>;
  P sum[kTileRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = P(S(0));
  for (int64_t t = 0; t < depth; ++t) {
    const P r0 = load_pack(panel + t * kTileColumns<S>), r1 = load_pack(panel + t * kTileColumns<S> + P::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const P l(left[i * stride + t]);
      sum[i][0] = fma(l, r0, sum[i][0]);
      sum[i][1] = fma(l, r1, sum[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < 2; ++j) {
      S* const to = sums + i * kBlockColumns + j * P::kLanes;
      store_pack(to, add ? load_pack(to) + sum[i][j] : sum[i][j]);
    }
}

template <typename S>
struct Product {
  const S* left;   // rows x depth; its rows are readable up to a multiple of kTileRows
  const S* right;  // depth x columns, as panels
  const S* add;    // of the result's shape, or nullptr; may be the result
  S* result;
  int64_t rows, columns, depth;
  int64_t left_stride, stride;  // the latter of add and result
  S alpha, beta;
  bool symmetric;

  int64_t row_blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  int64_t column_blocks() const { return (columns + kBlockColumns - 1) / kBlockColumns; }
  int64_t blocks() const { return row_blocks() * column_blocks(); }
};

// alpha * sum + beta * add. With a factor on both sides they are rounded alike: where the terms of a polynomial cancel,
// one rounding less came out two to four times as wrong (a matrix with one large singular value, Polar Express).
template <typename V, typename S>
FUSEDOPT_INLINE V combine(V sum, S alpha, V add, S beta) {
  return alpha == S(1) ? fma(V(beta), add, sum) : V(alpha) * sum + V(beta) * add;
}

// The same for columns [first, last) of a row; `sums` keeps the result too.
template <typename S>
FUSEDOPT_INLINE void finish_row(const Product<S>& p, int64_t row, int64_t first, int64_t last, S* sums) {
  using P = Pack<S>;
  S* const to = p.result + row * p.stride;
  const S* const add = p.add ? p.add + row * p.stride : nullptr;
  int64_t j = first;
  for (; j + P::kLanes <= last; j += P::kLanes) {
    P x = load_pack(sums + (j - first));
    x = add ? combine(x, p.alpha, load_pack(add + j), p.beta) : x * P(p.alpha);
    store_pack(sums + (j - first), x);
    store_pack(to + j, x);
  }
  for (; j < last; ++j) {
    const S x = add ? combine(sums[j - first], p.alpha, add[j], p.beta) : sums[j - first] * p.alpha;
    to[j] = sums[j - first] = x;
  }
}

template <typename S>
void multiply_block(const Product<S>& p, int64_t block) {
  // From the last rows up: a symmetric result's largest blocks are the first ones taken.
  const int64_t row = (p.row_blocks() - 1 - block / p.column_blocks()) * kBlockRows;
  const int64_t column = block % p.column_blocks() * kBlockColumns;
  const int64_t last_row = row + kBlockRows < p.rows ? row + kBlockRows : p.rows;
  const int64_t last_column = column + kBlockColumns < p.columns ? column + kBlockColumns : p.columns;
  if (p.symmetric && column >= last_row) return;
  alignas(64) S sums[kBlockRows * kBlockColumns];
  for (int64_t t = 0; t < p.depth; t += kDepth) {
    const int64_t depth = p.depth - t < kDepth ? p.depth - t : kDepth;
    for (int64_t j = column; j < last_column; j += kTileColumns<S>) {
      const S* const panel = p.right + j * p.depth + t * kTileColumns<S>;
      int64_t i = row;
      if (p.symmetric && j > i) i += (j - i) / kTileRows * kTileRows;  // the first tile that reaches the diagonal
      for (; i < last_row; i += kTileRows)
        multiply_tile(p.left + i * p.left_stride + t, p.left_stride, panel, depth,
                      sums + (i - row) * kBlockColumns + (j - column), t > 0);
    }
  }
  for (int64_t i = row; i < last_row; ++i)
    finish_row(p, i, column, p.symmetric && i < last_column ? i + 1 : last_column, sums + (i - row) * kBlockColumns);
  if (!p.symmetric) return;
  for (int64_t j = column; j < last_column; ++j)
    for (int64_t i = j >= row ? j + 1 : row; i < last_row; ++i)
      p.result[j * p.stride + i] = sums[(i - row) * kBlockColumns + (j - column)];
}

}  // namespace fusedopt::FUSEDOPT_TARGET
