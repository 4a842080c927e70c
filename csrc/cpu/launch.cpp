#include "cpu/launch.h"

#include "cpu/blocks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace fusedopt::cpu {
namespace {

struct Workspace {  // places of the regions, then their values, then shared sums
  int64_t regions = 0, shared = 0, values = 0;
  bool two_passes = false;

  // Fills in the regions' places, unless they are nullptr.
  Workspace(const TensorTable& table, int64_t* places) {
    regions = table.size ? table.blocks[table.size - 1].end : 0;
    for (int64_t i = 0; i < regions; ++i) {
      const BlockRegion& region = table.regions[i];
      const generic::BlockSplit split(region);
      if (places) places[i] = split.one_pass() ? kOnePass : values;
      values += split.values();
      two_passes |= !split.one_pass();
      if (region.shared >= shared) shared = region.shared + 1;
    }
  }
  int64_t bytes() const { return shared * sizeof(SharedSum) + values * sizeof(double) + regions * sizeof(int64_t); }
};

// Where two passes are needed, tensors go in waves, so that the second pass finds gradients in the last level of cache.
// Blocks over several tensors want all of them in one wave.
int64_t wave_end(const TensorTable& table, const Workspace& sizes, int64_t row) {
  constexpr int64_t kWave = 1 << 21;  // elements: 8 MiB of fp32 gradients
  if (!sizes.two_passes || sizes.shared > 0) return table.size;
  const int64_t first = table.starts[row++];
  while (row < table.size && table.starts[row + 1] - first <= kWave) ++row;
  return row;
}

}  // namespace

Status launch_adamw(const TensorTable& table, const AdamWScalars<double>* scalars, int threads) {
  const auto kernel = cpu_kernels().adamw;
  parallel_elements(0, table.total(), threads, [&](int64_t begin, int64_t end) { kernel(table, scalars, begin, end); });
  return {};
}

int64_t blockwise_adam_workspace_bytes(const TensorTable& table) { return Workspace(table, nullptr).bytes(); }

Status launch_blockwise_adam(const TensorTable& table, const AdamWScalars<double>* scalars, void* workspace,
                             int threads) {
  const CpuKernels& kernels = cpu_kernels();
  int64_t* const places = static_cast<int64_t*>(workspace);
  const Workspace sizes(table, places);
  double* const values = reinterpret_cast<double*>(places + sizes.regions);
  const BlockSums sums = {places, values, reinterpret_cast<SharedSum*>(values + sizes.values)};
  for (int64_t i = 0; i < sizes.shared; ++i) sums.shared[i] = {};
  for (int64_t row = 0; row < table.size;) {
    const int64_t end_row = wave_end(table, sizes, row), first = table.starts[row], last = table.starts[end_row];
    if (sizes.two_passes) {
      parallel_elements(first, last, threads,
                        [&](int64_t begin, int64_t end) { kernels.blockwise_adam_sums(table, sums, begin, end); });
      kernels.blockwise_adam_rates(table, scalars, sums, row, end_row);
    }
    parallel_elements(first, last, threads, [&](int64_t begin, int64_t end) {
      kernels.blockwise_adam_update(table, scalars, sums, begin, end);
    });
    row = end_row;
  }
  return {};
}

}  // namespace fusedopt::cpu
