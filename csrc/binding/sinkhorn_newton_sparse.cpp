// Optimal transport's side of the binding: reads the cost, borrows NumPy's memory for everything else, and runs one
// problem or a batch of equal shapes, a chunk of the pool to a problem.
#include "binding/sinkhorn_newton_sparse.h"

#include <pybind11/numpy.h>

#include <atomic>

#include "binding/arrays.h"
#include "cpu/isa.h"
#include "cpu/sinkhorn_newton_sparse/problem.h"
#include "cpu/threads.h"

namespace fusedopt {
namespace {

using Doubles = py::array_t<double, py::array::c_style>;  // made by Python for the call: never converted

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

int64_t workspace_bytes(int64_t n, int64_t m) { return cpu_kernels().transport_workspace_bytes(n, m); }

// One tuple a problem: CostSummary in order.
py::list inspect(const py::object& cost, Doubles a, Doubles b, int threads) {
  ArrayReader reader;
  const CostView view(reader, cost);
  const double* const first_a = checked(a, view.problems * view.n, "a");
  const double* const first_b = checked(b, view.problems * view.m, "b");
  std::vector<CostSummary> summaries(view.problems);
  std::vector<unsigned char> reached(view.problems * view.m);
  {
    py::gil_scoped_release release;
    parallel_for(view.problems, threads, [&](int64_t i) {
      TransportProblem problem = {};
      view.point(&problem, i);
      problem.a = first_a + i * view.n;
      problem.b = first_b + i * view.m;
      summaries[i] = cpu_kernels().transport_inspect(problem, reached.data() + i * view.m);
    });
  }
  py::list answer;
  for (const CostSummary& s : summaries)
    answer.append(py::make_tuple(s.least, s.most, s.nans, s.minus_infs, s.empty_row, s.empty_column));
  return answer;
}

// Fills f, g (a start where `warm`), trace and facts (iterations, error, cost, mass, value, converged) of each problem.
// The workspace is one for each of `lanes`, which work side by side.
void solve(const py::object& cost, Doubles a, Doubles b, Doubles reg, Doubles range, Doubles f, Doubles g,
           Doubles trace, Doubles facts, double tolerance, int64_t max_iterations, bool sinkhorn, bool warm,
           bool single_step, py::array_t<uint8_t, py::array::c_style> workspace, int64_t lanes, int threads) {
  ArrayReader reader;
  const CostView view(reader, cost);
  const int64_t count = view.problems, n = view.n, m = view.m, bytes = workspace_bytes(n, m);
  const double *const a0 = checked(a, count * n, "a"), *const b0 = checked(b, count * m, "b"),
                      *const reg0 = checked(reg, count, "reg"), *const range0 = checked(range, count, "range");
  double *const f0 = checked(f, count * n, "f"), *const g0 = checked(g, count * m, "g"),
                *const facts0 = checked(facts, count * 6, "facts"),
                *const trace0 = checked(trace, count * max_iterations * 6, "trace");
  static_assert(sizeof(TransportStep) == 6 * sizeof(double));
  auto address = reinterpret_cast<uintptr_t>(checked(workspace, lanes * bytes + 64, "workspace"));
  address = (address + 63) / 64 * 64;
  const auto one = [&](int64_t i, int64_t lane, int inner_threads) {
    TransportProblem problem = {};
    view.point(&problem, i);
    problem.a = a0 + i * n;
    problem.b = b0 + i * m;
    problem.reg = reg0[i];
    problem.range = range0[i];
    problem.tolerance = tolerance;
    problem.max_iterations = max_iterations;
    problem.method = sinkhorn ? TransportMethod::kSinkhorn : TransportMethod::kNewton;
    problem.warm = warm;
    problem.single_step = single_step;
    problem.threads = inner_threads;
    TransportResult result = {};
    result.f = f0 + i * n;
    result.g = g0 + i * m;
    result.trace = reinterpret_cast<TransportStep*>(trace0 + i * max_iterations * 6);
    cpu_kernels().transport_solve(problem, &result, reinterpret_cast<void*>(address + lane * bytes));
    double* const out = facts0 + i * 6;
    out[0] = double(result.iterations);
    out[1] = result.error;
    out[2] = result.cost;
    out[3] = result.mass;
    out[4] = result.value;
    out[5] = result.converged;
  };
  py::gil_scoped_release release;
  if (lanes == 1) {
    for (int64_t i = 0; i < count; ++i) one(i, 0, threads);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(lanes, int(lanes), [&](int64_t lane) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) one(i, lane, 1);
  });
}

}  // namespace

void bind_sinkhorn_newton_sparse(py::module_& module) {
  module.def("transport_workspace_bytes", &workspace_bytes, py::arg("n"), py::arg("m"));
  module.def("transport_inspect", &inspect, py::arg("cost"), py::arg("a").noconvert(), py::arg("b").noconvert(),
             py::arg("threads"));
  module.def("transport_solve", &solve, py::arg("cost"), py::arg("a").noconvert(), py::arg("b").noconvert(),
             py::arg("reg").noconvert(), py::arg("range").noconvert(), py::arg("f").noconvert(),
             py::arg("g").noconvert(), py::arg("trace").noconvert(), py::arg("facts").noconvert(), py::arg("tolerance"),
             py::arg("max_iterations"), py::arg("sinkhorn"), py::arg("warm"), py::arg("single_step"),
             py::arg("workspace").noconvert(), py::arg("lanes"), py::arg("threads"));
}

}  // namespace fusedopt
