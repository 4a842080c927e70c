// One spelling of a kernel launch, for nvcc and for the host shim of tests/cuda_host, and the
// barrier that a cooperative launch makes possible.
//
// Write a large parameter as `const Table __grid_constant__ table`, in this order: the shim turns
// it into a reference.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/status.h"
#include "cuda/ptx.cuh"

namespace fusedopt {

constexpr size_t kMaxKernelParameterBytes = 32764;  // since CUDA 12.1, for sm_70 and later

namespace detail {

template <typename... P, typename... A>
cudaError_t launch(unsigned attribute_count, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t stream, A&&... arguments) {
  static_assert((sizeof(P) + ... + 0) <= kMaxKernelParameterBytes);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = attribute_count;
  const auto start = [&](P... parameters) -> cudaError_t {  // converted as in a call of the kernel
#ifdef CUDA_HOST_SHIM
    return cuda_host::launch(config, kernel, parameters...);
#else
    const void* addresses[] = {&parameters...};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), const_cast<void**>(addresses));
#endif
  };
  return start(std::forward<A>(arguments)...);
}

}  // namespace detail

// Returns this launch's own status; cudaGetLastError may hold somebody else's.
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                   A&&... arguments) {
  return detail::launch(0, kernel, grid, block, smem_bytes, stream, std::forward<A>(arguments)...);
}

// The same, with all thread blocks resident at once, or an error where they don't fit: what
// grid_barrier needs.
template <typename... P, typename... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                               A&&... arguments) {
  return detail::launch(1, kernel, grid, block, smem_bytes, stream, std::forward<A>(arguments)...);
}

inline Status status_of(cudaError_t error) { return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)}; }

// DYNAMIC_SMEM(float, tile): the thread block's dynamic shared memory, as float* tile.
#ifdef CUDA_HOST_SHIM
#define DYNAMIC_SMEM(T, name) T* const name = reinterpret_cast<T*>(cuda_host::dynamic_shared_memory())
#else
#define DYNAMIC_SMEM(T, name)                                          \
  extern __shared__ __align__(128) unsigned char dynamic_smem_bytes[]; \
  T* const name = reinterpret_cast<T*>(dynamic_smem_bytes)
#endif

// Waits until every thread of the grid has come here; writes before it are seen after it, except
// through loads that the compiler may take for read-only (const __restrict__, ld_global_nc_16).
// Every thread must come, the launch must be cooperative, and *word must be 0 before its first use;
// each barrier leaves it ready for the next, of any grid.
__device__ inline void grid_barrier(uint32_t* word) {
  constexpr uint32_t kPhase = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    // The arrivals add up to 2^31: the last one flips the phase bit and leaves zeros below it.
    const bool first_block = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
    const uint32_t others = gridDim.x * gridDim.y * gridDim.z - 1;
    const uint32_t before = atomic_add_release(word, first_block ? kPhase - others : 1);
    wait_while_equal(word, kPhase, before & kPhase);
  }
  __syncthreads();
}

}  // namespace fusedopt
