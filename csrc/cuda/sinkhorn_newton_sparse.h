// Entropic optimal transport on a GPU: a batch of problems of one shape, solved by one launch.
#pragma once
#include <cstdint>

#include "common/status.h"
#include "cuda/stream.h"

namespace fusedopt::cuda {

// What is known of a problem when it is done. kLeast and the rest are of the cost, as transport_inspect on the CPU: the
// range of its finite elements, and where the first one of each kind is that no solver can take, or -1. A problem that
// has one, or too small a reg, is not solved: its error is infinite.
enum TransportFact {
  kIterations,
  kError,
  kCost,
  kMass,
  kValue,
  kConverged,
  kLeast,
  kMost,
  kNan,
  kMinusInf,
  kEmptyRow,
  kEmptyColumn,
  kTransportFacts
};
constexpr int kTraceColumns = 6;  // reg, newton, error, entries, cg_iterations, step

struct TransportBatch {  // device memory; problems one after the other
  const void* cost;      // float where `single`, else double
  bool single;
  int64_t problems, n, m, problem_stride, row_stride;  // strides in elements
  const double *a, *b, *reg;                           // [problems][n], [problems][m], [problems]
  double tolerance;                                    // on the L1 error of both marginals
  int64_t max_iterations;
  bool sinkhorn;     // over-relaxed Sinkhorn, else Newton
  bool warm;         // g holds a start
  bool single_step;  // one iteration of the method from there, whatever comes of it
  double *f, *g;     // [problems][n], [problems][m]
  double* trace;     // [problems][trace_rows][kTraceColumns], of the first iterations
  int64_t trace_rows;
  double* facts;  // [problems][kTransportFacts]
};

int64_t transport_workspace_bytes(int64_t problems, int64_t n, int64_t m);
Status launch_transport(const TransportBatch& batch, void* workspace, cudaStream_t stream);

}  // namespace fusedopt::cuda
