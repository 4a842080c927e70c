// Lets test_sinkhorn_tiny.py call the CUDA launchers of tiny plans.
#include "cuda/sinkhorn_newton_sparse_tiny.h"

using namespace fusedopt;

extern "C" int64_t tiny_workspace_bytes(const cuda::TinyPlans* plans) {
  return cuda::tiny_plans_workspace_bytes(*plans);
}

extern "C" const char* tiny(const cuda::TinyPlans* plans, cudaStream_t stream) {
  return cuda::launch_tiny_plans(*plans, stream).error;
}

extern "C" const char* tiny_backward(const cuda::TinyPlans* plans, const void* plan_gradient, void* cost_gradient,
                                     void* workspace, cudaStream_t stream) {
  return cuda::launch_tiny_plans_backward(*plans, plan_gradient, cost_gradient, workspace, stream).error;
}
