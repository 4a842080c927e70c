// Running sums, thread block after thread block: each waits for the one before and passes its total
// on, by a release store and an acquiring wait.
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::relay_test {
namespace {

enum class Bug { kNone, kNoRelease };

constexpr int kThreads = 64;

// y[i] = x[0] + ... + x[i], kThreads numbers per block; flags are zeros at first.
template <Bug kBug>
__global__ void relay_kernel(const int* __restrict__ x, int* y, int* totals, uint32_t* flags) {
  __shared__ int numbers[kThreads];
  __shared__ int before;
  const int b = blockIdx.x, t = threadIdx.x;
  numbers[t] = x[b * kThreads + t];
  __syncthreads();
  if (t == 0) {
    for (int i = 1; i < kThreads; ++i) numbers[i] += numbers[i - 1];
    if (b > 0) wait_while_equal(&flags[b - 1], ~0u, 0);
    before = b > 0 ? totals[b - 1] : 0;
    totals[b] = before + numbers[kThreads - 1];
    if (kBug == Bug::kNoRelease)
      atomicExch(&flags[b], 1u);
    else
      store_release(&flags[b], 1);
  }
  __syncthreads();
  y[b * kThreads + t] = before + numbers[t];
}

// The sum of x by whichever block is last to arrive.
template <Bug kBug>
__global__ void last_block_kernel(const int* __restrict__ x, int* sum, int* parts, uint32_t* arrived) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = 0;
    for (int i = 0; i < kThreads; ++i) parts[blockIdx.x] += x[blockIdx.x * kThreads + i];
    if (kBug == Bug::kNone) fence_acq_rel();
    is_last = atomicAdd(arrived, 1) == gridDim.x - 1;
    fence_acq_rel();
  }
  __syncthreads();
  if (!is_last || threadIdx.x > 0) return;
  *sum = 0;
  for (int i = 0; i < int(gridDim.x); ++i) *sum += parts[i];
}

}  // namespace

extern "C" cudaError_t relay(const int* x, int* y, int* totals, uint32_t* flags, int blocks, int bug,
                             cudaStream_t stream) {
  return launch_cooperative(Bug(bug) == Bug::kNone ? relay_kernel<Bug::kNone> : relay_kernel<Bug::kNoRelease>, blocks,
                            kThreads, 0, stream, x, y, totals, flags);
}

extern "C" cudaError_t last_block(const int* x, int* sum, int* parts, uint32_t* arrived, int blocks, int bug,
                                  cudaStream_t stream) {
  return launch(Bug(bug) == Bug::kNone ? last_block_kernel<Bug::kNone> : last_block_kernel<Bug::kNoRelease>, blocks,
                kThreads, 0, stream, x, sum, parts, arrived);
}

}  // namespace fusedopt::relay_test
