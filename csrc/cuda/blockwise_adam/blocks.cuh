// How the blocks of a region are cut into tiles, one for a thread block, and how a thread block walks a tile and adds
// up what belongs to a block. All of it follows from the region alone, so that every sum has one order.
//
// A thread takes units of consecutive elements, 16 bytes of the narrowest dtype. In a region of one row, units begin
// where 16-byte accesses do; the tile then is a run of whole blocks, or a piece of a single one. In a region of more
// rows it is a strip of columns: whole blocks or a piece of one, over some rows.
#pragma once
#include <cstdint>
#include <numeric>

#include "common/tensor_table.h"
#include "cuda/elementwise.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int kBlockThreads = 256;
constexpr int kUnit = 8;                        // elements of the widest unit
constexpr int kSpan = kBlockThreads * kUnit;    // elements that all threads touch at once
constexpr int64_t kWidestTile = kSpan - kUnit;  // columns of a tile in two passes: a span, wherever it begins
constexpr int64_t kPiece = 8 * kSpan;           // elements of a tile that is a piece of a block, or several rows
constexpr int kWholeTile = 1 << 30;             // a tile's group if the tile is no more than one block
static_assert(kUnit == kMaxHead);

// The largest block that is read once: its gradient fits in shared memory. Tiles of smaller blocks have half of it.
constexpr int64_t one_pass_elements(int64_t arithmetic_bytes) { return 32768 / arithmetic_bytes; }

struct BlockSplit {
  int64_t rows, columns, stride, group;  // the region's
  int64_t strips;                        // tiles beside each other
  int64_t pieces;                        // tiles beside each other that one block is cut into
  int64_t width, height;                 // of a tile
  int64_t blocks_per_tile;

  HOST_DEVICE int64_t blocks() const { return (columns + group - 1) / group; }
  HOST_DEVICE int64_t layers() const { return (rows + height - 1) / height; }
  HOST_DEVICE int64_t tiles() const { return strips * layers(); }
  HOST_DEVICE int64_t parts() const { return layers() * pieces; }  // tiles that have a part of a block
  // Where the part-th part of a block stands among [tile][block of the tile].
  HOST_DEVICE int64_t place_of(int64_t block, int64_t part) const {
    const int64_t strip = block / blocks_per_tile * pieces + part % pieces;
    return (part / pieces * strips + strip) * blocks_per_tile + block % blocks_per_tile;
  }
  HOST_DEVICE int64_t size_of_block(int64_t block) const {
    const int64_t left = columns - block * group;
    return rows * (left < group ? left : group);
  }
};

// Tiles of `width` columns: whole blocks, or a piece of one.
inline BlockSplit split_columns(const BlockRegion& r, int64_t width) {
  BlockSplit split = {r.rows, r.columns, r.stride, r.group, 0, 1, width, 1, 1};
  if (r.group <= width) {
    const int64_t aligned = kUnit / std::gcd(r.group, int64_t(kUnit));  // blocks that make up whole units
    split.blocks_per_tile = std::min(width / r.group, r.blocks());
    if (r.rows > 1 && split.blocks_per_tile > aligned) split.blocks_per_tile -= split.blocks_per_tile % aligned;
    split.width = split.blocks_per_tile * r.group;
  } else {
    split.pieces = (r.group + width - 1) / width;
  }
  split.strips = (r.blocks() + split.blocks_per_tile - 1) / split.blocks_per_tile * split.pieces;
  return split;
}

inline BlockSplit split_two_passes(const BlockRegion& r) {
  if (r.rows == 1) return split_columns(r, r.group <= kWidestTile ? kWidestTile : std::min(r.group, kPiece));
  BlockSplit split = split_columns(r, kWidestTile);
  split.height = std::min(r.rows, (kPiece + split.width - 1) / split.width);
  return split;
}

inline BlockSplit split_one_pass(const BlockRegion& r, int64_t arithmetic_bytes) {
  return split_columns(r, std::max(r.group, one_pass_elements(arithmetic_bytes) / 2));
}

// ---- device: a tile

struct Tile {
  int64_t begin;  // its first element, counted from the region's
  int64_t stride;
  int rows, columns;
  int lead, count;  // elements from the lead-th to the count-th are the tile's, counted row by row
  bool run;
  int64_t block;  // its first
  int blocks;
  int group;

