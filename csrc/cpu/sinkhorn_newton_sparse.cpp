// Sinkhorn-Newton-Sparse on the CPU: the entries behind cpu/kernels.h. The parts stand in cpu/sinkhorn_newton_sparse/:
// pass (the fused kernel), system (conjugate gradients), approximate_factor (preconditioner), solver, adjoint
// (derivatives of plans), tiny (many matrices of a few rows).
#include "cpu/entries.h"
#include "cpu/sinkhorn_newton_sparse/adjoint.h"
#include "cpu/sinkhorn_newton_sparse/inspect.h"
#include "cpu/sinkhorn_newton_sparse/solver.h"
#include "cpu/sinkhorn_newton_sparse/tiny.h"

namespace fusedopt::FUSEDOPT_TARGET {

int64_t transport_workspace_bytes(int64_t n, int64_t m, bool low_memory) {
  return Workspace(nullptr, n, m, low_memory).bytes;
}

CostSummary transport_inspect(const TransportProblem& problem, int64_t begin, int64_t end, double* reached) {
  return problem.single ? inspect_rows<float>(problem, begin, end, reached)
                        : inspect_rows<double>(problem, begin, end, reached);
}

void transport_solve(const TransportProblem& problem, TransportResult* result, void* workspace) {
  TransportSolver(problem, result, workspace).solve();
}

void transport_tiny(const TinyTransports& all, int64_t begin, int64_t end) {
  all.single ? solve_tiny<float>(all, begin, end) : solve_tiny<double>(all, begin, end);
}

void transport_adjoint(const TransportProblem& problem, const double* g, TransportAdjoint* adjoint, void* workspace) {
  AdjointSolver(problem, workspace).solve(g, adjoint);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
