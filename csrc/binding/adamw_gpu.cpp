#include "binding/adamw_gpu.h"

#include <algorithm>

#include "binding/gpu.h"
#include "binding/numbers.h"

namespace fusedopt {
namespace {

bool equal(const cuda::AdamWDeviceOptions& a, const cuda::AdamWDeviceOptions& b) {
  return a.step.data == b.step.data && a.host_step == b.host_step && a.lr.data == b.lr.data &&
         a.weight_decay.data == b.weight_decay.data && a.options == b.options;
}

}  // namespace

void AdamWGpuRows::clear() {
  table.clear();
  options_.clear();
  counters_.clear();
  first = nullptr;
}

int32_t AdamWGpuRows::index_of(const cuda::AdamWDeviceOptions& options) {
  if (options_.empty() || !equal(options_.back(), options)) options_.push_back(options);
  return int32_t(options_.size()) - 1;
}

bool AdamWGpuRows::reads_device(const cuda::AdamWLossScale& loss_scale) const {
  return loss_scale.grad_scale.data || loss_scale.found_inf.data ||
         std::any_of(options_.begin(), options_.end(),
                     [](const cuda::AdamWDeviceOptions& o) { return o.step.data || o.lr.data || o.weight_decay.data; });
}

int64_t AdamWGpuRows::workspace_bytes(const cuda::AdamWLossScale& loss_scale) const {
  if constexpr (kWithCuda)
    if (reads_device(loss_scale)) return cuda::adamw_workspace_bytes(int64_t(options_.size()));
  return 0;
}

void AdamWGpuRows::launch(const cuda::AdamWLossScale& loss_scale, void* workspace, cudaStream_t stream) const {
  const TensorTable rows = table.table();
  if (reads_device(loss_scale)) {
    if (!workspace) throw py::value_error("numbers on " + device_string(device) + " need a workspace");
    return launch_on_gpu(device.id, [&] {
      return cuda::launch_adamw_capturable(rows, options_.data(), int64_t(options_.size()), counters_.data(),
                                           int64_t(counters_.size()), loss_scale, workspace, stream);
    });
  }
  std::vector<AdamWScalars<double>> scalars;
  for (const cuda::AdamWDeviceOptions& o : options_)
    scalars.push_back(generic::adamw_scalars(o.options, o.host_step, loss_scale.inv_grad_scale));
  launch_on_gpu(device.id, [&] { return cuda::launch_adamw(rows, scalars.data(), stream); });
}

}  // namespace fusedopt
