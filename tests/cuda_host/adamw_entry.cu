// Lets test_adamw.py call the CUDA launchers of AdamW: tables and options from arrays, by address.
#include <vector>

#include "cuda/adamw.h"

using namespace fusedopt;

namespace {

struct Arrays {  // as test_adamw.py declares it
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
  int64_t shared_scalars;  // 1: all rows use those of the first
};

class Table {
 public:
  explicit Table(const Arrays& a) : layouts_(a.layouts), layouts_size_(a.layouts_size) {
    for (int64_t i = 0; i < a.size; ++i) {
      if (a.numel[i] == 0) continue;
      TensorRow row = {};
      for (int role = 0; role < kMaxRoles; ++role) {
        row.data[role] = a.data[i * kMaxRoles + role];
        row.dtype[role] = DType(a.dtype[i * kMaxRoles + role]);
      }
      row.numel = a.numel[i];
      row.layout = a.layout[i];
      row.scalars = a.shared_scalars ? 0 : int32_t(i);
      rows_.push_back(row);
      starts_.push_back(starts_.back() + row.numel);
    }
  }
  TensorTable view() const {
    return {rows_.data(), starts_.data(), layouts_, layouts_size_, int64_t(rows_.size()), AdamWRole::kCount};
  }

 private:
  std::vector<TensorRow> rows_;
  std::vector<int64_t> starts_ = {0};
  const int64_t* layouts_;
  int64_t layouts_size_;
};

}  // namespace

extern "C" const char* adamw(const Arrays* a, cudaStream_t stream) {
  std::vector<AdamWScalars<double>> scalars;
  for (int64_t i = 0; i < a->size; ++i)
    scalars.push_back(generic::adamw_scalars(a->options[i], a->steps[i], a->inv_grad_scale));
  return cuda::launch_adamw(Table(*a).view(), scalars.data(), stream).error;
}

extern "C" int64_t adamw_workspace(int64_t size) { return cuda::adamw_workspace_bytes(size); }

extern "C" const char* adamw_capturable(const Arrays* a, const cuda::DeviceNumber* lr, const cuda::DeviceNumber* step,
                                        const cuda::DeviceNumber* counters, int64_t counters_size,
                                        const cuda::DeviceNumber* grad_scale, const cuda::DeviceNumber* found_inf,
                                        void* workspace, cudaStream_t stream) {
  std::vector<cuda::AdamWDeviceOptions> options;
  for (int64_t i = 0; i < a->size; ++i) options.push_back({a->options[i], lr[i], {}, step[i], a->steps[i]});
  const cuda::AdamWLossScale loss_scale = {a->inv_grad_scale, *grad_scale, *found_inf};
  return cuda::launch_adamw_capturable(Table(*a).view(), options.data(), a->size, counters, counters_size, loss_scale,
                                       workspace, stream)
      .error;
}
