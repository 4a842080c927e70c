#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace fusedopt::cuda {

int device_count(const char** error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  *error = nullptr;
  if (status == cudaSuccess) return count;
  cudaGetLastError();  // it has been told; the next launch should not find it
  // The runtime calls a driver that is not there too old.
  *error = status == cudaErrorInsufficientDriver ? "no NVIDIA driver here, or one too old for this CUDA runtime"
                                                 : cudaGetErrorString(status);
  return 0;
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

}  // namespace fusedopt::cuda
