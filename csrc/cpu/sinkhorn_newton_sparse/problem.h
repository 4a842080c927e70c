// One transport problem, what to do with it and where results go. All pointers are the caller's.
#pragma once
#include <cstdint>

namespace fusedopt {

enum class TransportMethod : int32_t { kNewton, kSinkhorn };

// One line of the trace.
struct TransportStep {
  double reg, newton, error, entries, cg_iterations, step;
};

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
  bool low_memory;   // keep at most half of the plan in Newton's system
  int threads;
  bool (*watch)(void* watcher, const TransportStep& step);  // called after each iteration; false: no further
  void* watcher;
};

struct TransportResult {
  double *f, *g;         // n, m
  TransportStep* trace;  // the first trace_room iterations
  int64_t trace_room, iterations;
  double error, cost, mass, value;
  bool converged;
};

// The linear system behind derivatives of a solved problem's plan P with column sums c:
//   a x + P y = rows,  P' x + c y = columns,      the sums of both right sides equal.
struct TransportAdjoint {
  const double *rows, *columns;  // n, m
  double *x, *y;                 // 0 where the marginal is
  double residual;               // what was left of the columns' right side, relative; 2-norm
};

// Many problems of one shape, n and m at most kTiny, which are solved side by side: one a lane.
constexpr int64_t kTiny = 8;
struct TinyTransports {
  const void* cost;
  bool single;
  int64_t problem_stride, row_stride, n, m;
  const double *a, *b, *reg;
  double tolerance;
  int64_t max_iterations;
  double *f, *g;
  TransportStep* trace;  // trace_room of each problem
  int64_t trace_room;
  double* facts;  // of each problem: iterations, error, cost, mass, value, converged
};

// What a look at the cost says, before anything is computed. Elements are counted over the whole matrix.
struct CostSummary {
  double least, most;               // of the finite elements; least > most: there are none
  int64_t nans, minus_infs;         // where the first one is, or -1
  int64_t empty_row, empty_column;  // first with mass but without a finite element opposite to mass, or -1
};

}  // namespace fusedopt
