// 16 bytes at once, as the machine moves them. Where they lie has to be aligned so.
#pragma once
#include <cuda_runtime.h>

namespace fusedopt::cuda {

__device__ inline uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ inline void store_16(void* to, uint4 v) { *static_cast<uint4*>(to) = v; }

}  // namespace fusedopt::cuda