  __device__ Tile(const BlockSplit& split, int64_t index, int head) {
    const int64_t layer = index / split.strips, strip = index % split.strips;
    block = strip / split.pieces * split.blocks_per_tile;
    begin = block * split.group + strip % split.pieces * split.width;
    int64_t end = (block + split.blocks_per_tile) * split.group;  // of its blocks
    if (end > split.columns) end = split.columns;
    if (end > begin + split.width) end = begin + split.width;
    const int width = end > begin ? int(end - begin) : 0;
    group = split.blocks_per_tile == 1 ? kWholeTile : int(split.group);
    blocks = split.blocks_per_tile == 1 ? 1 : (width + group - 1) / group;
    run = split.rows == 1;
    if (run) {
      lead = int((begin - head) & (kUnit - 1));
      count = lead + width;
      begin -= lead;
      columns = count < kSpan ? count : kSpan;
      stride = kSpan;
      rows = (count + kSpan - 1) / kSpan;
    } else {
      const int64_t row = layer * split.height, left = split.rows - row;
      lead = 0;
      columns = width;
      rows = width == 0 ? 0 : int(left < split.height ? left : split.height);
      count = rows * columns;
      stride = split.stride;
      begin += row * stride;
    }
  }

  __device__ int units_per_row(int width) const { return (columns + width - 1) / width; }
};

// kWidth elements of a tile, as far as they are its own.
template <int kWidth>
struct TileUnit {
  int64_t at;     // the first one, counted from the region's first
  int from, to;   // which of them
  int in_blocks;  // of the first one: its place in the tile's blocks, one block after another; may be negative
  int index;      // of the first one in the tile, row by row

  __device__ TileUnit(const Tile& tile, int row, int column) {
    at = tile.begin + row * tile.stride + column;
    index = row * tile.columns + column;
    const int left = tile.count - index, width = tile.columns - column;
    from = tile.lead > index ? tile.lead - index : 0;
    to = left < width ? left : width;
    if (to > kWidth) to = kWidth;
    in_blocks = tile.run ? index - tile.lead : column;
  }
  __device__ bool whole() const { return from == 0 && to == kWidth; }
};

template <int kWidth, typename F>
__device__ inline void for_each_unit(const Tile& tile, F f) {
  static_assert(kUnit % kWidth == 0);
  const int per_row = tile.units_per_row(kWidth);
  const int units = tile.run ? (tile.count + kWidth - 1) / kWidth : tile.rows * per_row;
#pragma unroll 1
  for (int i = threadIdx.x; i < units; i += kBlockThreads) {
    const int row = i / per_row;
    f(TileUnit<kWidth>(tile, row, (i - row * per_row) * kWidth));
  }
}

// Adds up what each of `blocks` blocks has, as many threads to a block as there are: add(block, i, sum) for all i below
// size(block), then take(block, sum) in one thread. All threads of the thread block must come.
template <typename Size, typename Add, typename Take>
__device__ inline void sum_blocks(int blocks, Size size, Add add, Take take) {
  __shared__ double sums[kBlockThreads / 32];
  int lanes = 1;
  while (lanes * 2 * blocks <= kBlockThreads) lanes *= 2;
  const int lane = threadIdx.x & (lanes - 1), warp_lanes = lanes < 32 ? lanes : 32;
#pragma unroll 1
  for (int first = 0; first < blocks; first += kBlockThreads / lanes) {
    const int block = first + threadIdx.x / lanes;
    const int64_t n = block < blocks ? size(block) : 0;
    double sum = 0;
#pragma unroll 4
    for (int64_t i = lane; i < n; i += lanes) sum = add(block, i, sum);
    for (int step = warp_lanes / 2; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step, warp_lanes);
    if (lanes > 32) {  // then this is the only round
      if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
      __syncthreads();
      sum = 0;
      for (int i = 0; i < lanes / 32; ++i) sum += sums[(threadIdx.x / lanes) * (lanes / 32) + i];
    }
    if (lane == 0 && block < blocks) take(block, sum);
  }
}

}  // namespace fusedopt::FUSEDOPT_TARGET
