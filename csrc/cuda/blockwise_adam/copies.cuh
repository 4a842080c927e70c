// The value of a block over several tensors, for those of them that have no gradient.
#pragma once
#include "cuda/adam_scalars.cuh"
#include "cuda/device_number.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

struct ValueCopy {
  float* to;
  const float* from;
};

__global__ void __launch_bounds__(kThreads)
    copy_values_kernel(const Batch<ValueCopy> __grid_constant__ copies, const PreparedScalars* prepared) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < copies.size && !(prepared && prepared->skip)) *copies.items[i].to = *copies.items[i].from;
}

}  // namespace fusedopt::FUSEDOPT_TARGET
