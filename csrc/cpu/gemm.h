// Matrix products for matrices that live in one workspace: C <- alpha L R + beta C0, where the result may be known to
// be symmetric. Then only the tiles that reach the lower triangle are computed, and each is stored twice.
//
// A register tile is kTileRows rows of the left matrix, read as they lie (row-major, one broadcast per element), times
// a panel of kTileColumns columns of the right one, packed as [depth][kTileColumns]. A block of tiles is one unit of
// work: its sums stay in L2 while slices of kDepth pass by, so each element is written once, by whoever computed it,
// and no result depends on the number of threads. 2 flops for each element, depth and (for symmetric ones half of it)
// result.
//
// Operands of bfloat16 (AVX512-BF16) are multiplied in pairs along the depth, and summed in float: a panel is
// [depth / 2][kTileColumns][2], and odd depths are filled up with zeros.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/operand.h"
#include "cpu/pack.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int kTileRows = kPackBytes == 64 ? 8 : 6;  // 16 or 12 sums in registers, of 32 or 16
constexpr int kBlockRows = 96, kBlockColumns = 192;  // multiples of every tile
constexpr int64_t kDepth = 256;                      // a panel's slice is 16 KiB with AVX2, half of L1

template <typename T>
constexpr int kTileColumns = 2 * Pack<Sum<T>>::kLanes;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Panels of `columns` columns in all rows of a matrix: the right operand L R, or, since it is its own transpose, of a
// symmetric one. The last panel is filled up with zeros.
template <typename T>
void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel, T* to) {
  constexpr int kWidth = kTileColumns<T>, kLanes = kWidth / 2;
  const int64_t first = panel * kWidth, count = columns - first < kWidth ? columns - first : kWidth;
  to += first * round_up(rows, kPair<T>);
  from += first;
  const auto at = [&](int64_t row, int i) { return row < rows && i < count ? from[row * stride + i] : T{}; };
  for (int64_t t = 0; t < rows; t += kPair<T>, to += kWidth * kPair<T>) {
    if (count == kWidth && t + kPair<T> <= rows) {
      for (int i = 0; i < kWidth; i += kLanes)
        if constexpr (kPair<T> == 1)
          write(to + i, load_lanes(from + t * stride + i));
        else
          write(to + i * 2, interleave(from + t * stride + i, from + (t + 1) * stride + i));
      continue;
    }
    for (int i = 0; i < kWidth; ++i)
      for (int k = 0; k < kPair<T>; ++k) to[i * kPair<T> + k] = at(t + k, i);
  }
}

// The same panels of the transpose of a matrix of `columns` rows and `rows` columns.
template <typename T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel, T* to) {
  constexpr int kWidth = kTileColumns<T>;
  const int64_t first = panel * kWidth, count = columns - first < kWidth ? columns - first : kWidth;
  struct Lane {
    T at[kPair<T>];
  };
  to += first * round_up(rows, kPair<T>);
  from += first * stride;
  for (int64_t t = 0; t < rows; t += kPair<T>, to += kWidth * kPair<T>)
    for (int i = 0; i < kWidth; ++i)
      write(to + i * kPair<T>, i < count ? load_bytes<Lane>(from + i * stride + t) : Lane{});
}

