// What the plans of Adam's family share: they read arrays and step counters, from lists or from a torch optimizer's
// groups, keep alive what must live until the launch, and share scalars between tensors of equal options.
#pragma once
#include <pybind11/pybind11.h>

#include <deque>
#include <vector>

#include "binding/param_groups.h"
#include "binding/step_counters.h"
#include "binding/table.h"
#include "math/adamw.h"

namespace fusedopt {

// One step over any number of lists or parameter groups. Between steps it keeps the packed table and remembers which
// table passed the overlap check; every step reads all addresses, shapes, strides and dtypes anew.
class AdamPlan {
 public:
  void begin(double grad_scale);
  void check();
  // The parameters of all groups added that have a gradient.
  py::list updated() const;
  void clear();

 protected:
  enum { kParam, kGrad };  // the roles that all have in common

  AdamPlan(int roles, unsigned writes, bool blocks = false) : roles_(roles), builder_(roles, writes, blocks) {}

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
  // that have states alone. Returns those that have a gradient but no state yet; if there are any, the group must be
  // added anew once they have.
  template <typename Add, typename Absent>
  py::list walk_group(const ArgNames& names, const py::list& params, const py::dict& state,
                      const std::vector<StateKey>& keys, Add add, Absent absent);

  void read(PyObject* array, const ArgName& name, ArrayView* view) { reader_.read(array, name, view); }
  int32_t scalars_for(const AdamWOptions& options, int64_t step);

  const int roles_;
  TableBuilder builder_;
  StepCounters counters_;
  std::vector<AdamWScalars<double>> scalars_;
  std::deque<ArgNames> names_;

 private:
  // owned_grad: the gradient, if a copy may take its place where torch has left a negation in it pending.
  void read(Operand* operands, const ArgNames& names, int64_t index, py::object* owned_grad);
  int64_t read_step(PyObject* counter, const ArgNames& names, int64_t index);
  void leave_trail(const Operand* operands, PyObject* counter, PyObject* entry);

  ArrayReader reader_;
  GradReader grad_of_;
  AdamWOptions last_options_{};
  int64_t last_step_ = 0;
  double inv_grad_scale_ = 1;
  std::vector<py::object> held_;    // gradients, alive until the launch is over
  std::vector<PyObject*> updated_;  // borrowed from the groups' lists
  SecondOwners owners_;
  Trail trail_;
};

// A state's dtype: the parameter's, fp32 or bf16. Throws otherwise, or if one of the arrays holds no real numbers.
void check_adam_dtypes(const Operand* operands, const ArgNames& names, int64_t index, int first_state, int end);

template <typename Add, typename Absent>
void AdamPlan::walk_lists(const ArgNames& names, const std::vector<py::sequence>& lists, const py::object& step,
                          Add add, Absent absent) {
  const bool numbered = py::isinstance<py::int_>(step), listed = py::isinstance<py::list>(step);
  int64_t number = 0;
  if (numbered) number = step.cast<int64_t>();
  if (!numbered && !listed) number = read_step(step.ptr(), names, -1);
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
    const int64_t t = listed ? read_step(PyList_GET_ITEM(step.ptr(), i), names, int64_t(i)) : number;
    read(operands, names, int64_t(i), nullptr);
    add(operands, int64_t(i), t);
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
    const int64_t step = read_step(counter, names, i);
    read(operands, names, i, &grad);
    add(operands, int64_t(i), step);
    leave_trail(operands, counter, entry);
    held_.push_back(std::move(grad));
    updated_.push_back(param);
  }
  return missing;
}

}  // namespace fusedopt
