// AdamW's side of the binding: reads the arrays, packs the table with its scalars, and launches.
#include "binding/adamw.h"

#include <pybind11/stl.h>

#include <deque>
#include <optional>

#include "binding/adamw_gpu.h"
#include "binding/numbers.h"
#include "binding/packed.h"
#include "binding/param_groups.h"
#include "binding/step_counters.h"
#include "binding/table.h"
#include "cpu/launch.h"
#include "math/adamw.h"

namespace fusedopt {
namespace {

using Role = AdamWRole;
constexpr unsigned kWrites =
    1u << Role::kParam | 1u << Role::kExpAvg | 1u << Role::kExpAvgSq | 1u << Role::kMaxExpAvgSq;

struct Step {
  int64_t number;              // of the step, where it is known on the host
  cuda::DeviceNumber counter;  // else where the device counts
  dlpack::Device device;       // the counter's; where none was given, it has no type
};

// One step over any number of lists or parameter groups, with a table for the CPU and one for each GPU. Between steps
// it keeps the packed tables and remembers which passed the overlap check; every step reads all addresses, shapes,
// strides and dtypes anew.
class AdamWPlan {
 public:
  // movable: whether numbers on one GPU may be copied to others.
  void begin(const py::object& grad_scale, const py::object& found_inf, const py::object& stream, bool movable) {
    clear();
    owners_.rewind();
    trail_.rewind();
    grad_scale_ = Number(grad_scale, "grad_scale", movable);
    found_inf_ = found_inf.is_none() ? Number() : Number(found_inf, "found_inf", movable);
    inv_grad_scale_ = grad_scale_.on_gpu() ? 0 : 1.0 / grad_scale_.on_host();
    reader_.use_stream(stream);
  }

  void add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avgs,
                 const py::sequence& exp_avg_sqs, const py::object& max_exp_avg_sqs, const py::object& step,
                 const py::list& lr, const py::list& weight_decay, double beta1, double beta2, double eps,
                 bool maximize);
  py::list add_group(int64_t group, const py::list& params, const py::dict& state, const py::object& lr,
                     const py::object& weight_decay, double beta1, double beta2, double eps, bool amsgrad,
                     bool maximize);
  void check() {
    owners_.drop_rest();
    builder_.check_overlap();
    for (AdamWGpuRows& gpu : gpus_) gpu.table.check_overlap();
  }

  // The GPUs that something added lies on. Each is launched before the CPU, since a launch there may fail.
  std::vector<int32_t> gpus() const {
    std::vector<int32_t> used;
    for (const AdamWGpuRows& gpu : gpus_)
      if (gpu.used()) used.push_back(gpu.device.id);
    return used;
  }
  // The stream that the arrays' library works on now; nothing if it does not tell.
  std::optional<uintptr_t> current_stream(int32_t gpu) {
    void* stream = nullptr;
    const AdamWGpuRows& rows = gpu_rows({dlpack::kCuda, gpu});
    if (!rows.first || !reader_.current_stream(rows.first, rows.device, &stream)) return {};
    return reinterpret_cast<uintptr_t>(stream);
  }
  // One of the parameters there.
  py::object first_on(int32_t gpu) {
    PyObject* first = gpu_rows({dlpack::kCuda, gpu}).first;
    return first ? py::reinterpret_borrow<py::object>(first) : py::none();
  }
  int64_t workspace_bytes(int32_t gpu) {
    const AdamWGpuRows& rows = gpu_rows({dlpack::kCuda, gpu});
    return rows.workspace_bytes(loss_scale_on(rows.device));
  }
  void launch_gpu(int32_t gpu, uintptr_t stream, uintptr_t workspace) {
    const AdamWGpuRows& rows = gpu_rows({dlpack::kCuda, gpu});
    rows.launch(loss_scale_on(rows.device), reinterpret_cast<void*>(workspace), reinterpret_cast<cudaStream_t>(stream));
  }
  // Counts the step on the host and updates everything added on the CPU. Nothing can fail any more.
  void launch(int threads) {
    counters_.commit();
    const TensorTable table = builder_.table();
    py::gil_scoped_release release;
    cpu::launch_adamw(table, scalars_.data(), threads);
  }
  int64_t rows_on_cpu() const { return builder_.table().size; }
  // For launches from Python: rows, layouts and numbers as arrays. On the CPU it counts the step, as launch() does.
  py::tuple packed_on_cpu() {
    counters_.commit();
    const TensorTable table = builder_.table();
    return py::make_tuple(packed_rows(table), packed_layouts(table), packed_scalars(scalars_));
  }
  py::tuple packed(int32_t gpu) {
    const AdamWGpuRows& rows = gpu_rows({dlpack::kCuda, gpu});
    return rows.packed(loss_scale_on(rows.device));
  }
  // The parameters of all groups added that have a gradient.
  py::list updated() const {
    py::list params(updated_.size());
    for (size_t i = 0; i < updated_.size(); ++i) PyList_SET_ITEM(params.ptr(), i, Py_NewRef(updated_[i]));
    return params;
  }
  void clear() {
    builder_.clear();
    counters_.clear();
    reader_.clear();
    scalars_.clear();
    names_.clear();
    numbers_.clear();
    grad_scale_ = found_inf_ = Number();
    updated_.clear();
    held_.clear();
    for (AdamWGpuRows& gpu : gpus_) gpu.clear();
  }

