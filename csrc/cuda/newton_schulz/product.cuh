// What the two kinds of product kernels share.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/newton_schulz/product.h"
#include "math/value.h"

namespace fusedopt::cuda {

struct TilePlace {
  int row, column;
};

// Tiles of a triangle, row by row: 0; 1 2; 3 4 5; ...
__device__ inline TilePlace lower_tile(uint32_t index) {
  int row = int((sqrt(8.0f * float(index) + 1.0f) - 1.0f) * 0.5f);
  // Rounding may be off by one beside a square number.
  if (int64_t(row) * (row + 1) / 2 > index) --row;
  if (int64_t(row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, int(index - int64_t(row) * (row + 1) / 2)};
}

// Thread blocks go through bands of rows of tiles, each by columns, so that those at work at one time share what they
// read: in L2 lie a band of A and a few panels of B.
constexpr int kBand = 8;

template <bool kSymmetric>
__device__ TilePlace tile_place(uint32_t index, int rows, int columns, int tile) {
  const int down = (rows + tile - 1) / tile, across = (columns + tile - 1) / tile;
  const int first = (kSymmetric ? lower_tile(index).row : int(index / across)) / kBand * kBand;
  const int height = first + kBand < down ? kBand : down - first;
  const uint32_t own = index - (kSymmetric ? uint32_t(int64_t(first) * (first + 1) / 2) : uint32_t(first) * across);
  if (!kSymmetric || own < uint32_t(first) * height) return {first + int(own % height), int(own / height)};
  const TilePlace in_triangle = lower_tile(own - uint32_t(first) * height);
  return {first + in_triangle.row, first + in_triangle.column};
}

// Moves the product on to one matrix of the batch, and its factors with it.
template <typename Codec>
__device__ void select_matrix(Product<Codec>& product, int64_t matrix) {
  product.a += matrix * product.a_matrix;
  product.b += matrix * product.b_matrix;
  product.out += matrix * product.out_matrix;
  if (product.c) product.c += matrix * product.out_matrix;
  if (!product.scales) return;
  const auto scale = product.scales[matrix];
  const auto factor = product.power == 2 ? scale * scale : scale;
  using S = typename Product<Codec>::S;
  product.alpha = S(product.alpha * factor);
  product.beta = S(product.beta * factor);
}

template <typename Codec>
dim3 product_grid(const Product<Codec>& product, bool symmetric, int64_t tile, int64_t count) {
  const int64_t down = (product.rows + tile - 1) / tile, across = (product.columns + tile - 1) / tile;
  return dim3(unsigned(symmetric ? down * (down + 1) / 2 : down * across), unsigned(count));
}

}  // namespace fusedopt::cuda
