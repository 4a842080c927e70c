#include "binding/adamw_gpu.h"

#include <algorithm>

#include "binding/gpu.h"
#include "binding/numbers.h"
#include "binding/packed.h"

namespace fusedopt {
namespace {

bool equal(const cuda::AdamWDeviceOptions& a, const cuda::AdamWDeviceOptions& b) {
  return a.step.data == b.step.data && a.host_step == b.host_step && a.lr.data == b.lr.data &&
         a.weight_decay.data == b.weight_decay.data && a.options == b.options;
}

void add_number(PackedWords& words, const cuda::DeviceNumber& number) {
  words.add(int64_t(reinterpret_cast<uintptr_t>(number.data)));
  words.add(int64_t(number.dtype));
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
  const std::vector<AdamWScalars<double>> scalars = host_scalars(loss_scale);
  launch_on_gpu(device.id, [&] { return cuda::launch_adamw(rows, scalars.data(), stream); });
}

std::vector<AdamWScalars<double>> AdamWGpuRows::host_scalars(const cuda::AdamWLossScale& loss_scale) const {
  std::vector<AdamWScalars<double>> scalars;
  for (const cuda::AdamWDeviceOptions& o : options_)
    scalars.push_back(generic::adamw_scalars(o.options, o.host_step, loss_scale.inv_grad_scale));
  return scalars;
}

py::tuple AdamWGpuRows::packed(const cuda::AdamWLossScale& loss_scale) const {
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
    for (const cuda::DeviceNumber& number : {o.lr, o.weight_decay, o.step}) add_number(options, number);
  }
  for (const cuda::DeviceNumber& counter : counters_) add_number(counters, counter);
  scale.add(loss_scale.inv_grad_scale);
  add_number(scale, loss_scale.grad_scale);
  add_number(scale, loss_scale.found_inf);
  return py::make_tuple(row_words, layout_words, options.array(), counters.array(), scale.array());
}

}  // namespace fusedopt
