// What the plans of Adam's family share: they read arrays and step counters, from lists or from a torch optimizer's
// groups, sort them by device, keep alive what must live until the launch, and share scalars between tensors of equal
// options.
#pragma once
#include <pybind11/pybind11.h>

#include <deque>
#include <optional>
#include <vector>

#include "binding/adam_gpu.h"
#include "binding/numbers.h"
#include "binding/param_groups.h"
#include "binding/step_counters.h"
#include "binding/table.h"
#include "math/adamw.h"

namespace fusedopt {

// One step over any number of lists or parameter groups, with a table for the CPU and one for each GPU. Between steps
// it keeps the packed tables and remembers which passed the overlap check; every step reads all addresses, shapes,
// strides and dtypes anew.
class AdamPlan {
 public:
  virtual ~AdamPlan() = default;

  // movable: whether numbers on one GPU may be copied to others.
  virtual void begin(const py::object& grad_scale, const py::object& found_inf, const py::object& stream, bool movable);
  void check();
  // The same for two plans of one step, once each has passed on its own: that no array of one shares memory with what
  // the other writes.
  void check_beside(AdamPlan& other);
  int64_t rows_on_cpu() const { return builder_.table().size; }
  // The GPUs that something added lies on. Each is launched before the CPU, since a launch there may fail.
  std::vector<int32_t> gpus() const;
  // The stream that the arrays' library works on now; nothing if it does not tell.
  std::optional<uintptr_t> current_stream(int32_t gpu);
  // One of the parameters there.
  py::object first_on(int32_t gpu);
  // What the launch on a GPU needs beside its arrays, in bytes.
  virtual int64_t workspace_bytes(int32_t gpu) = 0;
  // Throws RuntimeError naming the device and what was built for if the launch fails.
  virtual void launch_gpu(int32_t gpu, uintptr_t stream, uintptr_t workspace) = 0;
  // Counts the step on the host and updates everything added on the CPU. Nothing can fail any more.
  virtual void launch(int threads) = 0;
  // The parameters of all groups added that have a gradient.
  py::list updated() const;
  void clear();

 protected:
  enum { kParam, kGrad };  // the roles that all have in common

  AdamPlan(int roles, unsigned writes, bool blocks = false, bool row_major = false)
      : roles_(roles), builder_(roles, writes, blocks, row_major), empty_(builder_) {}

  struct Step {
    int64_t number;              // of the step, where it is known on the host
    cuda::DeviceNumber counter;  // else where the device counts
    dlpack::Device device;       // the counter's; where none was given, it has no type
  };
  struct Options {  // of one tensor; lr and weight_decay hold what `numbers` has where they are on the host
    Options(const Number& lr, const Number& weight_decay, double beta1, double beta2, double eps, bool maximize)
        : numbers{lr.on_gpu() ? 0 : lr.on_host(),
                  beta1,
                  beta2,
                  eps,
                  weight_decay.on_gpu() ? 0 : weight_decay.on_host(),
                  maximize},
          lr(&lr),
          weight_decay(&weight_decay),
          on_gpu(lr.on_gpu() || weight_decay.on_gpu()) {}

    AdamWOptions numbers;
    const Number *lr, *weight_decay;
    bool on_gpu;  // one of the two
  };
  // One for all tensors, or one each.
  static std::vector<Number> numbers(const py::list& values, const char* name);
  static const Number& of(const std::vector<Number>& numbers, int64_t index) {
    return numbers[numbers.size() > 1 ? index : 0];
  }

  // A state that every parameter must have: its key and role.
  struct StateKey {
    PyObject* key;
    int role;
  };

  // Calls add(operands, index, step) for every row of lists[role][index], or absent(operands, index) where the gradient
  // is None. Step: an int, a list with one array per tensor, or one 0-d array for all.
  template <typename Add, typename Absent>
  void walk_lists(const ArgNames& names, const std::vector<py::sequence>& lists, const py::object& step, Add add,
                  Absent absent);
  // Calls add(operands, index, step) for every parameter that has a gradient and states, absent(state, index) for those
  // that have states alone; without a key for a counter there is no step. Returns those that have a gradient but no
  // state yet, or whose counter has to follow a found_inf on the GPU but is on the CPU; if there are any, the group
  // must be added anew once they have.
  template <typename Add, typename Absent>
  py::list walk_group(const ArgNames& names, const py::list& params, const py::dict& state,
                      const std::vector<StateKey>& keys, Add add, Absent absent);

  void read(PyObject* array, const ArgName& name, ArrayView* view) { reader_.read(array, name, view); }
  // Packs what a walk has read into its device's table. A state's dtype is the algorithm's to check.
  void add_row(const Operand* operands, const ArgNames* names, int64_t index, Options& options, const Step& step,
               const Blocks* blocks = nullptr, int64_t shared = kOwnBlocks);
  AdamGpuRows& gpu_rows(dlpack::Device device);
  AdamGpuRows& gpu_rows(int32_t gpu) { return gpu_rows({dlpack::kCuda, gpu}); }
  cuda::DeviceNumber on(dlpack::Device device, const Number& number) { return number.on(device, reader_); }
  double inv_grad_scale_on_host() {  // waits for the device if the number lies there
    if (inv_grad_scale_ == 0) inv_grad_scale_ = 1.0 / grad_scale_.on_host();
    return inv_grad_scale_;
  }
  cuda::AdamWLossScale loss_scale_on(dlpack::Device device) {
    return {inv_grad_scale_, grad_scale_.on(device, reader_), found_inf_.on(device, reader_)};
  }

