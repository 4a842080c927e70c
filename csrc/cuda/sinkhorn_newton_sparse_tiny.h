// Plans of very many tiny matrices (hyper-connections: 4 x 4 for each token) by a fixed number of Sinkhorn iterations,
// and the gradient of what was computed, through all of them.
#pragma once
#include <cstdint>

#include "common/status.h"
#include "cuda/stream.h"

namespace fusedopt::cuda {

constexpr int kTinySize = 8;  // rows and columns at most

struct TinyPlans {   // device memory; all of one dtype, float where `single`, else double
  const void* cost;  // [problems][n][m]
  bool single;
  int64_t problems;
  int n, m;
  const void *a, *b;  // [n], [m] for all problems, or nullptr: uniform
  double reg;
  int iterations;  // columns, then rows
  void* plan;      // [problems][n][m]
};

Status launch_tiny_plans(const TinyPlans& plans, cudaStream_t stream);

// The cost's gradient from the plan's, both [problems][n][m]. The workspace holds u before each iteration.
int64_t tiny_plans_workspace_bytes(const TinyPlans& plans);
Status launch_tiny_plans_backward(const TinyPlans& plans, const void* plan_gradient, void* cost_gradient,
                                  void* workspace, cudaStream_t stream);

}  // namespace fusedopt::cuda
