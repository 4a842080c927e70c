#include "binding/gpu.h"

namespace fusedopt {

std::string gpu_error(int device, const char* error) {
  int architecture = 0;
  if constexpr (kWithCuda) architecture = cuda::architecture(device);
  return "the launch on cuda:" + std::to_string(device) +
         (architecture ? " (sm_" + std::to_string(architecture) + ")" : "") + " failed: " + error +
         "; this build has kernels for the architectures " FUSEDOPT_CUDA_ARCHS;
}

}  // namespace fusedopt
