// Reverses the order of 16-byte pieces in every run of kThreads, through a ring of asynchronous
// copies in dynamic shared memory. And three ways to get it wrong.
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::pipeline_test {
namespace {

enum class Bug { kNone, kNoWait, kNoBarrier, kRingTooShort };

constexpr int kThreads = 64, kAhead = 2;  // runs whose copies are under way

template <Bug kBug>
constexpr int kStages = kBug == Bug::kRingTooShort ? kAhead : kAhead + 1;

template <Bug kBug>
__global__ void reverse_kernel(const uint4* __restrict__ x, uint4* __restrict__ y, int runs) {
  DYNAMIC_SMEM(uint4, ring);  // [kStages][kThreads]
  const auto stage_of = [&](int run) { return ring + run / gridDim.x % kStages<kBug> * kThreads; };
  const auto start = [&](int run) {
    if (run < runs) cp_async_16(stage_of(run) + threadIdx.x, &x[run * kThreads + threadIdx.x]);
    cp_async_commit();
  };
  for (int i = 0; i < kAhead; ++i) start(blockIdx.x + i * gridDim.x);
  for (int run = blockIdx.x; run < runs; run += gridDim.x) {
    cp_async_wait<kBug == Bug::kNoWait ? kAhead : kAhead - 1>();
    // Everyone's pieces of this run are here, and everyone has read the run before: its stage is
    // free.
    if (kBug != Bug::kNoBarrier) __syncthreads();
    st_global_cs_16(&y[run * kThreads + threadIdx.x], stage_of(run)[kThreads - 1 - threadIdx.x]);
    start(run + kAhead * gridDim.x);
  }
  cp_async_wait<0>();
}

template <Bug kBug>
cudaError_t launch_reverse(const uint4* x, uint4* y, int runs, int blocks, cudaStream_t stream) {
  return launch(reverse_kernel<kBug>, blocks, kThreads, kStages<kBug> * kThreads * sizeof(uint4), stream, x, y, runs);
}

}  // namespace

extern "C" cudaError_t reverse(const uint4* x, uint4* y, int runs, int blocks, int bug, cudaStream_t stream) {
  switch (Bug(bug)) {
    case Bug::kNone: return launch_reverse<Bug::kNone>(x, y, runs, blocks, stream);
    case Bug::kNoWait: return launch_reverse<Bug::kNoWait>(x, y, runs, blocks, stream);
    case Bug::kNoBarrier: return launch_reverse<Bug::kNoBarrier>(x, y, runs, blocks, stream);
    default: return launch_reverse<Bug::kRingTooShort>(x, y, runs, blocks, stream);
  }
}

}  // namespace fusedopt::pipeline_test
