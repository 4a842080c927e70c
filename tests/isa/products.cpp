// Products of cpu/gemm.h on one instruction set: against sums in double, and symmetric ones for symmetry of every bit.
// Prints what is wrong; exit status 1 if anything is.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/gemm.h"

using namespace fusedopt::FUSEDOPT_TARGET;

namespace {

template <typename S>
struct Matrix {
  int64_t rows, columns, stride;
  std::vector<S> data;

  Matrix(int64_t r, int64_t c)
      : rows(r), columns(c), stride(round_up(c, 16) + 16), data(round_up(r, kTileRows) * stride) {}
  S& at(int64_t i, int64_t j) { return data[i * stride + j]; }
  void fill(std::mt19937& rng) {
    std::normal_distribution<S> normal;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) at(i, j) = normal(rng);
  }
};

template <typename S>
std::vector<S> panels_of(Matrix<S>& x, bool transposed) {
  const int64_t rows = transposed ? x.columns : x.rows, columns = transposed ? x.rows : x.columns;
  std::vector<S> panels(round_up(columns, kTileColumns<S>) * rows, S(NAN));
  const auto pack = transposed ? pack_rows<S> : pack_columns<S>;
  for (int64_t p = 0; p * kTileColumns<S> < columns; ++p)
    pack(x.data.data(), x.stride, rows, columns, p, panels.data());
  return panels;
}

template <typename S>
void multiply(const Product<S>& product) {
  for (int64_t block = 0; block < product.blocks(); ++block) multiply_block(product, block);
}

// L R' with R of n rows, or without `symmetric` L R with R of `columns` columns; alpha and beta at no special value.
template <typename S>
int64_t wrong(int64_t n, int64_t columns, int64_t depth, bool symmetric, std::mt19937& rng) {
  Matrix<S> left(n, depth), right(symmetric ? n : depth, symmetric ? depth : columns), add(n, columns), out(n, columns);
  left.fill(rng);
  if (symmetric)
    right = left;
  else
    right.fill(rng);
  add.fill(rng);
  if (symmetric)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < i; ++j) add.at(j, i) = add.at(i, j);
  const S alpha = S(0.75), beta = S(-1.5);
  const std::vector<S> panels = panels_of(right, symmetric);
  multiply<S>({left.data.data(), panels.data(), add.data.data(), out.data.data(), n, columns, depth, left.stride,
               out.stride, alpha, beta, symmetric});
  const double bound = 4 * std::sqrt(double(depth) + 1) * (sizeof(S) == 4 ? 6e-8 : 1.2e-16);
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, size = 0;
      for (int64_t t = 0; t < depth; ++t) {
        const double x = double(left.at(i, t)) * double(symmetric ? right.at(j, t) : right.at(t, j));
        sum += x;
        size += std::fabs(x);
      }
      sum = alpha * sum + beta * double(add.at(i, j));
      size += std::fabs(double(add.at(i, j))) * 2;
      bad += !(std::fabs(double(out.at(i, j)) - sum) <= bound * size);
      if (symmetric) bad += !(out.at(i, j) == out.at(j, i));
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
    }
  printf("%ld elements are wrong\n", long(bad));
  return bad != 0;
}
