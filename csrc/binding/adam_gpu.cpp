#include "binding/adam_gpu.h"

#include <algorithm>

#include "binding/numbers.h"
#include "binding/packed.h"

namespace fusedopt {
namespace {

bool equal(const cuda::AdamWDeviceOptions& a, const cuda::AdamWDeviceOptions& b) {
  return a.step.data == b.step.data && a.host_step == b.host_step && a.lr.data == b.lr.data &&
         a.weight_decay.data == b.weight_decay.data && a.options == b.options;
}

}  // namespace

void AdamGpuRows::clear() {
  table.clear();
  options_.clear();
  counters_.clear();
  first = nullptr;
}

int32_t AdamGpuRows::index_of(const cuda::AdamWDeviceOptions& options) {
  if (options_.empty() || !equal(options_.back(), options)) options_.push_back(options);
  return int32_t(options_.size()) - 1;
}

bool AdamGpuRows::reads_device(const cuda::AdamWLossScale& loss_scale) const {
  return loss_scale.grad_scale.data || loss_scale.found_inf.data ||
         std::any_of(options_.begin(), options_.end(),
                     [](const cuda::AdamWDeviceOptions& o) { return o.step.data || o.lr.data || o.weight_decay.data; });
}

void AdamGpuRows::check_workspace(const void* workspace) const {
  if (!workspace) throw py::value_error("numbers on " + device_string(device) + " need a workspace");
}

std::vector<AdamWScalars<double>> AdamGpuRows::host_scalars(const cuda::AdamWLossScale& loss_scale) const {
  std::vector<AdamWScalars<double>> scalars;
  for (const cuda::AdamWDeviceOptions& o : options_)
    scalars.push_back(generic::adamw_scalars(o.options, o.host_step, loss_scale.inv_grad_scale));
  return scalars;
}

py::tuple AdamGpuRows::packed(const cuda::AdamWLossScale& loss_scale) const {
  const TensorTable rows = table.table();
  const auto row_words = packed_rows(rows), layout_words = packed_layouts(rows);
  if (!reads_device(loss_scale))
    return py::make_tuple(row_words, layout_words, packed_scalars(host_scalars(loss_scale)));
  PackedWords options, counters, scale;
  for (const cuda::AdamWDeviceOptions& o : options_) {
    for (const double x : {o.options.lr, o.options.beta1, o.options.beta2, o.options.eps, o.options.weight_decay})
      options.add(x);
    options.add(int64_t(o.options.maximize));
    options.add(o.host_step);
    for (const cuda::DeviceNumber& number : {o.lr, o.weight_decay, o.step}) options.add(number);
  }
  for (const cuda::DeviceNumber& counter : counters_) counters.add(counter);
  scale.add(loss_scale.inv_grad_scale);
  scale.add(loss_scale.grad_scale);
  scale.add(loss_scale.found_inf);
  return py::make_tuple(row_words, layout_words, options.array(), counters.array(), scale.array());
}

}  // namespace fusedopt
