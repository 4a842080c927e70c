// Optimal transport's side of the binding: reads the cost, borrows NumPy's memory for everything else, and runs one
// problem or a batch of equal shapes, a chunk of the pool to a problem.
#include "binding/sinkhorn_newton_sparse.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#include "binding/arrays.h"
#include "binding/gpu.h"
#include "binding/numbers.h"
#include "cpu/isa.h"
#include "cpu/sinkhorn_newton_sparse/problem.h"
#include "cpu/threads.h"
#include "cuda/sinkhorn_newton_sparse.h"
#include "cuda/sinkhorn_newton_sparse_tiny.h"

namespace fusedopt {
namespace {

using Doubles = py::array_t<double, py::array::c_style>;  // made by Python for the call: never converted
using Bytes = py::array_t<uint8_t, py::array::c_style>;

template <typename T>
T* checked(py::array_t<T, py::array::c_style>& array, int64_t size, const char* name) {
  if (array.size() < size) throw py::value_error(std::string(name) + " is too small");
  return array.mutable_data();
}

// The cost as (problems, n, m): its last dimension contiguous.
struct CostView {
  const char* data;
  bool single;
  int64_t problems, n, m, problem_stride, row_stride;
  dlpack::Device device;

  CostView(ArrayReader& reader, const py::object& cost) {
    ArrayView view;
    const ArgName name = {"cost", -1, ""};
    reader.read(cost.ptr(), name, &view);
    if (view.complex || (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64))
      throw py::type_error(describe(name, cost.ptr()) + ": expected float32 or float64");
    if (view.ndim != 3) throw py::value_error(describe(name, cost.ptr()) + ": expected three dimensions");
    if (view.strides && view.strides[2] != 1 && view.shape[2] > 1)
      throw py::value_error(describe(name, cost.ptr()) + ": expected contiguous rows");
    data = static_cast<const char*>(view.data);
    device = view.device;
    single = view.dtype == DType::kFloat32;
    problems = view.shape[0];
    n = view.shape[1];
    m = view.shape[2];
    row_stride = view.strides ? view.strides[1] : m;
    problem_stride = view.strides ? view.strides[0] : n * m;
  }

