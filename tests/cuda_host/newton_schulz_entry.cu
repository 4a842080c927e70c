// Lets test_newton_schulz.py call the CUDA launcher of Newton–Schulz: matrices and schedule from arrays, by address.
#include "cuda/newton_schulz.h"

using namespace fusedopt;

namespace {

struct Call {  // as test_newton_schulz.py declares it
  const NewtonSchulzMatrix* matrices;
  int64_t count;
  const NewtonSchulzStep* steps;
  int64_t steps_size;
  double gram_from;
  DType dtype, arithmetic;

  NewtonSchulzSchedule schedule() const { return {{steps, steps + steps_size}, gram_from, dtype, arithmetic}; }
};

}  // namespace

extern "C" int64_t newton_schulz_workspace(const Call* call) {
  return cuda::newton_schulz_workspace_bytes(call->matrices, call->count, call->schedule());
}

extern "C" const char* newton_schulz(const Call* call, void* workspace, cudaStream_t stream) {
  return cuda::launch_newton_schulz(call->matrices, call->count, call->schedule(), workspace, stream).error;
}
