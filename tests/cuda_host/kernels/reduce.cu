// Sum of squares: 16-byte loads, warp shuffles, shared memory, one atomic per thread block.
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::reduce_test {

// In a header this would be a template of external linkage, whose __shared__ variables no section
// attribute and no redzone of g++'s own reaches.
template <int kThreads>
__device__ float block_sum(float v) {
  __shared__ float partial[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0f;
  v = threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : 0.0f;
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;  // in the first warp
}

namespace {

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_of_squares_kernel(const float* __restrict__ x, int64_t n, float* sum) {
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float s = 0.0f;
  for (int64_t i = first; i < n / 4; i += int64_t(gridDim.x) * kThreads) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(x) + i);
    s = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, s))));
  }
  if (first < n % 4) s = fmaf(x[n / 4 * 4 + first], x[n / 4 * 4 + first], s);
  s = block_sum<kThreads>(s);
  if (threadIdx.x == 0) atomicAdd(sum, s);
}

}  // namespace

extern "C" cudaError_t sum_of_squares(const float* x, int64_t n, float* sum, int blocks, cudaStream_t stream) {
  cudaMemsetAsync(sum, 0, sizeof *sum, stream);
  return launch(sum_of_squares_kernel<256>, blocks, 256, 0, stream, x, n, sum);
}

}  // namespace fusedopt::reduce_test