 private:
  struct Options {  // of one tensor; lr and weight_decay hold what `numbers` has where they are on the host
    AdamWOptions numbers;
    const Number *lr, *weight_decay;
    bool on_gpu;  // one of the two
  };
  static Options options_of(const Number& lr, const Number& weight_decay, double beta1, double beta2, double eps,
                            bool maximize) {
    const bool on_gpu = lr.on_gpu() || weight_decay.on_gpu();
    return {{lr.on_gpu() ? 0 : lr.on_host(), beta1, beta2, eps, weight_decay.on_gpu() ? 0 : weight_decay.on_host(),
             maximize},
            &lr,
            &weight_decay,
            on_gpu};
  }

  // owned_grad: the gradient, if a copy may take its place where torch has left a negation in it pending.
  void add_row(Operand* operands, const ArgNames* names, int64_t index, Options& options, const Step& step,
               py::object* owned_grad = nullptr);
  void add_gpu_row(const Operand* operands, const ArgNames* names, int64_t index, const Options& options,
                   const Step& step);
  int32_t scalars_for(const AdamWOptions& options, int64_t step);
  Step read_step(PyObject* counter, const ArgNames* names, int64_t index) {
    ArrayView view;
    const ArgName name = names->of(kCounter, index);
    reader_.read(counter, name, &view);
    if (__builtin_expect(view.device.type == dlpack::kCuda, false)) return read_gpu_step(counter, view, names, index);
    const int64_t step = counters_.next(counter, view, name);
    builder_.add_counter(view, names, index);
    return {step, {}, view.device};
  }
  Step read_gpu_step(PyObject* counter, const ArrayView& view, const ArgNames* names, int64_t index);
  bool counted_on_host(PyObject* param, PyObject* counter, const ArgNames& names, int64_t index);
  AdamWGpuRows& gpu_rows(dlpack::Device device);
  cuda::AdamWLossScale loss_scale_on(dlpack::Device device) {
    return {inv_grad_scale_, grad_scale_.on(device, reader_), found_inf_.on(device, reader_)};
  }

