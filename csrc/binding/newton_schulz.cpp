// Newton–Schulz's side of the binding: the schedule from Python, and batches of matrices as they lie in memory.
#include "binding/newton_schulz.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "binding/arrays.h"
#include "binding/gpu.h"
#include "cpu/newton_schulz.h"
#include "cuda/newton_schulz.h"

namespace fusedopt {
namespace {

using Steps = std::vector<std::tuple<double, double, double, bool>>;

DType floating_dtype(const std::string& name, const char* argument) {
  static const std::pair<const char*, DType> kNames[] = {{"float32", DType::kFloat32},
                                                         {"float64", DType::kFloat64},
                                                         {"bfloat16", DType::kBFloat16},
                                                         {"float16", DType::kFloat16}};
  for (const auto& [known, dtype] : kNames)
    if (name == known) return dtype;
  throw py::value_error(std::string(argument) + " is '" + name + "', expected a floating one");
}

NewtonSchulzSchedule schedule_of(const Steps& steps, double gram_from, const std::string& dtype,
                                 const std::string& arithmetic) {
  NewtonSchulzSchedule schedule = {
      {}, gram_from, floating_dtype(dtype, "dtype"), floating_dtype(arithmetic, "arithmetic")};
  for (const auto& [a, b, c, restart] : steps) schedule.steps.push_back({a, b, c, restart});
  return schedule;
}

ArrayView read_matrices(ArrayReader& reader, const py::object& array, const char* prefix, int32_t device_type) {
  const ArgName name = {prefix, -1, ""};
  ArrayView view;
  reader.read(array.ptr(), name, &view);
  if (view.may_be_lazy()) refuse_lazy(array.ptr(), name);
  const auto what = [&] { return describe(name, array.ptr()); };
  if (view.complex || !is_floating(view.dtype))
    throw py::type_error(what() + ": expected float32, float64, bfloat16 or float16");
  if (view.ndim < 2) throw py::value_error(what() + ": expected at least two dimensions");
  if (view.device.type != device_type)
    throw py::value_error(what() + ": expected an array on " + (device_type == dlpack::kCpu ? "the CPU" : "a GPU"));
  return view;
}

// An array's strides in elements, and the offset of one of its matrices.
struct Batch {
  const ArrayView& view;
  std::vector<int64_t> strides;

  explicit Batch(const ArrayView& array) : view(array), strides(array.ndim, 1) {
    for (int32_t d = view.ndim - 2; d >= 0; --d) strides[d] = strides[d + 1] * view.shape[d + 1];
    if (view.strides) strides.assign(view.strides, view.strides + view.ndim);
  }
  int64_t row_stride() const { return strides[view.ndim - 2]; }
  int64_t column_stride() const { return strides[view.ndim - 1]; }
  char* at(int64_t index) const {
    int64_t offset = 0;
    for (int32_t d = view.ndim - 3; d >= 0; index /= view.shape[d--]) offset += index % view.shape[d] * strides[d];
    return static_cast<char*>(view.data) + offset * size_of(view.dtype);
  }
};

std::vector<NewtonSchulzMatrix> matrices_of(const ArrayView& in, const ArrayView& out) {
  std::vector<NewtonSchulzMatrix> matrices;
  const int64_t rows = in.shape[in.ndim - 2], columns = in.shape[in.ndim - 1];
  if (in.numel() == 0) return matrices;
  const Batch from(in), to(out);
  for (int64_t i = 0; i < in.numel() / (rows * columns); ++i)
    matrices.push_back({from.at(i), to.at(i), rows, columns, from.row_stride(), to.row_stride(), in.dtype, out.dtype,
                        from.column_stride(), to.column_stride()});
  return matrices;
}

// Kept by each thread, for what the reader knows of types.
class NewtonSchulzPlan {
 public:
  void run(const py::object& array, const py::object& result, const NewtonSchulzSchedule& schedule, int threads) {
    const Cleared cleared{*this};
    read(array, result, dlpack::kCpu);
    const int64_t count = int64_t(matrices_.size());
    const int64_t bytes = cpu::newton_schulz_workspace_bytes(matrices_.data(), count, schedule, threads);
    const std::unique_ptr<void, decltype(&free)> workspace(bytes ? aligned_alloc(64, bytes) : nullptr, &free);
    if (bytes && !workspace) throw std::bad_alloc();
    py::gil_scoped_release release;
    cpu::launch_newton_schulz(matrices_.data(), count, schedule, workspace.get(), threads);
  }

  // (GPU, its current stream or None, bytes of workspace) of the launch that these arrays take. They are read until
  // clear().
  py::tuple prepare_gpu(const py::object& array, const py::object& result, const NewtonSchulzSchedule& schedule) {
    device_ = read(array, result, dlpack::kCuda);
    schedule_ = schedule;
    int64_t bytes = 0;
    if constexpr (kWithCuda)
      bytes = cuda::newton_schulz_workspace_bytes(matrices_.data(), int64_t(matrices_.size()), schedule);
    void* stream = nullptr;
    if (!reader_.current_stream(array.ptr(), device_, &stream)) return py::make_tuple(device_.id, py::none(), bytes);
    return py::make_tuple(device_.id, reinterpret_cast<uintptr_t>(stream), bytes);
  }
  void launch_gpu(uintptr_t stream, uintptr_t workspace) {
    launch_on_gpu(device_.id, [&] {
      return cuda::launch_newton_schulz(matrices_.data(), int64_t(matrices_.size()), schedule_,
                                        reinterpret_cast<void*>(workspace), reinterpret_cast<cudaStream_t>(stream));
    });
  }
  void clear() {
    reader_.clear();
    matrices_.clear();
  }

 private:
  struct Cleared {
    NewtonSchulzPlan& plan;
    ~Cleared() { plan.clear(); }
  };

  dlpack::Device read(const py::object& array, const py::object& result, int32_t device_type) {
    const ArrayView in = read_matrices(reader_, array, "G", device_type),
                    out = read_matrices(reader_, result, "result", device_type);
    if (out.read_only || in.ndim != out.ndim || !std::equal(in.shape, in.shape + in.ndim, out.shape))
      throw py::value_error("result is read-only, or not of G's shape");
    matrices_ = matrices_of(in, out);
    return in.device;
  }

  ArrayReader reader_;
  std::vector<NewtonSchulzMatrix> matrices_;
  NewtonSchulzSchedule schedule_;
  dlpack::Device device_ = {};
};

}  // namespace

void bind_newton_schulz(py::module_& module) {
  using namespace py::literals;
  py::class_<NewtonSchulzSchedule>(module, "NewtonSchulzSchedule")
      .def(py::init(&schedule_of), "steps"_a, "gram_from"_a, "dtype"_a, "arithmetic"_a);
  py::class_<NewtonSchulzPlan>(module, "NewtonSchulzPlan")
      .def(py::init<>())
      .def("run", &NewtonSchulzPlan::run, "G"_a, "result"_a, "schedule"_a, "threads"_a)
      .def("prepare_gpu", &NewtonSchulzPlan::prepare_gpu, "G"_a, "result"_a, "schedule"_a)
      .def("launch_gpu", &NewtonSchulzPlan::launch_gpu, "stream"_a, "workspace"_a)
      .def("clear", &NewtonSchulzPlan::clear);
}

}  // namespace fusedopt
