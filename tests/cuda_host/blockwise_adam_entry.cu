// Lets test_blockwise_adam.py call the CUDA launchers of blockwise Adam: tables and options from arrays, by address.
#include <vector>

#include "cuda/blockwise_adam.h"
#include "math/blockwise_adam.h"

using namespace fusedopt;

namespace {

struct Arrays {  // as test_blockwise_adam.py declares it
  int64_t size;
  void* const* data;     // [size][kMaxRoles]
  const uint8_t* dtype;  // [size][kMaxRoles]
  const int64_t* numel;
  const int64_t* layout;
  const int64_t* layouts;
  int64_t layouts_size;
  const AdamWOptions* options;  // [size]
  const int64_t* steps;
  double inv_grad_scale;
  const BlockRegion* regions;
  const int64_t* region_starts;  // [size + 1]
  const cuda::BlockCopy* copies;
  int64_t copies_size;

  cuda::BlockCopies block_copies() const { return {copies, copies_size}; }
};

class Table {
 public:
  Table(const Arrays& a, bool share) : a_(a) {  // share: scalars between neighbours of equal options and step
    int32_t scalars = 0;
    for (int64_t i = 0; i < a.size; ++i) {
      if (!share || !(a.options[i] == a.options[scalars] && a.steps[i] == a.steps[scalars])) scalars = int32_t(i);
      if (a.numel[i] == 0) continue;
      TensorRow row = {};
      for (int role = 0; role < kMaxRoles; ++role) {
        row.data[role] = a.data[i * kMaxRoles + role];
        row.dtype[role] = DType(a.dtype[i * kMaxRoles + role]);
      }
      row.numel = a.numel[i];
      row.layout = a.layout[i];
      row.scalars = scalars;
      RowBlocks blocks = {a.region_starts[i], a.region_starts[i + 1], 0};
      for (int64_t r = blocks.begin; r < blocks.end; ++r) blocks.count += a.regions[r].blocks();
      rows_.push_back(row);
      blocks_.push_back(blocks);
      starts_.push_back(starts_.back() + row.numel);
    }
  }
  TensorTable view() const {
    return {
        rows_.data(),   starts_.data(), a_.layouts, a_.layouts_size, int64_t(rows_.size()), BlockwiseAdamRole::kCount,
        blocks_.data(), a_.regions};
  }

 private:
  const Arrays& a_;
  std::vector<TensorRow> rows_;
  std::vector<RowBlocks> blocks_;
  std::vector<int64_t> starts_ = {0};
};

}  // namespace

extern "C" int64_t blockwise_adam_workspace(const Arrays* a, int64_t options) {
  return cuda::blockwise_adam_workspace_bytes(Table(*a, false).view(), options);
}

extern "C" const char* blockwise_adam(const Arrays* a, void* workspace, cudaStream_t stream) {
  std::vector<AdamWScalars<double>> scalars;
  for (int64_t i = 0; i < a->size; ++i)
    scalars.push_back(generic::adamw_scalars(a->options[i], a->steps[i], a->inv_grad_scale));
  return cuda::launch_blockwise_adam(Table(*a, true).view(), scalars.data(), a->block_copies(), workspace, stream)
      .error;
}

extern "C" const char* blockwise_adam_capturable(const Arrays* a, const cuda::DeviceNumber* lr,
                                                 const cuda::DeviceNumber* step, const cuda::DeviceNumber* counters,
                                                 int64_t counters_size, const cuda::DeviceNumber* grad_scale,
                                                 const cuda::DeviceNumber* found_inf, void* workspace,
                                                 cudaStream_t stream) {
  std::vector<cuda::AdamWDeviceOptions> options;
  for (int64_t i = 0; i < a->size; ++i) options.push_back({a->options[i], lr[i], {}, step[i], a->steps[i]});
  const cuda::AdamWLossScale loss_scale = {a->inv_grad_scale, *grad_scale, *found_inf};
  return cuda::launch_blockwise_adam_capturable(Table(*a, false).view(), options.data(), a->size, counters,
                                                counters_size, loss_scale, a->block_copies(), workspace, stream)
      .error;
}