  TableBuilder builder_{Role::kCount, kWrites};
  ArrayReader reader_;
  StepCounters counters_;
  GradReader grad_of_;
  std::vector<AdamWScalars<double>> scalars_;
  AdamWOptions last_options_{};
  int64_t last_step_ = 0;
  Number grad_scale_, found_inf_;
  double inv_grad_scale_ = 1;  // 0: on a GPU, and not read yet
  std::deque<ArgNames> names_;
  std::deque<Number> numbers_;      // and their copies on other GPUs, alive until the launch is over
  std::vector<py::object> held_;    // gradients, alive until the launch is over
  std::vector<PyObject*> updated_;  // borrowed from the groups' lists
  SecondOwners owners_;
  Trail trail_;
  std::deque<AdamWGpuRows> gpus_;
};

// Tensors of the same options and step, as nearly all are, share one entry.
int32_t AdamWPlan::scalars_for(const AdamWOptions& options, int64_t step) {
  if (scalars_.empty() || step != last_step_ || !(options == last_options_)) {
    if (inv_grad_scale_ == 0) inv_grad_scale_ = 1.0 / grad_scale_.on_host();
    scalars_.push_back(generic::adamw_scalars(options, step, inv_grad_scale_));
    last_options_ = options;
    last_step_ = step;
  }
  return int32_t(scalars_.size()) - 1;
}

void check_dtypes(const Operand* operands, const ArgNames& names, int64_t index) {
  const DType param = operands[Role::kParam].view.dtype;
  for (int role = 0; role < Role::kCount; ++role) {
    if (!operands[role].object) continue;
    const DType dtype = operands[role].view.dtype;
    const ArgName name = names.of(role, index);
    if (!is_floating(dtype))
      throw py::type_error(describe(name, operands[role].object) + ": expected a floating-point dtype");
    if (role >= Role::kExpAvg && dtype != param && dtype != DType::kFloat32 && dtype != DType::kBFloat16)
      throw py::type_error(describe(name, operands[role].object) + ": a state has the dtype of " +
                           describe(names.of(0, index), operands[0].object) + ", or float32 or bfloat16");
  }
}

AdamWGpuRows& AdamWPlan::gpu_rows(dlpack::Device device) {
  for (AdamWGpuRows& gpu : gpus_)
    if (gpu.device == device) return gpu;
  return gpus_.emplace_back(device, kWrites);
}

Step AdamWPlan::read_gpu_step(PyObject* counter, const ArrayView& view, const ArgNames* names, int64_t index) {
  check_counter(counter, view, names->of(kCounter, index));
  AdamWGpuRows& gpu = gpu_rows(view.device);
  gpu.add_counter({view.data, view.dtype});
  gpu.table.add_counter(view, names, index);
  return {0, {view.data, view.dtype}, view.device};
}

// Whether the tensor is on a GPU, but its counter is not.
bool AdamWPlan::counted_on_host(PyObject* param, PyObject* counter, const ArgNames& names, int64_t index) {
  ArrayView tensor, count;
  reader_.read(param, names.of(Role::kParam, index), &tensor);
  reader_.read(counter, names.of(kCounter, index), &count);
  return tensor.device.type == dlpack::kCuda && count.device.type != dlpack::kCuda;
}

void AdamWPlan::add_gpu_row(const Operand* operands, const ArgNames* names, int64_t index, const Options& options,
                            const Step& step) {
  const dlpack::Device device = operands[0].view.device;
  if (step.counter.data && !(step.device == device))
    throw py::value_error(names->of(kCounter, index).str() + " is on " + device_string(step.device) + ", but " +
                          describe(names->of(0, index), operands[0].object) + " is on " + device_string(device));
  if (step.device.type && !step.counter.data && found_inf_.on_gpu())
    throw py::value_error(names->of(kCounter, index).str() +
                          " is on the CPU, but found_inf on a GPU: a counter on the CPU would have to wait for it; "
                          "keep the counter on " +
                          device_string(device));
  AdamWGpuRows& gpu = gpu_rows(device);
  if (!gpu.first) gpu.first = operands[0].object;
  const cuda::AdamWDeviceOptions own = {options.numbers, options.lr->on(device, reader_),
                                        options.weight_decay->on(device, reader_), step.counter, step.number};
  gpu.table.add(operands, names, index, gpu.index_of(own));
}

void AdamWPlan::add_row(Operand* operands, const ArgNames* names, int64_t index, Options& options, const Step& step,
                        py::object* owned_grad) {
  for (int role = 0; role < Role::kCount; ++role)
    if (operands[role].object) reader_.read(operands[role].object, names->of(role, index), &operands[role].view);
  if (owned_grad && operands[Role::kGrad].view.may_be_lazy() && is_lazy(owned_grad->ptr())) {
    *owned_grad = owned_grad->attr("resolve_conj")().attr("resolve_neg")();
    operands[Role::kGrad].object = owned_grad->ptr();
    reader_.read(owned_grad->ptr(), names->of(Role::kGrad, index), &operands[Role::kGrad].view);
  }
  check_dtypes(operands, *names, index);
  const dlpack::Device device = operands[0].view.device;
  if (__builtin_expect(device.type == dlpack::kCuda, false)) return add_gpu_row(operands, names, index, options, step);
  if (__builtin_expect(step.counter.data != nullptr, false))
    throw py::value_error(names->of(kCounter, index).str() + " is on " + device_string(step.device) + ", but " +
                          describe(names->of(0, index), operands[0].object) + " is on the CPU");
  if (__builtin_expect(options.on_gpu, false)) {  // there is nothing for it but to wait for them
    options.numbers.lr = options.lr->on_host();
    options.numbers.weight_decay = options.weight_decay->on_host();
  }
  builder_.add(operands, names, index, scalars_for(options.numbers, step.number));
}

// Step: an int, a list with one array per tensor, or one 0-d array for all.
void AdamWPlan::add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avgs,
                          const py::sequence& exp_avg_sqs, const py::object& max_exp_avg_sqs, const py::object& step,
                          const py::list& lr, const py::list& weight_decay, double beta1, double beta2, double eps,
                          bool maximize) {
  ArgNames& names = names_.emplace_back();
  names.roles = {{"params", ""}, {"grads", ""}, {"exp_avgs", ""}, {"exp_avg_sqs", ""}, {"max_exp_avg_sqs", ""}};
  names.counter = {"step", ""};
  const bool amsgrad = !max_exp_avg_sqs.is_none();
  const bool numbered = py::isinstance<py::int_>(step), listed = py::isinstance<py::list>(step);
  Step common = {};
  if (numbered) common.number = step.cast<int64_t>();
  if (!numbered && !listed) common = read_step(step.ptr(), &names, -1);
  std::vector<Number> rates, decays;
  for (const py::handle number : lr) rates.emplace_back(py::reinterpret_borrow<py::object>(number), "lr", false);
  for (const py::handle number : weight_decay)
    decays.emplace_back(py::reinterpret_borrow<py::object>(number), "weight_decay", false);
  dlpack::Device device = {};
  const py::sequence lists[] = {params, grads, exp_avgs, exp_avg_sqs,
                                amsgrad ? py::sequence(max_exp_avg_sqs) : py::sequence(py::tuple())};
  for (size_t i = 0; i < params.size(); ++i) {
    Operand operands[Role::kCount] = {};
    py::object objects[Role::kCount];
    for (int role = 0; role < Role::kCount - !amsgrad; ++role) {
      objects[role] = lists[role][i];
      operands[role].object = objects[role].ptr();
      held_.push_back(objects[role]);
    }
    const Step t = listed ? read_step(PyList_GET_ITEM(step.ptr(), i), &names, int64_t(i)) : common;
    Options options =
        options_of(rates[rates.size() > 1 ? i : 0], decays[decays.size() > 1 ? i : 0], beta1, beta2, eps, maximize);
    add_row(operands, &names, int64_t(i), options, t);
    if (i == 0) device = operands[0].view.device;
    if (!(operands[0].view.device == device))
      throw py::value_error(describe(names.of(0, int64_t(i)), operands[0].object) + ": is on " +
                            device_string(operands[0].view.device) + ", but params[0] is on " + device_string(device));
  }
}

