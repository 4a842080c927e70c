#include "binding/adam_plan.h"

#include <pybind11/stl.h>

namespace fusedopt {

void AdamPlan::begin(const py::object& grad_scale, const py::object& found_inf, const py::object& stream,
                     bool movable) {
  clear();
  owners_.rewind();
  trail_.rewind();
  grad_scale_ = Number(grad_scale, "grad_scale", movable);
  found_inf_ = found_inf.is_none() ? Number() : Number(found_inf, "found_inf", movable);
  inv_grad_scale_ = grad_scale_.on_gpu() ? 0 : 1.0 / grad_scale_.on_host();
  reader_.use_stream(stream);
}

void AdamPlan::check() {
  owners_.drop_rest();
  builder_.check_overlap();
  for (AdamGpuRows& gpu : gpus_) gpu.table.check_overlap();
}

void AdamPlan::check_beside(AdamPlan& other) {
  builder_.check_overlap(other.builder_);
  for (AdamGpuRows& gpu : gpus_)
    for (const AdamGpuRows& theirs : other.gpus_)
      if (gpu.device == theirs.device) gpu.table.check_overlap(theirs.table);
}

std::vector<int32_t> AdamPlan::gpus() const {
  std::vector<int32_t> used;
  for (const AdamGpuRows& gpu : gpus_)
    if (gpu.used()) used.push_back(gpu.device.id);
  return used;
}

std::optional<uintptr_t> AdamPlan::current_stream(int32_t gpu) {
  void* stream = nullptr;
  const AdamGpuRows& rows = gpu_rows(gpu);
  if (!rows.first || !reader_.current_stream(rows.first, rows.device, &stream)) return {};
  return reinterpret_cast<uintptr_t>(stream);
}

py::object AdamPlan::first_on(int32_t gpu) {
  PyObject* first = gpu_rows(gpu).first;
  return first ? py::reinterpret_borrow<py::object>(first) : py::none();
}

py::list AdamPlan::updated() const {
  py::list params(updated_.size());
  for (size_t i = 0; i < updated_.size(); ++i) PyList_SET_ITEM(params.ptr(), i, Py_NewRef(updated_[i]));
  return params;
}

void AdamPlan::clear() {
  builder_.clear();
  counters_.clear();
  reader_.clear();
  scalars_.clear();
  names_.clear();
  numbers_.clear();
  grad_scale_ = found_inf_ = Number();
  updated_.clear();
  held_.clear();
  for (AdamGpuRows& gpu : gpus_) gpu.clear();
}

std::vector<Number> AdamPlan::numbers(const py::list& values, const char* name) {
  std::vector<Number> numbers;
  for (const py::handle value : values) numbers.emplace_back(py::reinterpret_borrow<py::object>(value), name, false);
  return numbers;
}

// Tensors of the same options and step, as nearly all are, share one entry.
int32_t AdamPlan::scalars_for(const AdamWOptions& options, int64_t step) {
  if (scalars_.empty() || step != last_step_ || !(options == last_options_)) {
    scalars_.push_back(generic::adamw_scalars(options, step, inv_grad_scale_on_host()));
    last_options_ = options;
    last_step_ = step;
  }
  return int32_t(scalars_.size()) - 1;
}

AdamGpuRows& AdamPlan::gpu_rows(dlpack::Device device) {
  for (AdamGpuRows& gpu : gpus_)
    if (gpu.device == device) return gpu;
  return gpus_.emplace_back(device, empty_);
}

AdamPlan::Step AdamPlan::read_gpu_step(PyObject* counter, const ArrayView& view, const ArgNames& names, int64_t index) {
  check_counter(counter, view, names.of(kCounter, index));
  AdamGpuRows& gpu = gpu_rows(view.device);
  gpu.add_counter({view.data, view.dtype});
  gpu.table.add_counter(view, &names, index);
  return {0, {view.data, view.dtype}, view.device};
}

// Whether the tensor is on a GPU, but its counter is not.
bool AdamPlan::counted_on_host(PyObject* param, PyObject* counter, const ArgNames& names, int64_t index) {
  ArrayView tensor, count;
  reader_.read(param, names.of(kParam, index), &tensor);
  reader_.read(counter, names.of(kCounter, index), &count);
  return tensor.device.type == dlpack::kCuda && count.device.type != dlpack::kCuda;
}

void AdamPlan::read(Operand* operands, const ArgNames& names, int64_t index, py::object* owned_grad) {
  for (int role = 0; role < roles_; ++role)
    if (operands[role].object) reader_.read(operands[role].object, names.of(role, index), &operands[role].view);
  if (owned_grad && operands[kGrad].view.may_be_lazy() && is_lazy(owned_grad->ptr())) {
    *owned_grad = owned_grad->attr("resolve_conj")().attr("resolve_neg")();
    operands[kGrad].object = owned_grad->ptr();
    reader_.read(owned_grad->ptr(), names.of(kGrad, index), &operands[kGrad].view);
  }
}

void AdamPlan::add_row(const Operand* operands, const ArgNames* names, int64_t index, Options& options,
                       const Step& step, const Blocks* blocks, int64_t shared) {
  const dlpack::Device device = operands[kParam].view.device;
  if (__builtin_expect(device.type == dlpack::kCuda, false))
    return add_gpu_row(operands, names, index, options, step, blocks, shared);
  if (__builtin_expect(step.counter.data != nullptr, false))
    throw py::value_error(names->of(kCounter, index).str() + " is on " + device_string(step.device) + ", but " +
                          describe(names->of(kParam, index), operands[kParam].object) + " is on the CPU");
  if (__builtin_expect(options.on_gpu, false)) {  // there is nothing for it but to wait for them
    options.numbers.lr = options.lr->on_host();
    options.numbers.weight_decay = options.weight_decay->on_host();
  }
  builder_.add(operands, names, index, scalars_for(options.numbers, step.number), blocks, shared);
}

void AdamPlan::add_gpu_row(const Operand* operands, const ArgNames* names, int64_t index, const Options& options,
                           const Step& step, const Blocks* blocks, int64_t shared) {
  const Operand& param = operands[kParam];
  const dlpack::Device device = param.view.device;
  if (step.counter.data && !(step.device == device))
    throw py::value_error(names->of(kCounter, index).str() + " is on " + device_string(step.device) + ", but " +
                          describe(names->of(kParam, index), param.object) + " is on " + device_string(device));
  if (step.device.type && !step.counter.data && found_inf_.on_gpu())
    throw py::value_error(names->of(kCounter, index).str() +
                          " is on the CPU, but found_inf on a GPU: a counter on the CPU would have to wait for it; "
                          "keep the counter on " +
                          device_string(device));
  AdamGpuRows& gpu = gpu_rows(device);
  if (!gpu.first) gpu.first = param.object;
  const cuda::AdamWDeviceOptions own = {options.numbers, options.lr->on(device, reader_),
                                        options.weight_decay->on(device, reader_), step.counter, step.number};
  gpu.table.add(operands, names, index, gpu.index_of(own), blocks, shared);
}

void AdamPlan::leave_trail(const Operand* operands, PyObject* counter, PyObject* entry) {
  const PyDictObject* dict = reinterpret_cast<PyDictObject*>(entry);
  trail_.visit(counter);
  trail_.visit(entry);
  trail_.visit(dict->ma_keys);
  trail_.visit(reinterpret_cast<const char*>(dict->ma_keys) + 64);
  for (int role = 0; role < roles_; ++role)
    if (operands[role].object) trail_.visit_tensor(operands[role].object, operands[role].view.shape);
}

void check_adam_dtypes(const Operand* operands, const ArgNames& names, int64_t index, int first_state, int end) {
  const DType param = operands[0].view.dtype;
  for (int role = 0; role < end; ++role) {
    if (!operands[role].object) continue;
    const DType dtype = operands[role].view.dtype;
    const ArgName name = names.of(role, index);
    if (!is_floating(dtype))
      throw py::type_error(describe(name, operands[role].object) + ": expected a floating-point dtype");
    if (role >= first_state && dtype != param && dtype != DType::kFloat32 && dtype != DType::kBFloat16)
      throw py::type_error(describe(name, operands[role].object) + ": a state has the dtype of " +
                           describe(names.of(0, index), operands[0].object) + ", or float32 or bfloat16");
  }
}

void bind_adam_plan(py::module_& module) {
  using namespace py::literals;
  py::class_<AdamPlan>(module, "AdamPlan")
      .def("begin", &AdamPlan::begin, "grad_scale"_a, "found_inf"_a, "stream"_a, "movable"_a)
      .def("check", &AdamPlan::check)
      .def("check_beside", &AdamPlan::check_beside, "other"_a)
      .def("updated", &AdamPlan::updated)
      .def("gpus", &AdamPlan::gpus)
      .def("first_on", &AdamPlan::first_on, "gpu"_a)
      .def("rows_on_cpu", &AdamPlan::rows_on_cpu)
      .def("current_stream", &AdamPlan::current_stream, "gpu"_a)
      .def("workspace_bytes", &AdamPlan::workspace_bytes, "gpu"_a)
      .def("launch_gpu", &AdamPlan::launch_gpu, "gpu"_a, "stream"_a, "workspace"_a)
      .def("launch", &AdamPlan::launch, "threads"_a)
      .def("clear", &AdamPlan::clear);
}

}  // namespace fusedopt
