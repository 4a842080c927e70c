// Reading device numbers in kernels, and handing a kernel many small items by value.
#pragma once
#include <algorithm>

#include "cuda/device_number.h"
#include "cuda/elementwise.cuh"

namespace fusedopt::cuda {

__device__ inline double read(DeviceNumber number) {
  switch (number.dtype) {
    case DType::kInt32: return *static_cast<const int32_t*>(number.data);
    case DType::kInt64: return double(*static_cast<const int64_t*>(number.data));
    default: return load_any<double>(number.dtype, number.data, 0);
  }
}

__device__ inline bool is_set(DeviceNumber number) { return number.data && read(number) != 0; }

__device__ inline void increment(DeviceNumber number) {
  switch (number.dtype) {
    case DType::kFloat32: *static_cast<float*>(number.data) += 1; break;
    case DType::kFloat64: *static_cast<double*>(number.data) += 1; break;
    case DType::kInt32: *static_cast<int32_t*>(number.data) += 1; break;
    default: *static_cast<int64_t*>(number.data) += 1;
  }
}

template <typename T>
struct Batch {  // as many as a kernel parameter holds, beside some others
  static constexpr int kCapacity = (kMaxKernelParameterBytes - 256) / sizeof(T);
  int64_t size;
  T items[kCapacity];
};

// launch_batch(batch, thread blocks, index of the batch's first item) for one batch after the other.
template <typename T, typename LaunchBatch>
Status launch_batches(const T* items, int64_t size, LaunchBatch launch_batch) {
  Batch<T> batch;
  for (int64_t at = 0; at < size; at += Batch<T>::kCapacity) {
    batch.size = std::min<int64_t>(size - at, Batch<T>::kCapacity);
    std::copy_n(items + at, batch.size, batch.items);
    const Status status = status_of(launch_batch(batch, dim3((batch.size + kThreads - 1) / kThreads), at));
    if (!status) return status;
  }
  return {};
}

}  // namespace fusedopt::cuda
