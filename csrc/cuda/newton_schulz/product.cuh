// What the two kinds of product kernels share.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/newton_schulz/product.h"
#include "math/value.h"

namespace fusedopt::cuda {

struct TilePlace {
  int row, column;
};

// Tiles of a symmetric product, row by row of the lower triangle: 0; 1 2; 3 4 5; ...
__device__ inline TilePlace lower_tile(uint32_t index) {
  int row = int((sqrt(8.0f * float(index) + 1.0f) - 1.0f) * 0.5f);
  // Rounding may be off by one beside a square number.
  if (int64_t(row) * (row + 1) / 2 > index) --row;
  if (int64_t(row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, int(index - int64_t(row) * (row + 1) / 2)};
}

template <bool kSymmetric>
__device__ TilePlace tile_place(uint32_t index, int columns, int tile) {
  if constexpr (kSymmetric) return lower_tile(index);
  const int across = (columns + tile - 1) / tile;
  return {int(index / across), int(index % across)};
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
  product.alpha *= factor;
  product.beta *= factor;
}

template <typename Codec>
dim3 product_grid(const Product<Codec>& product, bool symmetric, int64_t tile, int64_t count) {
  const int64_t down = (product.rows + tile - 1) / tile, across = (product.columns + tile - 1) / tile;
  return dim3(unsigned(symmetric ? down * (down + 1) / 2 : down * across), unsigned(count));
}

}  // namespace fusedopt::cuda
