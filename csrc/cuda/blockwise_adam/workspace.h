// Which way a region goes, and where its sums and rates lie in the workspace.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/blockwise_adam/region.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

enum class Way {
  kElements,     // AdamW's kernels
  kCoordinates,  // the same, where the tensor has strides
  kOnePass,
  kTwoPasses,
};

inline int64_t arithmetic_bytes(const TensorRow& row) { return row.dtype[Role::kParam] == DType::kFloat64 ? 8 : 4; }

// Float in units of 4 elements, in units of 8 where a role has 16 bits, double.
constexpr int kWidthClasses = 3;
inline int width_class(const TensorRow& row) {
  if (arithmetic_bytes(row) == 8) return 2;
  return std::any_of(row.dtype, row.dtype + kElementRoles, [](DType dtype) { return size_of(dtype) == 2; });
}

inline Way way_of(const TensorRow& row, const BlockRegion& region) {
  const bool flat = row.layout == kFlat;
  if (region.rows > 1 || region.shared != kOwnBlocks) return Way::kTwoPasses;
  if (region.group == 1) return flat ? Way::kElements : Way::kCoordinates;
  return flat && region.group <= one_pass_elements(arithmetic_bytes(row)) ? Way::kOnePass : Way::kTwoPasses;
}

inline BlockSplit split_of(const TensorRow& row, const BlockRegion& region) {
  return way_of(row, region) == Way::kOnePass ? split_one_pass(region, arithmetic_bytes(row))
                                              : split_two_passes(region);
}

template <typename F>  // calls f(row, region, the region's index)
void for_each_region(const TensorTable& table, F f) {
  for (int64_t r = 0; r < table.size; ++r)
    for (int64_t i = table.blocks[r].begin; i < table.blocks[r].end; ++i) f(table.rows[r], table.regions[i], i);
}

// Where everything lies in the workspace, counted in doubles: the prepared scalars, the sums of shared blocks, their
// parts, then each region's rates and parts.
struct Workspace {
  struct Values {
    int64_t rates, parts;
  };
  struct Shared {
    int64_t parts = 0, size = 0;
    double count = 0;  // of elements
    const float* value = nullptr;
  };
  std::vector<Values> regions;
  std::vector<Shared> shared;
  int64_t shared_sums, size;

  Workspace(const TensorTable& table, int64_t options) {
    regions.resize(table.size ? table.blocks[table.size - 1].end : 0);
    for_each_region(table, [&](const TensorRow& row, const BlockRegion& region, int64_t) {
      if (region.shared == kOwnBlocks) return;
      if (region.shared >= int64_t(shared.size())) shared.resize(region.shared + 1);
      Shared& own = shared[region.shared];
      own.size += split_of(row, region).tiles();
      own.count += double(region.numel());
      if (!own.value) own.value = static_cast<float*>(row.data[Role::kBlockSq]) + region.first_block;
    });
    shared_sums = options * int64_t(sizeof(PreparedScalars) / sizeof(double));
    size = shared_sums + int64_t(shared.size());
    for (Shared& own : shared) own.parts = size, size += own.size, own.size = 0;
    for_each_region(table, [&](const TensorRow& row, const BlockRegion& region, int64_t i) {
      if (way_of(row, region) != Way::kTwoPasses) return;
      const BlockSplit split = split_of(row, region);
      const int64_t parts = split.tiles() * split.blocks_per_tile;
      regions[i].rates = size;
      size += region.blocks();
      if (region.shared == kOwnBlocks) {
        regions[i].parts = size;
        size += parts;
      } else {
        Shared& own = shared[region.shared];
        regions[i].parts = own.parts + own.size;
        own.size += parts;
      }
    });
  }
};

}  // namespace fusedopt::FUSEDOPT_TARGET
