// What warp and block operations give, one row of `out` per operation and one column per thread; 40
// threads, so that the last warp is not full.
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::intrinsics_test {
namespace {

constexpr int kThreads = 40;

__global__ void warp_kernel(int* out) {
  const int t = threadIdx.x, lane = t % 32, odd = t % 2;
  int* column = out + t;
  const auto put = [&](int value) {
    *column = value;
    column += kThreads;
  };
  put(__shfl_sync(~0u, t, 3));
  put(__shfl_sync(~0u, t, lane + 1, 4));
  put(__shfl_up_sync(~0u, t, 2));
  put(__shfl_up_sync(~0u, t, 1, 8));
  put(__shfl_down_sync(~0u, t, 3, 8));
  put(__shfl_xor_sync(~0u, t, 5, 8));
  put(int(__shfl_xor_sync(~0u, double(t), 1)));
  put(int(__ballot_sync(~0u, odd)));
  put(__any_sync(~0u, lane == 7));
  put(__all_sync(~0u, t < 32));
  // Two halves of a warp, each on its own and as often as it likes, between meetings of all.
  const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
  int sum = t;
  if (lane < 16)
    for (int d = 1; d <= 4; d *= 2) sum += __shfl_xor_sync(half, sum, d);
  else
    sum += __shfl_xor_sync(half, sum, 1);
  put(sum);
  put(__shfl_sync(~0u, sum, 0));
}

__global__ void block_kernel(int* out, int* atomics) {
  const int t = threadIdx.x;
  out[t] = __syncthreads_count(t % 3 == 0);
  out[kThreads + t] = __syncthreads_or(t == 39);
  out[2 * kThreads + t] = __syncthreads_and(t != 39);
  atomicAdd(&atomics[0], t);
  atomicSub(&atomics[1], t);
  atomicMin(&atomics[2], -t);
  atomicMax(&atomics[3], t);
  atomicAnd(&atomics[4], ~(1 << t % 32));
  atomicOr(&atomics[5], 1 << t % 8);
  atomicXor(&atomics[6], t);
  atomicInc(reinterpret_cast<unsigned*>(&atomics[7]), 6);
  for (int seen = 0, old; (old = atomicCAS(&atomics[8], seen, seen + 2)) != seen;) seen = old;
}

// A thread returns while its copy is under way.
__global__ void forgotten_copy_kernel(const uint4* x) {
  DYNAMIC_SMEM(uint4, piece);
  cp_async_16(&piece[threadIdx.x], x);
  cp_async_commit();
}

}  // namespace

extern "C" cudaError_t warp_operations(int* out, cudaStream_t stream) {
  return launch(warp_kernel, 1, kThreads, 0, stream, out);
}
extern "C" cudaError_t block_operations(int* out, int* atomics, cudaStream_t stream) {
  return launch(block_kernel, 1, kThreads, 0, stream, out, atomics);
}
extern "C" cudaError_t forgotten_copy(const uint4* x, cudaStream_t stream) {
  return launch(forgotten_copy_kernel, 1, kThreads, kThreads * sizeof(uint4), stream, x);
}

}  // namespace fusedopt::intrinsics_test