// One tile's sums over `depth`, stored to or added to `sums`.
template <typename T>
FUSEDOPT_INLINE void multiply_tile(const T* left, int64_t stride, const T* panel, int64_t depth, Sum<T>* sums,
                                   bool add) {
  using P = Pack<Sum<T>>;
  P sum[kTileRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = P(Sum<T>(0));
  for (int64_t t = 0; t < depth; t += kPair<T>) {
    const auto r0 = load_lanes(panel + t * kTileColumns<T>);
    const auto r1 = load_lanes(panel + t * kTileColumns<T> + P::kLanes * kPair<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const auto l = broadcast(left + i * stride + t);
      sum[i][0] = multiply_add(l, r0, sum[i][0]);
      sum[i][1] = multiply_add(l, r1, sum[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < 2; ++j) {
      Sum<T>* const to = sums + i * kBlockColumns + j * P::kLanes;
      write(to, add ? read<P>(to) + sum[i][j] : sum[i][j]);
    }
}

// Squares of bfloat16 hold zeros on their diagonal, which lies apart in float: it is what rounding would hurt most,
// since a polynomial of a Gram matrix is near a multiple of the identity where that is well-conditioned.
template <typename T>
constexpr bool kDiagonalApart = kPair<T> > 1;

template <typename T>
struct Diagonals {      // nullptr: of what is not square, or not there
  const T* right_rows;  // the right operand as it lies, in the result's stride
  const Sum<T>*left, *right, *add;
  Sum<T>* result;
};

template <typename T>
struct Product {
  const T* left;   // rows x depth; its rows are readable up to a multiple of kTileRows, its columns of kPair
  const T* right;  // depth x columns, as panels
  const T* add;    // of the result's shape, or nullptr; may be the result
  T* result;
  int64_t rows, columns, depth;
  int64_t left_stride, stride;  // the latter of add and result
  Sum<T> alpha, beta;
  bool symmetric;
  Diagonals<T> diagonals;  // looked at where kDiagonalApart

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

// The result at a row's column j and, where V is a pack, its neighbours; `sum` keeps it too.
template <typename V, typename T>
FUSEDOPT_INLINE void finish(const Product<T>& p, int64_t row, int64_t j, Sum<T>* sum) {
  const int64_t at = row * p.stride + j;
  V x = read<V>(sum);
  if constexpr (kDiagonalApart<T>) {
    const Diagonals<T>& d = p.diagonals;
    if (d.left) x = fma(V(d.left[row]), read<V>(d.right_rows + at), x);
    if (d.right) x = fma(read<V>(p.left + row * p.left_stride + j), read<V>(d.right + j), x);
  }
  x = p.add ? combine(x, p.alpha, read<V>(p.add + at), p.beta) : x * V(p.alpha);
  write(sum, x);
  write(p.result + at, x);
}

template <typename T>
FUSEDOPT_INLINE void finish_diagonal(const Product<T>& p, int64_t row, Sum<T> x, Sum<T>* sum) {
  const Diagonals<T>& d = p.diagonals;
  if (d.left) x = fma(d.left[row], d.right[row], x);
  d.result[row] = d.add ? combine(x, p.alpha, d.add[row], p.beta) : x * p.alpha;
  p.result[row * p.stride + row] = T{};
  *sum = 0;
}

// Columns [first, last) of a row.
template <typename T>
FUSEDOPT_INLINE void finish_row(const Product<T>& p, int64_t row, int64_t first, int64_t last, Sum<T>* sums) {
  using P = Pack<Sum<T>>;
  const Sum<T> last_sum = sums[last - 1 - first];
  int64_t j = first;
  for (; j + P::kLanes <= last; j += P::kLanes) finish<P>(p, row, j, sums + (j - first));
  for (; j < last; ++j) finish<Sum<T>>(p, row, j, sums + (j - first));
  if constexpr (kDiagonalApart<T>)
    if (p.symmetric && last == row + 1) finish_diagonal(p, row, last_sum, sums + (row - first));
}

template <typename T>
void multiply_block(const Product<T>& p, int64_t block) {
  // From the last rows up: a symmetric result's largest blocks are the first ones taken.
  const int64_t row = (p.row_blocks() - 1 - block / p.column_blocks()) * kBlockRows;
  const int64_t column = block % p.column_blocks() * kBlockColumns;
  const int64_t last_row = row + kBlockRows < p.rows ? row + kBlockRows : p.rows;
  const int64_t last_column = column + kBlockColumns < p.columns ? column + kBlockColumns : p.columns;
  if (p.symmetric && column >= last_row) return;
  alignas(64) Sum<T> sums[kBlockRows * kBlockColumns];
  for (int64_t t = 0; t < p.depth; t += kDepth) {
    const int64_t depth = p.depth - t < kDepth ? p.depth - t : kDepth;
    for (int64_t j = column; j < last_column; j += kTileColumns<T>) {
      const T* const panel = p.right + j * round_up(p.depth, kPair<T>) + t * kTileColumns<T>;
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
      write(p.result + j * p.stride + i, sums[(i - row) * kBlockColumns + (j - column)]);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
