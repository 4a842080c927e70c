// Sinkhorn-Newton-Sparse on a GPU: the whole solve in one launch, the host waits for nothing in between. One problem
// has the whole grid, which meets at barriers; of many small ones each has a thread block. The same source serves both
// (team.cuh), and gives the same bits: what decides is uniform, so templates would only double the machine code. 512
// threads of 128 registers, all of a multiprocessor's; nothing spills. The parts stand in cuda/sinkhorn_newton_sparse/:
// pass (the fused kernel, with bytes and operations), system (conjugate gradients), inspect, solver.
#define FUSEDOPT_TARGET cuda
#include "cuda/sinkhorn_newton_sparse.h"
#include "cuda/sinkhorn_newton_sparse/solver.cuh"

namespace fusedopt::cuda {
namespace {

constexpr int64_t kHeaderBytes = 128;      // of the workspace: the grid's barrier
constexpr int64_t kMostRows = 0x7fffffff;  // indices of kept entries have 32 bits
constexpr int64_t kMostLanes = 1024, kLanesBytes = int64_t(1) << 28;

// Thread blocks that work side by side, each with memory of its own, on a problem each; 0: the grid works on one.
struct Lanes {
  int64_t count, bytes;

  Lanes(int64_t problems, int64_t n, int64_t m) {
    TransportMemory memory;
    bytes = memory.carve(nullptr, TransportShape::of(n, m));
    const bool many = problems >= 64 && n * m <= (1 << 19);
    const bool by_block = n * m <= 16384 || (problems > 1 && n * m <= 65536) || many;
    const int64_t fit = larger_of(kLanesBytes / bytes, 64), most = fit < kMostLanes ? fit : kMostLanes;
    count = !by_block ? 0 : problems < most ? problems : most;
  }
};

__global__ void __launch_bounds__(kMostThreads, 1)
    transport_kernel(const TransportBatch __grid_constant__ batch, char* workspace, int64_t lane_bytes, bool by_block,
                     bool rows_in_shared) {
  DYNAMIC_SMEM(double, rows);
  __shared__ TransportTask task;
  __shared__ TeamScratch scratch;
  Team team(by_block, scratch, reinterpret_cast<uint32_t*>(workspace));
  const int64_t lane = by_block ? blockIdx.x : 0, lanes = by_block ? gridDim.x : 1;
  for (int64_t p = lane; p < batch.problems; p += lanes) {
    if (threadIdx.x == 0) task.set(batch, p, workspace + kHeaderBytes + lane * lane_bytes);
    __syncthreads();
    RowGroup group(team, task.shape.wide);
    TransportSolver(team, group, task, rows_in_shared ? rows : nullptr).solve();
    team.sync();
  }
}

struct Device {
  int processors = 0, shared_bytes = 0;
  cudaError_t status;

  Device() {
    int number = 0;
    status = cudaGetDevice(&number);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, number);
    if (status == cudaSuccess)
      status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  }
};

// As many thread blocks as can be resident, and no more than there are chunks for.
cudaError_t grid_size(const Device& device, const TransportShape& shape, int64_t shared, unsigned* blocks) {
  int per_processor = 0;
  const cudaError_t status =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, transport_kernel, shape.threads, shared);
  const int64_t groups = shape.wide ? 1 : shape.threads / kWarp;
  const int64_t useful = ceil_div(shape.chunks, groups), resident = int64_t(per_processor) * device.processors;
  *blocks = unsigned(useful < resident ? useful : resident);
  return status;
}

}  // namespace

int64_t transport_workspace_bytes(int64_t problems, int64_t n, int64_t m) {
  const Lanes lanes(problems, n, m);
  return kHeaderBytes + larger_of(lanes.count, 1) * lanes.bytes;
}

Status launch_transport(const TransportBatch& batch, void* workspace, cudaStream_t stream) {
  if (batch.n > kMostRows || batch.m > kMostRows) return {"a cost has fewer than 2^31 rows and columns"};
  if (batch.problems == 0) return {};
  const Device device;
  if (device.status != cudaSuccess) return status_of(device.status);
  const TransportShape shape = TransportShape::of(batch.n, batch.m);
  const Lanes lanes(batch.problems, batch.n, batch.m);
  const int64_t wanted = shape.shared_doubles() * int64_t(sizeof(double));
  const bool rows_in_shared =
      batch.m <= kAlwaysShared ||
      wanted + int64_t(sizeof(TeamScratch) + sizeof(TransportTask)) + 256 <= device.shared_bytes;
  const int64_t shared = rows_in_shared ? wanted : 0;
  cudaError_t status = cudaFuncSetAttribute(transport_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (status != cudaSuccess) return status_of(status);
  const dim3 threads(shape.threads);
  auto* const memory = static_cast<char*>(workspace);
  if (lanes.count > 0)
    return status_of(launch(transport_kernel, dim3(unsigned(lanes.count)), threads, shared, stream, batch, memory,
                            lanes.bytes, true, rows_in_shared));
  unsigned blocks = 0;
  status = grid_size(device, shape, shared, &blocks);
  if (status == cudaSuccess) status = cudaMemsetAsync(memory, 0, kHeaderBytes, stream);
  if (status != cudaSuccess) return status_of(status);
  return status_of(launch_cooperative(transport_kernel, dim3(blocks), threads, shared, stream, batch, memory,
                                      lanes.bytes, false, rows_in_shared));
}

}  // namespace fusedopt::cuda
