// A row of blockwise Adam's tables: a region of a tensor, its units and elements in any dtype and layout.
#pragma once
#include "cuda/adam_scalars.cuh"
#include "cuda/blockwise_adam/blocks.cuh"
#include "cuda/units.cuh"
#include "math/blockwise_adam.h"

namespace fusedopt::FUSEDOPT_TARGET {

using Role = BlockwiseAdamRole;
constexpr int kElementRoles = Role::kBlockSq;  // those with a value per element

// A row of the kernels' table is a region: the addresses of its first elements (of the tensor's first where the tensor
// has strides), of its first block's second moment, and in the workspace of its blocks' rates and its tiles' sums.
enum RowWord { kParam, kGrad, kExpAvg, kBlockSq, kRates, kParts, kRowWords };
static_assert(kGrad == int(Role::kGrad) && kBlockSq == int(Role::kBlockSq));

struct RegionKind {  // a row's kind; sizes[ndim] and strides[ndim] of each role follow it
  ScalarsRecord<double> scalars;
  BlockSplit split;
  const double* shared_sum;  // nullptr: the blocks are this region's own
  double shared_count;
  int64_t offset;  // of the region in a tensor that has strides
  DType dtype[Role::kCount];
  int32_t ndim;  // 0: flat
};
constexpr int kKindWords = sizeof(RegionKind) / sizeof(uint64_t);
static_assert(sizeof(RegionKind) % sizeof(uint64_t) == 0);

struct Region {
  const uint64_t* row;
  RegionKind kind;
  const uint64_t* layout;
  uint32_t index;  // of this thread block's tile
  int head;

  __device__ explicit Region(const RowTable& rows) {
    const FoundRow found = find_row(rows);
    const uint64_t* words = rows.words + found.place.kind;
    row = found.words;
    memcpy(&kind, words, sizeof kind);
    layout = words + kKindWords;
    index = found.index;
    head = int(found.place.head);
  }
  __device__ bool scalars(AdamWScalars<double>& k) const { return read_scalars(layout - kKindWords, 0, k); }

  __device__ char* data(int role, int64_t at) const {
    return address<char>(row, role) + at * bytes_of(kind.dtype[role]);
  }
  __device__ void find(int64_t at, int64_t (&place)[kElementRoles]) const {
    find_element(layout, kind.ndim, kElementRoles, kind.ndim ? kind.offset + at : at, place);
  }

  // Whether whole units of these roles can be read and written 16 bytes at a time.
  template <typename S, int kWidth>
  __device__ bool has_vectors(const Tile& tile, int first_role, int last_role) const {
    if (kind.ndim) return false;
    bool vectors = true;
    for (int role = first_role; role <= last_role; ++role) {
      const int size = bytes_of(kind.dtype[role]);
      vectors &= size <= int(sizeof(S)) && size * kWidth >= kVectorBytes;
      vectors &= reinterpret_cast<uintptr_t>(data(role, tile.begin)) % kVectorBytes == 0;
      vectors &= tile.rows <= 1 || tile.stride * size % kVectorBytes == 0;
    }
    return vectors;
  }
};

template <typename S, int kWidth>
__device__ void load_grads(const Region& region, const TileUnit<kWidth>& unit, S (&x)[kWidth]) {
  RawUnit<S, kWidth> raw;
  load_unit<S, kWidth>(region.kind.dtype[Role::kGrad], region.data(Role::kGrad, unit.at), raw);
  decode_unit<S, kWidth>(region.kind.dtype[Role::kGrad], raw, x);
}
// Units that are not whole or not aligned, and those of unusual arrays: calls f(j, places) for one element after the
// other.
template <int kWidth, typename F>
__device__ void for_each_element(const Region& region, const TileUnit<kWidth>& unit, F f) {
#pragma unroll 1
  for (int j = unit.from; j < unit.to; ++j) {
    int64_t at[kElementRoles];
    region.find(unit.at + j, at);
    f(j, at);
  }
}
template <typename S>
__device__ S load_element(const Region& region, int role, const int64_t (&at)[kElementRoles]) {
  return load_any<S>(region.kind.dtype[role], address<void>(region.row, role), at[role]);
}
template <typename S>
__device__ void store_element(const Region& region, int role, const int64_t (&at)[kElementRoles], S x) {
  store_any(region.kind.dtype[role], address<void>(region.row, role), at[role], x);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
