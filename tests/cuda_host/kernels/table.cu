// What launchers do around a kernel: a large table by value, opting in to much shared memory,
// sizing a cooperative grid.
#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::table_test {
namespace {

struct Table {
  float* data[1500];
  int64_t numel[1500];
  int size;
};

__device__ int sizes_seen = 0;

__global__ void fill_kernel(const Table __grid_constant__ table, float value) {
  DYNAMIC_SMEM(float, scratch);
  scratch[threadIdx.x] = value;
  const int tensor = blockIdx.x;
  for (int64_t i = threadIdx.x; i < table.numel[tensor]; i += blockDim.x) table.data[tensor][i] = scratch[threadIdx.x];
  if (threadIdx.x == 0) atomicAdd(&sizes_seen, int(table.numel[tensor]));
}

}  // namespace

extern "C" cudaError_t fill(float* const* data, const int64_t* numel, int size, float value, int smem_bytes, int opt_in,
                            cudaStream_t stream) {
  Table table{};
  table.size = size;
  std::copy(data, data + size, table.data);
  std::copy(numel, numel + size, table.numel);
  if (opt_in) {
    const cudaError_t error =
        cudaFuncSetAttribute(fill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error != cudaSuccess) return error;
  }
  return launch(fill_kernel, size, 128, smem_bytes, stream, table, value);
}

// How many blocks of fill_kernel fit on the device at once.
extern "C" int resident_blocks(int threads, int smem_bytes) {
  int device = 0, processors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return -1;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill_kernel, threads, smem_bytes) != cudaSuccess)
    return -1;
  return processors * blocks;
}

}  // namespace fusedopt::table_test
