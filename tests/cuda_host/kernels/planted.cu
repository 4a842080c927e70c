// One bug per kernel, each of which some build of the shim must find. `out` has 64 numbers.
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::planted_test {

// External linkage, as a helper in a header has: g++ itself would give this array no redzone.
template <int kCount>
__attribute__((noinline)) __device__ float* shared_numbers() {
  __shared__ float numbers[kCount];
  return numbers;
}

namespace {

__global__ void missing_syncthreads_kernel(float* out) {
  __shared__ float numbers[64];
  numbers[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

__global__ void missing_syncwarp_kernel(float* out) {
  __shared__ float numbers[64];
  numbers[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = numbers[threadIdx.x ^ 1];
}

// No schedule shows it: whoever comes last, each writes the same.
__global__ void same_value_race_kernel(float* out) {
  __shared__ float number;
  number = 1.0f;
  __syncthreads();
  out[threadIdx.x] = number;
}

__global__ void unwritten_shared_kernel(float* out) {
  __shared__ float numbers[64];
  if (threadIdx.x != 5) numbers[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void shared_overflow_kernel(float* out) {
  float* const numbers = shared_numbers<64>();
  numbers[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void dynamic_shared_overflow_kernel(float* out) {
  DYNAMIC_SMEM(float, numbers);
  numbers[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 7) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void absent_lane_kernel(float* out) {
  if (threadIdx.x % 32 != 3) out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 3);
}

__global__ void half_a_warp_kernel(float* out) {
  if (threadIdx.x % 32 < 16)
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  else
    __syncthreads();
}

__global__ void out_of_bounds_tail_kernel(float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) out[i] = 1.0f;
}

__global__ void misaligned_load_kernel(float* out) {
  const uint4 v = ld_global_nc_16(out + 1);
  out[0] = float(v.x);
}

__global__ void misaligned_dereference_kernel(float* out) {
  const float4 v = *reinterpret_cast<const float4*>(out + 1);
  out[0] = v.x;
}

__global__ void block_reads_block_kernel(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = float(blockIdx.x);
  if (threadIdx.x == 0) out[8 + blockIdx.x] = out[(blockIdx.x + 1) % gridDim.x];
}

}  // namespace

#define PLANTED(name, blocks, smem_bytes, ...)                                 \
  extern "C" cudaError_t name(float* out, cudaStream_t stream) {               \
    return launch(name##_kernel, blocks, 64, smem_bytes, stream, __VA_ARGS__); \
  }
PLANTED(missing_syncthreads, 1, 0, out)
PLANTED(missing_syncwarp, 1, 0, out)
PLANTED(same_value_race, 1, 0, out)
PLANTED(unwritten_shared, 1, 0, out)
PLANTED(shared_overflow, 1, 0, out)
PLANTED(dynamic_shared_overflow, 1, 64 * sizeof(float), out)
PLANTED(divergent_barrier, 1, 0, out)
PLANTED(two_barriers, 1, 0, out)
PLANTED(absent_lane, 1, 0, out)
PLANTED(half_a_warp, 1, 0, out)
PLANTED(out_of_bounds_tail, 2, 0, out, 64)
PLANTED(misaligned_load, 1, 0, out)
PLANTED(misaligned_dereference, 1, 0, out)
PLANTED(block_reads_block, 8, 0, out)

}  // namespace fusedopt::planted_test