  void point(TransportProblem* problem, int64_t i) const {
    problem->cost = data + i * problem_stride * (single ? 4 : 8);
    problem->single = single;
    problem->row_stride = row_stride;
    problem->n = n;
    problem->m = m;
  }
};

// Columns that have mass, but no row that can send it there.
void close_columns(const TransportProblem& problem, CostSummary* summary, double* reached) {
  for (int64_t j = problem.m - 1; j >= 0; --j) {
    if (problem.b[j] > 0 && !(reached[j] > 0)) summary->empty_column = j;
    reached[j] = 0;  // for the next one
  }
}

// Of a part of the rows into that of those before.
void join(const CostSummary& part, CostSummary* whole) {
  const auto first = [](int64_t* known, int64_t other) { *known = *known < 0 ? other : *known; };
  whole->least = std::min(whole->least, part.least);
  whole->most = std::max(whole->most, part.most);
  first(&whole->nans, part.nans);
  first(&whole->minus_infs, part.minus_infs);
  first(&whole->empty_row, part.empty_row);
}

int64_t workspace_bytes(int64_t n, int64_t m, bool low_memory) {
  return cpu_kernels().transport_workspace_bytes(n, m, low_memory);
}

// One row a problem: CostSummary in order. The rows of each problem go in parts, whose summaries are put together.
void inspect(const py::object& cost, Doubles a, Doubles b, Doubles summaries, int threads) {
  ArrayReader reader;
  const CostView view(reader, cost);
  const double* const a0 = checked(a, view.problems * view.n, "a");
  const double* const b0 = checked(b, view.problems * view.m, "b");
  double* const out = checked(summaries, view.problems * 6, "summaries");
  const int64_t parts = view.problems == 1 && view.n * view.m > 65536 ? 16 : 1;
  const int64_t group = parts > 1 ? 1 : 65536 / (view.n * view.m) + 1;  // problems to a chunk
  const int64_t groups = (view.problems + group - 1) / group;
  std::vector<CostSummary> found(view.problems * parts);
  std::vector<double> reached(groups * parts * view.m);
  py::gil_scoped_release release;
  parallel_for(groups * parts, threads, [&](int64_t chunk) {
    double* const columns = reached.data() + chunk * view.m;
    const int64_t part = chunk % parts, first = chunk / parts * group;
    for (int64_t i = first; i < first + group && i < view.problems; ++i) {
      TransportProblem problem = {};
      view.point(&problem, i);
      problem.a = a0 + i * view.n;
      problem.b = b0 + i * view.m;
      CostSummary& summary = found[i * parts + part];
      summary = cpu_kernels().transport_inspect(problem, part * view.n / parts, (part + 1) * view.n / parts, columns);
      if (parts == 1) close_columns(problem, &summary, columns);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    join(found[part], &found[0]);
    for (int64_t j = 0; j < view.m; ++j) reached[j] += reached[part * view.m + j];
  }
  if (parts > 1) {
    TransportProblem problem = {};
    view.point(&problem, 0);
    problem.b = b0;
    close_columns(problem, &found[0], reached.data());
  }
  for (int64_t i = 0; i < view.problems; ++i) {
    const CostSummary& s = found[i * parts];
    const double row[] = {
        s.least, s.most, double(s.nans), double(s.minus_infs), double(s.empty_row), double(s.empty_column)};
    std::copy(row, row + 6, out + i * 6);
  }
}

// Calls work(problem, lane, threads) for every problem: one after the other, or `lanes` of them side by side.
template <typename F>
void each_problem(int64_t count, int64_t lanes, int threads, const F& work) {
  if (lanes == 1) {
    for (int64_t i = 0; i < count; ++i) work(i, 0, threads);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(lanes, int(lanes), [&](int64_t lane) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, lane, 1);
  });
}

uintptr_t aligned(Bytes& workspace, int64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(checked(workspace, size + 64, "workspace"));
  return (address + 63) / 64 * 64;
}

// A callback in Python. What it raises ends every problem, and is raised again when all threads are back.
class Watcher {
 public:
  explicit Watcher(const py::object& call) : call_(call) {}

  // For one problem of the batch; lives while it is solved.
  struct Problem {
    Watcher* all;
    int64_t index;
  };
  static bool watch(void* watcher, const TransportStep& step) {
    const auto* const problem = static_cast<Problem*>(watcher);
    return problem->all->ask(problem->index, step);
  }
  bool wanted() const { return !call_.is_none(); }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  bool ask(int64_t index, const TransportStep& s) {
    const py::gil_scoped_acquire acquire;
    if (error_) return false;
    try {
      return !call_(index, py::make_tuple(s.reg, s.newton, s.error, s.entries, s.cg_iterations, s.step)).cast<bool>();
    } catch (...) {
      error_ = std::current_exception();
      return false;
    }
  }

  const py::object& call_;
  std::exception_ptr error_;
};

// Where a batch's arrays begin. Fills f, g (a start where `warm`), trace and facts (iterations, error, cost, mass,
// value, converged) of each problem.
struct Batch {
  const CostView& view;
  const double *a, *b, *reg;
  double *f, *g, *trace, *facts;
  int64_t trace_room;

  void point(TransportProblem* problem, int64_t i) const {
    view.point(problem, i);
    problem->a = a + i * view.n;
    problem->b = b + i * view.m;
    problem->reg = reg[i];
  }
  TransportStep* lines(int64_t i) const { return reinterpret_cast<TransportStep*>(trace) + i * trace_room; }
};
static_assert(sizeof(TransportStep) == 6 * sizeof(double));

// All problems of a few rows; those that are not converged then are left for the solver.
void solve_tiny(const Batch& batch, double tolerance, int64_t max_iterations, int threads) {
  const CostView& view = batch.view;
  const TinyTransports all = {view.data, view.single,    view.problem_stride, view.row_stride, view.n,         view.m,
                              batch.a,   batch.b,        batch.reg,           tolerance,       max_iterations, batch.f,
                              batch.g,   batch.lines(0), batch.trace_room,    batch.facts};
  constexpr int64_t kProblems = 256;  // of a chunk, a multiple of any pack's lanes
  parallel_for((view.problems + kProblems - 1) / kProblems, threads, [&](int64_t chunk) {
    const int64_t end = (chunk + 1) * kProblems;
    cpu_kernels().transport_tiny(all, chunk * kProblems, end < view.problems ? end : view.problems);
  });
}

// The workspace is one for each of `lanes`, which work side by side.
void solve(const py::object& cost, Doubles a, Doubles b, Doubles reg, Doubles range, Doubles f, Doubles g,
           Doubles trace, Doubles facts, double tolerance, int64_t max_iterations, bool sinkhorn, bool warm,
           bool single_step, bool low_memory, const py::object& watch, Bytes workspace, int64_t lanes, int threads) {
  ArrayReader reader;
  const CostView view(reader, cost);
  const int64_t count = view.problems, n = view.n, m = view.m, bytes = workspace_bytes(n, m, low_memory);
  if (trace.ndim() != 3) throw py::value_error("trace has three dimensions");
  const int64_t room = trace.shape(1);
  const Batch batch = {view,
                       checked(a, count * n, "a"),
                       checked(b, count * m, "b"),
                       checked(reg, count, "reg"),
                       checked(f, count * n, "f"),
                       checked(g, count * m, "g"),
                       checked(trace, count * room * 6, "trace"),
                       checked(facts, count * 6, "facts"),
                       room};
  const double* const range0 = checked(range, count, "range");
  const uintptr_t address = aligned(workspace, lanes * bytes);
  Watcher watcher(watch);
  const bool tiny = n <= kTiny && m <= kTiny && !sinkhorn && !warm && !single_step && !watcher.wanted();
  const auto one = [&](int64_t i, int64_t lane, int inner_threads) {
    double* const out = batch.facts + i * 6;
    if (tiny && out[5] != 0) return;
    TransportProblem problem = {};
    batch.point(&problem, i);
    problem.range = range0[i];
    problem.tolerance = tolerance;
    problem.max_iterations = max_iterations;
    problem.method = sinkhorn ? TransportMethod::kSinkhorn : TransportMethod::kNewton;
    problem.warm = warm;
    problem.single_step = single_step;
    problem.low_memory = low_memory;
    problem.threads = inner_threads;
    Watcher::Problem watched = {&watcher, i};
    problem.watch = watcher.wanted() ? &Watcher::watch : nullptr;
    problem.watcher = &watched;
    TransportResult result = {};
    result.f = batch.f + i * n;
    result.g = batch.g + i * m;
    result.trace = batch.lines(i);
    result.trace_room = room;
    cpu_kernels().transport_solve(problem, &result, reinterpret_cast<void*>(address + lane * bytes));
    out[0] = double(result.iterations);
    out[1] = result.error;
    out[2] = result.cost;
    out[3] = result.mass;
    out[4] = result.value;
    out[5] = result.converged;
  };
  {
    py::gil_scoped_release release;
    if (tiny) solve_tiny(batch, tolerance, max_iterations, threads);
    each_problem(count, lanes, threads, one);
  }
  watcher.rethrow();
}

// x, y and residuals of each problem's TransportAdjoint, at the plan of g.
void solve_adjoint(const py::object& cost, Doubles a, Doubles b, Doubles reg, Doubles g, Doubles rows, Doubles columns,
                   Doubles x, Doubles y, Doubles residuals, Bytes workspace, int64_t lanes, int threads) {
  ArrayReader reader;
  const CostView view(reader, cost);
  const int64_t count = view.problems, n = view.n, m = view.m, bytes = workspace_bytes(n, m, false);
  const Batch batch = {view,
                       checked(a, count * n, "a"),
                       checked(b, count * m, "b"),
                       checked(reg, count, "reg"),
                       nullptr,
                       checked(g, count * m, "g"),
                       nullptr,
                       nullptr,
                       0};
  const double *const rows0 = checked(rows, count * n, "rows"), *const columns0 =
                                                                    checked(columns, count * m, "columns");
  double *const x0 = checked(x, count * n, "x"), *const y0 = checked(y, count * m, "y"),
                *const residuals0 = checked(residuals, count, "residuals");
  const uintptr_t address = aligned(workspace, lanes * bytes);
  py::gil_scoped_release release;
  each_problem(count, lanes, threads, [&](int64_t i, int64_t lane, int inner_threads) {
    TransportProblem problem = {};
    batch.point(&problem, i);
    problem.threads = inner_threads;
    TransportAdjoint adjoint = {rows0 + i * n, columns0 + i * m, x0 + i * n, y0 + i * m, 0};
    cpu_kernels().transport_adjoint(problem, batch.g + i * m, &adjoint,
                                    reinterpret_cast<void*>(address + lane * bytes));
    residuals0[i] = adjoint.residual;
  });
}

int64_t gpu_workspace_bytes(int64_t problems, int64_t n, int64_t m) {
  if constexpr (kWithCuda) return cuda::transport_workspace_bytes(problems, n, m);
  throw std::runtime_error("built without CUDA kernels");
}

// Memory that Python made for the call, on the cost's device.
template <typename T>
T* on_device(ArrayReader& reader, const CostView& cost, const py::object& array, int64_t size, const char* name) {
  ArrayView view;
  reader.read(array.ptr(), {name, -1, ""}, &view);
  if (!(view.device == cost.device) || !view.contiguous() || view.numel() < size)
    throw py::value_error(std::string(name) + " does not fit the launch");
  return static_cast<T*>(view.data);
}

// As solve(), with all arrays on the cost's GPU, on the stream on which its library works. Returns before it is done.
// Facts are those of cuda/sinkhorn_newton_sparse.h.
void solve_on_gpu(const py::object& cost, const py::object& a, const py::object& b, const py::object& reg,
                  const py::object& f, const py::object& g, const py::object& trace, const py::object& facts,
                  double tolerance, int64_t max_iterations, int64_t trace_rows, bool sinkhorn, bool warm,
                  bool single_step, uintptr_t workspace, uintptr_t stream_address) {
  ArrayReader reader;
  const CostView view(reader, cost);
  const int64_t count = view.problems, n = view.n, m = view.m;
  cuda::TransportBatch batch = {};
  batch.cost = view.data;
  batch.single = view.single;
  batch.problems = count;
  batch.n = n;
  batch.m = m;
  batch.problem_stride = view.problem_stride;
  batch.row_stride = view.row_stride;
  batch.a = on_device<double>(reader, view, a, count * n, "a");
  batch.b = on_device<double>(reader, view, b, count * m, "b");
  batch.reg = on_device<double>(reader, view, reg, count, "reg");
  batch.tolerance = tolerance;
  batch.max_iterations = max_iterations;
  batch.sinkhorn = sinkhorn;
  batch.warm = warm;
  batch.single_step = single_step;
  batch.f = on_device<double>(reader, view, f, count * n, "f");
  batch.g = on_device<double>(reader, view, g, count * m, "g");
  batch.trace = on_device<double>(reader, view, trace, count * trace_rows * cuda::kTraceColumns, "trace");
  batch.trace_rows = trace_rows;
  batch.facts = on_device<double>(reader, view, facts, count * cuda::kTransportFacts, "facts");
  void* const memory = reinterpret_cast<void*>(workspace);
  void* stream = reinterpret_cast<void*>(stream_address);
  reader.current_stream(cost.ptr(), view.device, &stream);
  launch_on_gpu(view.device.id, [&] {
    if constexpr (kWithCuda) return cuda::launch_transport(batch, memory, static_cast<cudaStream_t>(stream));
    return Status();
  });
}

// Runs launch(plans, stream) for the tiny plans of a cost that is contiguous; a and b may be None.
template <typename Launch>
void with_tiny_plans(const py::object& cost, const py::object& a, const py::object& b, double reg, int iterations,
                     uintptr_t stream_address, ArrayReader& reader, Launch launch) {
  const CostView view(reader, cost);
  cuda::TinyPlans plans = {};
  plans.cost = view.data;
  plans.single = view.single;
  plans.problems = view.problems;
  plans.n = int(view.n);
  plans.m = int(view.m);
  plans.a = a.is_none() ? nullptr : on_device<void>(reader, view, a, view.n, "a");
  plans.b = b.is_none() ? nullptr : on_device<void>(reader, view, b, view.m, "b");
  plans.reg = reg;
  plans.iterations = iterations;
  void* stream = reinterpret_cast<void*>(stream_address);
  reader.current_stream(cost.ptr(), view.device, &stream);
  launch(view, plans, static_cast<cudaStream_t>(stream));
}

void tiny_plans(const py::object& cost, const py::object& a, const py::object& b, double reg, int iterations,
                const py::object& plan, uintptr_t stream_address) {
  ArrayReader reader;
  with_tiny_plans(cost, a, b, reg, iterations, stream_address, reader,
                  [&](const CostView& view, cuda::TinyPlans& plans, cudaStream_t stream) {
                    plans.plan = on_device<void>(reader, view, plan, view.problems * view.n * view.m, "plan");
                    launch_on_gpu(view.device.id, [&] {
                      if constexpr (kWithCuda) return cuda::launch_tiny_plans(plans, stream);
                      return Status();
                    });
                  });
}

int64_t tiny_plans_workspace_bytes(int64_t problems, int n, int m, bool single, int iterations) {
  cuda::TinyPlans plans = {};
  plans.problems = problems;
  plans.n = n;
  plans.m = m;
  plans.single = single;
  plans.iterations = iterations;
  if constexpr (kWithCuda) return cuda::tiny_plans_workspace_bytes(plans);
  throw std::runtime_error("built without CUDA kernels");
}

void tiny_plans_backward(const py::object& cost, const py::object& a, const py::object& b, double reg, int iterations,
                         const py::object& plan_gradient, const py::object& cost_gradient, uintptr_t workspace,
                         uintptr_t stream_address) {
  ArrayReader reader;
  with_tiny_plans(cost, a, b, reg, iterations, stream_address, reader,
                  [&](const CostView& view, cuda::TinyPlans& plans, cudaStream_t stream) {
                    const int64_t size = view.problems * view.n * view.m;
                    void* const from = on_device<void>(reader, view, plan_gradient, size, "plan_gradient");
                    void* const to = on_device<void>(reader, view, cost_gradient, size, "cost_gradient");
                    void* const memory = reinterpret_cast<void*>(workspace);
                    launch_on_gpu(view.device.id, [&] {
                      if constexpr (kWithCuda) return cuda::launch_tiny_plans_backward(plans, from, to, memory, stream);
                      return Status();
                    });
                  });
}

}  // namespace

void bind_sinkhorn_newton_sparse(py::module_& module) {
  using namespace py::literals;
  const auto own = [](const char* name) { return py::arg(name).noconvert(); };
  module.def("transport_workspace_bytes", &workspace_bytes, "n"_a, "m"_a, "low_memory"_a);
  module.def("transport_inspect", &inspect, "cost"_a, own("a"), own("b"), own("summaries"), "threads"_a);
  module.def("transport_solve", &solve, "cost"_a, own("a"), own("b"), own("reg"), own("range"), own("f"), own("g"),
             own("trace"), own("facts"), "tolerance"_a, "max_iterations"_a, "sinkhorn"_a, "warm"_a, "single_step"_a,
             "low_memory"_a, "watch"_a, own("workspace"), "lanes"_a, "threads"_a);
  module.def("transport_adjoint", &solve_adjoint, "cost"_a, own("a"), own("b"), own("reg"), own("g"), own("rows"),
             own("columns"), own("x"), own("y"), own("residuals"), own("workspace"), "lanes"_a, "threads"_a);
  module.def("transport_gpu_workspace_bytes", &gpu_workspace_bytes, "problems"_a, "n"_a, "m"_a);
  module.def("transport_solve_on_gpu", &solve_on_gpu, "cost"_a, "a"_a, "b"_a, "reg"_a, "f"_a, "g"_a, "trace"_a,
             "facts"_a, "tolerance"_a, "max_iterations"_a, "trace_rows"_a, "sinkhorn"_a, "warm"_a, "single_step"_a,
             "workspace"_a, "stream"_a);
  module.def("tiny_plans", &tiny_plans, "cost"_a, "a"_a, "b"_a, "reg"_a, "iterations"_a, "plan"_a, "stream"_a);
  module.def("tiny_plans_workspace_bytes", &tiny_plans_workspace_bytes, "problems"_a, "n"_a, "m"_a, "single"_a,
             "iterations"_a);
  module.def("tiny_plans_backward", &tiny_plans_backward, "cost"_a, "a"_a, "b"_a, "reg"_a, "iterations"_a,
             "plan_gradient"_a, "cost_gradient"_a, "workspace"_a, "stream"_a);
}

}  // namespace fusedopt