struct StateKeys {
  PyObject *step, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
};

const StateKeys& state_keys() {
  static const StateKeys keys = {PyUnicode_InternFromString("step"), PyUnicode_InternFromString("exp_avg"),
                                 PyUnicode_InternFromString("exp_avg_sq"),
                                 PyUnicode_InternFromString("max_exp_avg_sq")};
  return keys;
}

// Returns the parameters that have a gradient but no state yet, or whose counter has to follow a found_inf on the GPU
// but is on the CPU; if there are any, the group must be added anew once they have.
py::list AdamWPlan::add_group(int64_t group, const py::list& params, const py::dict& state, const py::object& lr,
                              const py::object& weight_decay, double beta1, double beta2, double eps, bool amsgrad,
                              bool maximize) {
  ArgNames& names = names_.emplace_back();
  const std::string prefix = "param_groups[" + std::to_string(group) + "]['params']";
  names.roles = {{prefix, ""},
                 {prefix, ".grad"},
                 {prefix, "'s state 'exp_avg'"},
                 {prefix, "'s state 'exp_avg_sq'"},
                 {prefix, "'s state 'max_exp_avg_sq'"}};
  names.counter = {prefix, "'s state 'step'"};
  const Number& rate = numbers_.emplace_back(lr, "lr", true);
  const Number& decay = numbers_.emplace_back(weight_decay, "weight_decay", true);
  Options options = options_of(rate, decay, beta1, beta2, eps, maximize);
  const StateKeys& keys = state_keys();
  DictCursor states(state.ptr());
  py::list missing;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    trail_.advance();
    py::object grad = grad_of_(param);
    PyObject* entry = states.find(param);
    if (grad.is_none()) continue;
    if (!entry || !PyDict_Check(entry) || PyDict_GET_SIZE(entry) == 0) {
      missing.append(py::handle(param));
      continue;
    }
    DictCursor states_of_param(entry);
    const auto state_of = [&](PyObject* key, int role) {
      PyObject* value = states_of_param.find(key);
      if (!value) throw py::key_error(names.of(role, i).str() + " is missing");
      return value;
    };
    Operand operands[Role::kCount] = {};
    operands[Role::kParam].object = param;
    operands[Role::kGrad].object = grad.ptr();
    PyObject* counter = state_of(keys.step, kCounter);
    if (__builtin_expect(found_inf_.on_gpu(), false) && counted_on_host(param, counter, names, i)) {
      missing.append(py::handle(param));
      continue;
    }
    operands[Role::kExpAvg].object = state_of(keys.exp_avg, Role::kExpAvg);
    operands[Role::kExpAvgSq].object = state_of(keys.exp_avg_sq, Role::kExpAvgSq);
    if (amsgrad) operands[Role::kMaxExpAvgSq].object = state_of(keys.max_exp_avg_sq, Role::kMaxExpAvgSq);
    for (int role = Role::kExpAvg; role < Role::kCount - !amsgrad; ++role) owners_.keep(reader_, operands[role].object);
    owners_.keep(reader_, counter);
    const Step step = read_step(counter, &names, i);
    add_row(operands, &names, i, options, step, &grad);
    trail_.visit(counter);
    trail_.visit(entry);
    trail_.visit(reinterpret_cast<PyDictObject*>(entry)->ma_keys);
    trail_.visit(reinterpret_cast<char*>(reinterpret_cast<PyDictObject*>(entry)->ma_keys) + 64);
    for (const Operand& operand : operands)
      if (operand.object) trail_.visit_tensor(operand.object, operand.view.shape);
    held_.push_back(std::move(grad));
    updated_.push_back(param);
  }
  return missing;
}

}  // namespace

