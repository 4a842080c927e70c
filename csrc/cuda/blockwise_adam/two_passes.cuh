// Two passes: the sums of each tile; from them, in a fixed order, each block's second moment and rate; the update.
#pragma once
#include "cuda/blockwise_adam/update.cuh"
#include "cuda/device_number.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

template <typename S>
__device__ void add_squares(const Region& region, const TileUnit<kUnit>& unit, bool vectors, double (&sum)[kUnit]) {
  if (!vectors || !unit.whole())
    return for_each_element(region, unit, [&](int j, const int64_t(&at)[kElementRoles]) {
      const double x = load_element<S>(region, Role::kGrad, at);
#pragma unroll
      for (int i = 0; i < kUnit; ++i)  // so that the sums stay in registers
        if (i == j) sum[i] = fma(x, x, sum[i]);
    });
  S x[kUnit];
  load_grads(region, unit, x);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) sum[j] = fma(double(x[j]), double(x[j]), sum[j]);
}

// The sum of squared gradients of each block in each tile: [tile][block of the tile].
template <typename S>
__global__ void __launch_bounds__(kBlockThreads, sizeof(S) == 8 ? 2 : 3)
    block_sums_kernel(const RowTable __grid_constant__ rows) {
  __shared__ double sums[kUnit][kBlockThreads];  // by place in the unit, and thread
  const Region region(rows);
  AdamWScalars<double> scalars;
  if (!region.scalars(scalars)) return;
  const Tile tile(region.kind.split, region.index, region.head);
  const bool vectors = region.has_vectors<S, kUnit>(tile, Role::kGrad, Role::kGrad);
  const int units = tile.units_per_row(kUnit);
  int across = 1;  // threads to a row
  while (across < units) across *= 2;
  const int down = kBlockThreads / across, unit = threadIdx.x & (across - 1);
  double sum[kUnit] = {};
  if (unit < units)
    for (int row = threadIdx.x / across; row < tile.rows; row += down)
      add_squares<S>(region, TileUnit<kUnit>(tile, row, unit * kUnit), vectors, sum);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) sums[j][threadIdx.x] = sum[j];
  __syncthreads();
  double* const out = address<double>(region.row, kParts) + region.index * region.kind.split.blocks_per_tile;
  const bool one = tile.group == kWholeTile;
  const auto columns_of = [&](int block) {
    const int left = tile.columns - tile.lead - block * tile.group;
    return one ? tile.columns : left < tile.group ? left : tile.group;
  };
  sum_blocks(
      tile.blocks, [&](int block) { return columns_of(block) * down; },
      [&](int block, int64_t i, double total) {
        const int columns = columns_of(block), row = int(i) / columns;
        const int column = (one ? 0 : tile.lead + block * tile.group) + int(i) - row * columns;
        return total + sums[column % kUnit][row * across + column / kUnit];
      },
      [&](int block, double total) { out[block] = total; });
}

struct SharedParts {  // the tiles' sums of a block over several tensors
  const double* parts;
  int64_t size;
  double* sum;
};

__global__ void __launch_bounds__(kBlockThreads) shared_sums_kernel(const Batch<SharedParts> __grid_constant__ shared) {
  const SharedParts& own = shared.items[blockIdx.x];
  sum_blocks(
      1, [&](int) { return own.size; }, [&](int, int64_t i, double total) { return total + own.parts[i]; },
      [&](int, double total) { *own.sum = total; });
}

// How many rates a thread block computes: the more parts a block has, the more threads add them up.
HOST_DEVICE inline int64_t rates_per_thread_block(const BlockSplit& split) {
  return split.parts() <= 16 ? kBlockThreads : split.parts() <= 512 ? kBlockThreads / 32 : 1;
}

// From sums to second moments and rates.
__global__ void __launch_bounds__(kBlockThreads, 2) block_rates_kernel(const RowTable __grid_constant__ rows) {
  const Region region(rows);
  AdamWScalars<double> k;
  if (!region.scalars(k)) return;
  const BlockSplit& split = region.kind.split;
  const int64_t first = int64_t(region.index) * rates_per_thread_block(split), left = split.blocks() - first;
  const int blocks = int(left < rates_per_thread_block(split) ? left : rates_per_thread_block(split));
  const auto* const parts = address<const double>(region.row, kParts);
  const double* const shared = region.kind.shared_sum;
  float* const block_sq = address<float>(region.row, kBlockSq) + first;
  double* const rates = address<double>(region.row, kRates) + first;
  sum_blocks(
      blocks, [&](int) { return shared ? 1 : split.parts(); },
      [&](int block, int64_t i, double total) {
        return total + (shared ? *shared : parts[split.place_of(first + block, i)]);
      },
      [&](int block, double total) {
        const double count = shared ? region.kind.shared_count : double(split.size_of_block(first + block));
        rates[block] = update_block(block_sq + block, total, count, k);
      });
}

template <typename S, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, sizeof(S) == 8 ? 2 : 3)
    block_update_kernel(const RowTable __grid_constant__ rows) {
  __shared__ S rates[kSpan];
  const Region region(rows);
  AdamWScalars<double> k;
  if (!region.scalars(k)) return;
  const Tile tile(region.kind.split, region.index, region.head);
  const auto* const from = address<const double>(region.row, kRates) + tile.block;
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.blocks; i += kBlockThreads) rates[i] = S(from[i]);
  __syncthreads();
  update_tile<false, kWidth, S>(region, tile, nullptr, rates, StepScalars<S>(k));
}

}  // namespace fusedopt::FUSEDOPT_TARGET
