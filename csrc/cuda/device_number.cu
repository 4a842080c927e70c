// Step counters on the device: one thread a counter.
#define FUSEDOPT_TARGET cuda
#include "cuda/device_number.cuh"

namespace fusedopt::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    increment_kernel(const Batch<DeviceNumber> __grid_constant__ counters, DeviceNumber found_inf) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < counters.size && !is_set(found_inf)) increment(counters.items[i]);
}

}  // namespace

Status launch_increment(const DeviceNumber* counters, int64_t size, DeviceNumber found_inf, cudaStream_t stream) {
  return launch_batches(counters, size, [&](const auto& batch, dim3 grid, int64_t) {
    return launch(increment_kernel, grid, dim3(kThreads), 0, stream, batch, found_inf);
  });
}

}  // namespace fusedopt::cuda