  const int roles_;
  TableBuilder builder_;  // of the rows on the CPU
  StepCounters counters_;
  std::vector<AdamWScalars<double>> scalars_;
  std::deque<ArgNames> names_;
  std::deque<Number> numbers_;  // and their copies on other GPUs, alive until the launch is over

 private:
  // owned_grad: the gradient, if a copy may take its place where torch has left a negation in it pending.
  void read(Operand* operands, const ArgNames& names, int64_t index, py::object* owned_grad);
  Step read_step(PyObject* counter, const ArgNames& names, int64_t index) {
    ArrayView view;
    reader_.read(counter, names.of(kCounter, index), &view);
    if (__builtin_expect(view.device.type == dlpack::kCuda, false)) return read_gpu_step(counter, view, names, index);
    const int64_t step = counters_.next(counter, view, names.of(kCounter, index));
    builder_.add_counter(view, &names, index);
    return {step, {}, view.device};
  }
  Step read_gpu_step(PyObject* counter, const ArrayView& view, const ArgNames& names, int64_t index);
  bool counted_on_host(PyObject* param, PyObject* counter, const ArgNames& names, int64_t index);
  void add_gpu_row(const Operand* operands, const ArgNames* names, int64_t index, const Options& options,
                   const Step& step, const Blocks* blocks, int64_t shared);
  int32_t scalars_for(const AdamWOptions& options, int64_t step);
  void leave_trail(const Operand* operands, PyObject* counter, PyObject* entry);

  const TableBuilder empty_;  // what a GPU's table begins as
  ArrayReader reader_;
  GradReader grad_of_;
  AdamWOptions last_options_{};
  int64_t last_step_ = 0;
  Number grad_scale_, found_inf_;
  double inv_grad_scale_ = 1;       // 0: on a GPU, and not read yet
  std::vector<py::object> held_;    // gradients, alive until the launch is over
  std::vector<PyObject*> updated_;  // borrowed from the groups' lists
  SecondOwners owners_;
  Trail trail_;
  std::deque<AdamGpuRows> gpus_;
};

void bind_adam_plan(py::module_& module);

// A state's dtype: the parameter's, fp32 or bf16. Throws otherwise, or if one of the arrays holds no real numbers.
void check_adam_dtypes(const Operand* operands, const ArgNames& names, int64_t index, int first_state, int end);

template <typename Add, typename Absent>
void AdamPlan::walk_lists(const ArgNames& names, const std::vector<py::sequence>& lists, const py::object& step,
                          Add add, Absent absent) {
  const bool numbered = py::isinstance<py::int_>(step), listed = py::isinstance<py::list>(step);
  Step common = {};
  if (numbered) common.number = step.cast<int64_t>();
  if (!numbered && !listed) common = read_step(step.ptr(), names, -1);
  dlpack::Device device = {};
  int64_t first = -1;  // that has a gradient
  for (size_t i = 0; i < lists[0].size(); ++i) {
    Operand operands[kMaxRoles] = {};
    for (size_t role = 0; role < lists.size(); ++role) {
      held_.push_back(lists[role][i]);
      operands[role].object = held_.back().ptr();
    }
    if (operands[kGrad].object == Py_None) {
      absent(operands, int64_t(i));
      continue;
    }
    const Step t = listed ? read_step(PyList_GET_ITEM(step.ptr(), i), names, int64_t(i)) : common;
    read(operands, names, int64_t(i), nullptr);
    add(operands, int64_t(i), t);
    if (first < 0) first = int64_t(i), device = operands[kParam].view.device;
    if (!(operands[kParam].view.device == device))
      throw py::value_error(describe(names.of(kParam, int64_t(i)), operands[kParam].object) + ": is on " +
                            device_string(operands[kParam].view.device) + ", but " + names.of(kParam, first).str() +
                            " is on " + device_string(device));
  }
}

template <typename Add, typename Absent>
py::list AdamPlan::walk_group(const ArgNames& names, const py::list& params, const py::dict& state,
                              const std::vector<StateKey>& keys, Add add, Absent absent) {
  DictCursor states(state.ptr());
  py::list missing;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    trail_.advance();
    py::object grad = grad_of_(param);
    PyObject* entry = states.find(param);
    const bool has_state = entry && PyDict_Check(entry) && PyDict_GET_SIZE(entry) > 0;
    if (grad.is_none()) {
      if (has_state) absent(entry, int64_t(i));
      continue;
    }
    if (!has_state) {
      missing.append(py::handle(param));
      continue;
    }
    DictCursor states_of_param(entry);
    Operand operands[kMaxRoles] = {};
    operands[kParam].object = param;
    operands[kGrad].object = grad.ptr();
    PyObject* counter = nullptr;
    for (const auto& [key, role] : keys) {
      PyObject* value = states_of_param.find(key);
      if (!value) throw py::key_error(names.of(role, i).str() + " is missing");
      owners_.keep(reader_, value);
      (role == kCounter ? counter : operands[role].object) = value;
    }
    if (counter && __builtin_expect(found_inf_.on_gpu(), false) && counted_on_host(param, counter, names, i)) {
      missing.append(py::handle(param));
      continue;
    }
    const Step step = counter ? read_step(counter, names, i) : Step{};
    read(operands, names, i, &grad);
    add(operands, int64_t(i), step);
    leave_trail(operands, counter, entry);
    held_.push_back(std::move(grad));
    updated_.push_back(param);
  }
  return missing;
}

}  // namespace fusedopt