void bind_adamw(py::module_& module) {
  using namespace py::literals;
  py::class_<AdamWPlan>(module, "AdamWPlan")
      .def(py::init())
      .def("begin", &AdamWPlan::begin, "grad_scale"_a, "found_inf"_a, "stream"_a, "movable"_a)
      .def("add_lists", &AdamWPlan::add_lists, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a,
           "max_exp_avg_sqs"_a, "step"_a, "lr"_a, "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "maximize"_a)
      .def("add_group", &AdamWPlan::add_group, "group"_a, "params"_a, "state"_a, "lr"_a, "weight_decay"_a, "beta1"_a,
           "beta2"_a, "eps"_a, "amsgrad"_a, "maximize"_a)
      .def("check", &AdamWPlan::check)
      .def("updated", &AdamWPlan::updated)
      .def("gpus", &AdamWPlan::gpus)
      .def("first_on", &AdamWPlan::first_on, "gpu"_a)
      .def("rows_on_cpu", &AdamWPlan::rows_on_cpu)
      .def("current_stream", &AdamWPlan::current_stream, "gpu"_a)
      .def("workspace_bytes", &AdamWPlan::workspace_bytes, "gpu"_a)
      .def("packed", &AdamWPlan::packed, "gpu"_a)
      .def("packed_on_cpu", &AdamWPlan::packed_on_cpu)
      .def("launch_gpu", &AdamWPlan::launch_gpu, "gpu"_a, "stream"_a, "workspace"_a)
      .def("launch", &AdamWPlan::launch, "threads"_a)
      .def("clear", &AdamWPlan::clear);
}

}  // namespace fusedopt
