// Sinkhorn-Newton-Sparse on the CPU: the entries behind cpu/kernels.h. The parts stand in cpu/sinkhorn_newton_sparse/:
// pass (the fused kernel), system (conjugate gradients), approximate_factor (preconditioner), solver.
#include "cpu/entries.h"
#include "cpu/sinkhorn_newton_sparse/inspect.h"
#include "cpu/sinkhorn_newton_sparse/solver.h"

namespace fusedopt::FUSEDOPT_TARGET {

int64_t transport_workspace_bytes(int64_t n, int64_t m) { return Workspace(nullptr, n, m).bytes; }

CostSummary transport_inspect(const TransportProblem& problem, void* workspace) {
  auto* const reached = static_cast<unsigned char*>(workspace);
  return problem.single ? inspect_cost<float>(problem, reached) : inspect_cost<double>(problem, reached);
}

void transport_solve(const TransportProblem& problem, TransportResult* result, void* workspace) {
  TransportSolver(problem, result, workspace).solve();
}

}  // namespace fusedopt::FUSEDOPT_TARGET
