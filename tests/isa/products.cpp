// Products of cpu/gemm.h on one instruction set: against sums in double, and symmetric ones for symmetry of every bit.
// Prints what is wrong; exit status 1 if anything is.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/gemm.h"

using namespace fusedopt::FUSEDOPT_TARGET;

namespace {

template <typename T>
struct Matrix {
  int64_t rows, columns, stride;
  std::vector<T> data;
  std::vector<Sum<T>> diagonal;  // apart, where kDiagonalApart and the matrix is a square

  Matrix(int64_t r, int64_t c)
      : rows(r), columns(c), stride(round_up(c, 32) + 32), data(round_up(r, kTileRows) * stride), diagonal(r) {}
  T* at(int64_t i, int64_t j) { return &data[i * stride + j]; }
  double number(int64_t i, int64_t j) { return read<Sum<T>>(at(i, j)); }
  void fill(std::mt19937& rng) {
    std::normal_distribution<Sum<T>> normal;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) write(at(i, j), normal(rng));
  }
  void mirror() {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < i; ++j) *at(j, i) = *at(i, j);
  }
};

template <typename T>
std::vector<T> panels_of(Matrix<T>& x, bool transposed) {
  const int64_t rows = transposed ? x.columns : x.rows, columns = transposed ? x.rows : x.columns;
  T garbage;
  write(&garbage, Sum<T>(NAN));
  std::vector<T> panels(round_up(columns, kTileColumns<T>) * round_up(rows, kPair<T>), garbage);
  const auto pack = transposed ? pack_rows<T> : pack_columns<T>;
  for (int64_t p = 0; p * kTileColumns<T> < columns; ++p)
    pack(x.data.data(), x.stride, rows, columns, p, panels.data());
  return panels;
}

template <typename S>
void multiply(const Product<S>& product) {
  for (int64_t block = 0; block < product.blocks(); ++block) multiply_block(product, block);
}

// L R' with R of n rows, or without `symmetric` L R with R of `columns` columns; alpha and beta at no special value.
template <typename T>
int64_t wrong(int64_t n, int64_t columns, int64_t depth, bool symmetric, std::mt19937& rng) {
  using S = Sum<T>;
  Matrix<T> left(n, depth), right(symmetric ? n : depth, symmetric ? depth : columns), add(n, columns), out(n, columns);
  left.fill(rng);
  if (symmetric)
    right = left;
  else
    right.fill(rng);
  add.fill(rng);
  if (symmetric) add.mirror();
  for (S& x : add.diagonal) x = S(0.5);
  const S alpha = S(0.75), beta = S(-1.5);
  const std::vector<T> panels = panels_of(right, symmetric);
  const bool apart = symmetric && kDiagonalApart<T>;
  multiply<T>({left.data.data(),
               panels.data(),
               add.data.data(),
               out.data.data(),
               n,
               columns,
               depth,
               left.stride,
               out.stride,
               alpha,
               beta,
               symmetric,
               {nullptr, nullptr, nullptr, symmetric ? add.diagonal.data() : nullptr, out.diagonal.data()}});
  const double bound = 4 * std::sqrt(double(depth) + 1) * (sizeof(S) == 4 ? 6e-8 : 1.2e-16);
  const double rounding = sizeof(T) == 2 ? 0x1p-8 : 0;  // of the result
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, size = 0;
      for (int64_t t = 0; t < depth; ++t) {
        const double x = left.number(i, t) * (symmetric ? right.number(j, t) : right.number(t, j));
        sum += x;
        size += std::fabs(x);
      }
      const bool on_diagonal = apart && i == j;
      const double term = on_diagonal ? add.diagonal[i] : add.number(i, j);
      const double got = on_diagonal ? out.diagonal[i] : out.number(i, j);
      sum = alpha * sum + beta * term;
      size += std::fabs(term) * 2;
      bad += !(std::fabs(got - sum) <= bound * size + (on_diagonal ? 0 : rounding) * std::fabs(sum));
      if (symmetric) bad += !(out.number(i, j) == out.number(j, i));
      if (on_diagonal) bad += out.number(i, i) != 0;
    }
  return bad;
}

// L R of squares that commute, with their diagonals apart: a symmetric matrix and a polynomial of it.
template <typename T>
int64_t wrong_square(int64_t n, std::mt19937& rng) {
  using S = Sum<T>;
  Matrix<T> left(n, n), out(n, n);
  left.fill(rng);
  left.mirror();
  for (int64_t i = 0; i < n; ++i) {
    *left.at(i, i) = T();
    left.diagonal[i] = S(1 + i);
  }
  const std::vector<T> panels = panels_of(left, false);
  multiply<T>({left.data.data(),
               panels.data(),
               nullptr,
               out.data.data(),
               n,
               n,
               n,
               left.stride,
               out.stride,
               S(1),
               S(0),
               true,
               {left.data.data(), left.diagonal.data(), left.diagonal.data(), nullptr, out.diagonal.data()}});
  const auto number = [&](Matrix<T>& x, int64_t i, int64_t j) {
    return i == j ? double(x.diagonal[i]) : x.number(i, j);
  };
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t t = 0; t < n; ++t) {
        sum += number(left, i, t) * number(left, t, j);
        size += std::fabs(number(left, i, t) * number(left, t, j));
      }
      bad += !(std::fabs(number(out, i, j) - sum) <= 1e-6 * size + (i == j ? 0 : 0x1p-8) * std::fabs(sum));
    }
  return bad;
}

}  // namespace

int main() {
  std::mt19937 rng(5);
  int64_t bad = 0;
  for (int64_t n : {1, 6, 7, 33, 97, 130})
    for (int64_t depth : {1, 33, 257}) {
      for (int64_t columns : {1, 16, 31, 195}) {
        bad += wrong<float>(n, columns, depth, false, rng);
        bad += wrong<double>(n, columns, depth, false, rng);
      }
      bad += wrong<float>(n, n, depth, true, rng);
      bad += wrong<double>(n, n, depth, true, rng);
#if defined(__AVX512BF16__)
      for (int64_t columns : {1, 16, 31, 195}) bad += wrong<Brain>(n, columns, depth, false, rng);
      bad += wrong<Brain>(n, n, depth, true, rng);
      bad += wrong_square<Brain>(n, rng);
#endif
    }
  printf("%ld elements are wrong\n", long(bad));
  return bad != 0;
}
