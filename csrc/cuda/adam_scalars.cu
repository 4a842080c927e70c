// Scalars of Adam's family from numbers on the device: one thread an option.
#define FUSEDOPT_TARGET cuda
#include "cuda/adam_scalars.h"
#include "cuda/device_number.cuh"

namespace fusedopt::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) prepare_kernel(const Batch<AdamWDeviceOptions> __grid_constant__ options,
                                                           AdamWLossScale loss_scale, PreparedScalars* prepared) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= options.size) return;
  const AdamWDeviceOptions& own = options.items[i];
  AdamWOptions numbers = own.options;
  if (own.lr.data) numbers.lr = read(own.lr);
  if (own.weight_decay.data) numbers.weight_decay = read(own.weight_decay);
  const int64_t step = own.step.data ? int64_t(read(own.step)) : own.host_step;
  const bool scaled = loss_scale.grad_scale.data;
  const double inv_grad_scale = scaled ? 1.0 / read(loss_scale.grad_scale) : loss_scale.inv_grad_scale;
  prepared[i].scalars = adamw_scalars(numbers, step, inv_grad_scale);
  prepared[i].skip = is_set(loss_scale.found_inf);
}

}  // namespace

Status launch_prepare_scalars(const AdamWDeviceOptions* options, int64_t options_size, const DeviceNumber* counters,
                              int64_t counters_size, const AdamWLossScale& loss_scale, PreparedScalars* prepared,
                              cudaStream_t stream) {
  const Status status = launch_increment(counters, counters_size, loss_scale.found_inf, stream);
  if (!status) return status;
  return launch_batches(options, options_size, [&](const auto& batch, dim3 grid, int64_t first) {
    return launch(prepare_kernel, grid, dim3(kThreads), 0, stream, batch, loss_scale, prepared + first);
  });
}

}  // namespace fusedopt::cuda
