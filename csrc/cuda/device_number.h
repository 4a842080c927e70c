// Numbers that stay in device memory (step counters, a learning rate, a loss scale): kernels read them where they lie,
// so that no step waits for the device.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"
#include "cuda/stream.h"

namespace fusedopt::cuda {

struct DeviceNumber {  // one number in device memory; data == nullptr: there is none
  void* data;
  DType dtype;
};

// Adds one to each counter, unless found_inf holds anything but 0. `counters` is host memory; float32, float64, int32
// or int64, each counter once.
Status launch_increment(const DeviceNumber* counters, int64_t size, DeviceNumber found_inf, cudaStream_t stream);

}  // namespace fusedopt::cuda
