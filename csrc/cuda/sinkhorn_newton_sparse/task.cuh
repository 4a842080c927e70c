// One problem of a batch, as the solver sees it. It lies in shared memory: its pointers would take half the registers.
#pragma once
#include "cuda/sinkhorn_newton_sparse.h"
#include "cuda/sinkhorn_newton_sparse/memory.h"

namespace fusedopt::cuda {

struct PassSums {
  double error, square;  // of b - columns: sums of sizes and squares
  double along;          // sum of (columns - b) step
  double objective;      // -<f,a> - <g,b>
  double entries;        // kept
  bool full;             // there were more than there is room for: those that are kept are of no use
};

struct TransportTask {
  const void* cost;
  const double *a, *b;
  double *f, *g, *trace, *facts;
  TransportShape shape;
  TransportMemory memory;
  int64_t row_stride, n, m, max_iterations, trace_rows;
  double reg, tolerance;
  bool single, sinkhorn, warm, single_step;
  // What the solver finds out once and needs again: written by one thread, read after the team's next barrier.
  PassSums sums;
  double range, mass;                // of the cost; of the marginals
  double slope, start, start_error;  // of the line search
  int64_t cg_iterations;

  __device__ void set(const TransportBatch& batch, int64_t p, char* workspace) {
    cost = static_cast<const char*>(batch.cost) + p * batch.problem_stride * (batch.single ? 4 : 8);
    a = batch.a + p * batch.n;
    b = batch.b + p * batch.m;
    f = batch.f + p * batch.n;
    g = batch.g + p * batch.m;
    trace = batch.trace + p * batch.trace_rows * kTraceColumns;
    facts = batch.facts + p * kTransportFacts;
    shape = TransportShape::of(batch.n, batch.m);
    memory.carve(workspace, shape);
    row_stride = batch.row_stride;
    n = batch.n;
    m = batch.m;
    max_iterations = batch.max_iterations;
    trace_rows = batch.trace_rows;
    reg = batch.reg[p];
    tolerance = batch.tolerance;
    single = batch.single;
    sinkhorn = batch.sinkhorn;
    warm = batch.warm;
    single_step = batch.single_step;
  }

  __device__ int columns() const { return int(m); }
  __device__ double cost_at(int64_t i, int64_t j) const {
    const int64_t at = i * row_stride + j;
    return single ? double(static_cast<const float*>(cost)[at]) : static_cast<const double*>(cost)[at];
  }
};

}  // namespace fusedopt::cuda
