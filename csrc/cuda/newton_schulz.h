// Newton–Schulz on a GPU. Nothing here allocates or synchronises, so all of it can be captured in a CUDA graph; a graph
// replays the addresses and the schedule, which travel in the kernels' arguments.
#pragma once
#include "common/newton_schulz.h"
#include "common/status.h"
#include "cuda/stream.h"

namespace fusedopt::cuda {

int64_t newton_schulz_workspace_bytes(const NewtonSchulzMatrix* matrices, int64_t count,
                                      const NewtonSchulzSchedule& schedule);
// The matrices stand in host memory and hold device addresses, each aligned to its elements' size; no side has more
// than 2^30 elements. Those of one shape are worked on together, up to 512 and 2^26 elements.
//   workspace   device memory of newton_schulz_workspace_bytes bytes, aligned to 16, untouched until the end; its
//               content does not matter
Status launch_newton_schulz(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule& schedule,
                            void* workspace, cudaStream_t stream);

}  // namespace fusedopt::cuda
