// The launches of one step over a table.
#pragma once
#include <array>
#include <vector>

#include "cuda/adamw.h"
#include "cuda/blockwise_adam.h"
#include "cuda/blockwise_adam/coordinates.cuh"
#include "cuda/blockwise_adam/copies.cuh"
#include "cuda/blockwise_adam/one_pass.cuh"
#include "cuda/blockwise_adam/packer.h"
#include "cuda/blockwise_adam/two_passes.cuh"
#include "cuda/blockwise_adam/workspace.h"

namespace fusedopt::FUSEDOPT_TARGET {

using RowKernel = decltype(block_rates_kernel);

class Launcher {
 public:
  Launcher(const TensorTable& table, const ScalarsSource& source, const Workspace& places, void* workspace,
           cudaStream_t stream)
      : table_(table), source_(source), places_(places), values_(static_cast<double*>(workspace)), stream_(stream) {}

  Status run(const BlockCopies& copies) {
    elements();
    regions(Way::kOnePass,
            {block_one_pass_kernel<float, 4>, block_one_pass_kernel<float, 8>, block_one_pass_kernel<double, 4>});
    regions(Way::kCoordinates,
            {block_coordinates_kernel<float>, block_coordinates_kernel<float>, block_coordinates_kernel<double>});
    regions(Way::kTwoPasses, {block_sums_kernel<float>, block_sums_kernel<float>, block_sums_kernel<double>});
    shared_sums();
    rates();
    regions(Way::kTwoPasses,
            {block_update_kernel<float, 4>, block_update_kernel<float, 8>, block_update_kernel<double, 4>});
    copy(copies);
    return status_;
  }

 private:
  // Blocks of one coordinate are AdamW's elements; the roles agree.
  void elements() {
    std::vector<TensorRow> rows;
    for_each_region(table_, [&](const TensorRow& row, const BlockRegion& region, int64_t) {
      if (way_of(row, region) != Way::kElements) return;
      TensorRow& own = rows.emplace_back(row);
      for (int role = 0; role < kElementRoles; ++role) own.data[role] = data_of(row, role, region.offset);
      own.data[Role::kBlockSq] = data_of(row, Role::kBlockSq, region.first_block);
      own.numel = region.columns;
    });
    if (!rows.empty())
      status_ = launch_adamw({rows.data(), nullptr, nullptr, 0, int64_t(rows.size()), Role::kCount}, source_, stream_);
  }

  // Runs kernels over the tiles of all regions that go this way, each over the regions of its own width class.
  void regions(Way way, std::array<RowKernel*, kWidthClasses> kernels) {
    for (int width = 0; width < kWidthClasses; ++width)
      each_row(
          kernels[width], [](const BlockSplit& split) { return split.tiles(); },
          [&](const TensorRow& row, const BlockRegion& region) {
            return way_of(row, region) == way && width_class(row) == width;
          });
  }
  void rates() {
    each_row(
        block_rates_kernel,
        [](const BlockSplit& split) {
          const int64_t rates = rates_per_thread_block(split);
          return (split.blocks() + rates - 1) / rates;
        },
        [](const TensorRow& row, const BlockRegion& region) { return way_of(row, region) == Way::kTwoPasses; });
  }

  template <typename Kernel, typename ThreadBlocks, typename Chosen>
  void each_row(Kernel* kernel, ThreadBlocks thread_blocks, Chosen chosen) {
    RegionPacker packer;
    const auto launch_these = [&] {
      status_ = launch_packed(kernel, packer.rows(), stream_, kBlockThreads, packer.smem_bytes());
      packer.clear();
    };
    for_each_region(table_, [&](const TensorRow& row, const BlockRegion& region, int64_t i) {
      if (!status_ || !chosen(row, region) || add(packer, row, region, i, thread_blocks)) return;
      launch_these();
      if (status_ && !add(packer, row, region, i, thread_blocks))
        status_ = {"an array has too many elements or more than 1000 dimensions"};
    });
    if (status_) launch_these();
  }

  template <typename ThreadBlocks>
  bool add(RegionPacker& packer, const TensorRow& row, const BlockRegion& region, int64_t i,
           ThreadBlocks thread_blocks) const {
    const int64_t* layout = row.layout == kFlat ? nullptr : table_.layouts + row.layout;
    RegionKind kind = {};
    kind.scalars = source_.record<double>(row.scalars);
    kind.split = split_of(row, region);
    if (region.shared != kOwnBlocks) {
      kind.shared_sum = values_ + places_.shared_sums + region.shared;
      kind.shared_count = places_.shared[region.shared].count;
    }
    if (layout) kind.offset = region.offset, kind.ndim = int32_t(layout[0]);
    memcpy(kind.dtype, row.dtype, sizeof kind.dtype);
    TensorRow begin = row;
    for (int role = 0; role < kElementRoles; ++role) begin.data[role] = data_of(row, role, layout ? 0 : region.offset);
    uint64_t words[kRowWords] = {};
    for (int role = 0; role < kElementRoles; ++role) words[role] = address_of(begin, role);
    words[kBlockSq] = reinterpret_cast<uintptr_t>(data_of(row, Role::kBlockSq, region.first_block));
    words[kRates] = reinterpret_cast<uintptr_t>(values_ + places_.regions[i].rates);
    words[kParts] = reinterpret_cast<uintptr_t>(values_ + places_.regions[i].parts);
    const int head = layout ? 0 : head_of(begin, kElementRoles);
    const bool staged = way_of(row, region) == Way::kOnePass;
    const int64_t smem_bytes = staged ? staged_elements(kind.split) * arithmetic_bytes(row) : 0;
    return packer.add(words, kind, row.scalars, layout, thread_blocks(kind.split), head, smem_bytes);
  }

  void shared_sums() {
    std::vector<SharedParts> shared;
    for (const Workspace::Shared& own : places_.shared)
      if (own.size > 0)
        shared.push_back(
            {values_ + own.parts, own.size, values_ + places_.shared_sums + (&own - places_.shared.data())});
    if (!status_) return;
    status_ = launch_batches(shared.data(), int64_t(shared.size()), [&](const auto& batch, dim3, int64_t) {
      return launch(shared_sums_kernel, dim3(unsigned(batch.size)), dim3(kBlockThreads), 0, stream_, batch);
    });
  }

  void copy(const BlockCopies& copies) {
    std::vector<ValueCopy> values;
    for (const BlockCopy* own = copies.data; own < copies.data + copies.size; ++own)
      if (own->shared < int64_t(places_.shared.size()) && places_.shared[own->shared].value)
        values.push_back({own->value, places_.shared[own->shared].value});
    if (!status_) return;
    status_ = launch_batches(values.data(), int64_t(values.size()), [&](const auto& batch, dim3 grid, int64_t) {
      return launch(copy_values_kernel, grid, dim3(kThreads), 0, stream_, batch, source_.prepared);
    });
  }

  static void* data_of(const TensorRow& row, int role, int64_t element) {
    return static_cast<char*>(row.data[role]) + element * size_of(row.dtype[role]);
  }

  const TensorTable& table_;
  const ScalarsSource source_;
  const Workspace& places_;
  double* const values_;
  const cudaStream_t stream_;
  Status status_;
};

}  // namespace fusedopt::FUSEDOPT_TARGET
