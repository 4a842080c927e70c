// Rounds of smoothing on a ring of numbers, all in one persistent launch with a barrier of the
// whole grid between rounds. Each thread block also keeps what it saw last in __shared__ memory,
// across barriers during which other blocks run.
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::smooth_test {
namespace {

constexpr int kThreads = 96;

// x and y take turns; the result of the last round is in x if rounds is even. `change` gets, for
// each block, how much its numbers changed in the last round.
template <bool kBarrier>
__global__ void smooth_kernel(float* x, float* y, float* change, int n, int rounds, uint32_t* barrier) {
  __shared__ float difference[kThreads];
  for (int round = 0; round < rounds; ++round) {
    difference[threadIdx.x] = 0.0f;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) {
      const float left = x[(i + n - 1) % n], right = x[(i + 1) % n];
      y[i] = fmaf(0.25f, left + right, 0.5f * x[i]);
      difference[threadIdx.x] += fabsf(y[i] - x[i]);
    }
    float* const last = x;
    x = y;
    y = last;
    if (kBarrier) grid_barrier(barrier);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int t = 0; t < kThreads; ++t) sum += difference[t];
    change[blockIdx.x] = sum;
  }
}

}  // namespace

// mode 0: as it should be; 1: without the barrier; 2: with it, but in a launch that is not
// cooperative
extern "C" cudaError_t smooth(float* x, float* y, float* change, int n, int rounds, int blocks, int mode,
                              uint32_t* barrier, cudaStream_t stream) {
  if (mode == 2) return launch(smooth_kernel<true>, blocks, kThreads, 0, stream, x, y, change, n, rounds, barrier);
  return launch_cooperative(mode == 0 ? smooth_kernel<true> : smooth_kernel<false>, blocks, kThreads, 0, stream, x, y,
                            change, n, rounds, barrier);
}

}  // namespace fusedopt::smooth_test
