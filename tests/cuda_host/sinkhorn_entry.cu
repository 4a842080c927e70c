// Lets test_sinkhorn_newton_sparse.py call the CUDA launchers of optimal transport.
#include "cuda/sinkhorn_newton_sparse.h"

using namespace fusedopt;

extern "C" int64_t transport_workspace_bytes(int64_t problems, int64_t n, int64_t m) {
  return cuda::transport_workspace_bytes(problems, n, m);
}

extern "C" const char* transport(const cuda::TransportBatch* batch, void* workspace, cudaStream_t stream) {
  return cuda::launch_transport(*batch, workspace, stream).error;
}
