#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace fusedopt::cuda {
namespace {

const char* message_of(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is told here; the next one to ask should not find it
  // The runtime calls a driver that is not there too old.
  return status == cudaErrorInsufficientDriver ? "no NVIDIA driver here, or one too old for this CUDA runtime"
                                               : cudaGetErrorString(status);
}

}  // namespace

int device_count(const char** error) {
  int count = 0;
  *error = message_of(cudaGetDeviceCount(&count));
  return *error ? 0 : count;
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int architecture(int device) {
  int major = 0, minor = 0;
  if (message_of(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device))) return 0;
  if (message_of(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device))) return 0;
  return 10 * major + minor;
}

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  status_.error = message_of(cudaGetDevice(&current));
  if (!status_ || current == device) return;
  status_.error = message_of(cudaSetDevice(device));
  if (status_) before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace fusedopt::cuda
