// float to bf16 by the toolkit's own conversion, one number per thread.
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::round_test {
namespace {

__global__ void round_kernel(const float* __restrict__ x, __nv_bfloat16* __restrict__ y, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __float2bfloat16_rn(x[i]);
}

}  // namespace

extern "C" cudaError_t round_to_bf16(const float* x, __nv_bfloat16* y, int64_t n, cudaStream_t stream) {
  return launch(round_kernel, unsigned((n + 127) / 128), 128, 0, stream, x, y, n);
}

}  // namespace fusedopt::round_test
