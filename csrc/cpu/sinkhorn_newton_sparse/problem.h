// One transport problem, what to do with it and where results go. All pointers are the caller's.
#pragma once
#include <cstdint>

namespace fusedopt {

enum class TransportMethod : int32_t { kNewton, kSinkhorn };

struct TransportProblem {
  const void* cost;  // n rows of m, row_stride elements apart
  bool single;       // float elements, else double
  int64_t row_stride, n, m;
  const double *a, *b;    // marginals, of equal sums
  double reg, tolerance;  // tolerance: on the L1 error of both marginals
  double range;           // largest finite cost - smallest
  int64_t max_iterations;
  TransportMethod method;
  bool warm;         // g holds a start
  bool single_step;  // one iteration of the method from there, whatever comes of it
  int threads;
};

// One line of the trace.
struct TransportStep {
  double reg, newton, error, entries, cg_iterations, step;
};

struct TransportResult {
  double *f, *g;         // n, m
  TransportStep* trace;  // max_iterations
  int64_t iterations;
  double error, cost, mass, value;
  bool converged;
};

// What a look at the cost says, before anything is computed. Elements are counted over the whole matrix.
struct CostSummary {
  double least, most;               // of the finite elements; least > most: there are none
  int64_t nans, minus_infs;         // where the first one is, or -1
  int64_t empty_row, empty_column;  // first with mass but without a finite element opposite to mass, or -1
};

}  // namespace fusedopt
