// One pass: tiles of whole blocks, whose gradients wait in shared memory while their squares are added up.
#pragma once
#include "cuda/blockwise_adam/update.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

// Elements of shared memory: the tile's gradients in whole units, then its blocks' rates.
HOST_DEVICE inline int64_t staged_size(int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }
inline int64_t staged_elements(const BlockSplit& split) {
  return staged_size(split.width + kUnit - 1) + split.blocks_per_tile;
}

// The tile's gradients to shared memory; the rest of what its update needs is asked for meanwhile.
template <int kWidth, typename S>
__device__ void stage_grads(const Region& region, const Tile& tile, S* staged) {
  const bool vectors = region.has_vectors<S, kWidth>(tile, Role::kGrad, Role::kGrad);
  for_each_unit<kWidth>(tile, [&](const TileUnit<kWidth>& unit) {
    if (!vectors || !unit.whole())
      return for_each_element(region, unit, [&](int j, const int64_t(&at)[kElementRoles]) {
        staged[unit.index + j] = load_element<S>(region, Role::kGrad, at);
      });
    S x[kWidth];
    load_grads(region, unit, x);
    prefetch_l2(region.data(Role::kParam, unit.at));
    prefetch_l2(region.data(Role::kExpAvg, unit.at));
    write_unit(staged + unit.index, x);
  });
}

template <typename S, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, sizeof(S) == 8 ? 2 : 4)
    block_one_pass_kernel(const RowTable __grid_constant__ rows) {
  DYNAMIC_SMEM(S, staged);
  const Region region(rows);
  AdamWScalars<double> k;
  if (!region.scalars(k)) return;
  const Tile tile(region.kind.split, region.index, region.head);
  stage_grads<kWidth>(region, tile, staged);
  __syncthreads();
  S* const rates = staged + staged_size(tile.count);
  float* const block_sq = address<float>(region.row, kBlockSq) + tile.block;
  const int width = tile.count - tile.lead;
  const auto size_of_block = [&](int block) {
    const int left = width - block * tile.group;
    return left < tile.group ? left : tile.group;
  };
  sum_blocks(
      tile.blocks, size_of_block,
      [&](int block, int64_t i, double sum) {
        const double x = staged[tile.lead + block * tile.group + int(i)];
        return fma(x, x, sum);
      },
      [&](int block, double sum) { rates[block] = S(update_block(block_sq + block, sum, size_of_block(block), k)); });
  __syncthreads();
  update_tile<true, kWidth>(region, tile, staged, rates, StepScalars<S>(k));
}

}  // namespace fusedopt::FUSEDOPT_TARGET
