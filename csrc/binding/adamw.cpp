// AdamW's side of the binding: reads the arrays, packs the table with its scalars, and launches.
#include "binding/adamw.h"

#include <pybind11/stl.h>

#include <deque>

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

// One step over any number of lists or parameter groups. Between steps it keeps the packed table and remembers which
// table passed the overlap check; every step reads all addresses, shapes, strides and dtypes anew.
class AdamWPlan {
 public:
  void begin(double grad_scale) {
    clear();
    owners_.rewind();
    trail_.rewind();
    inv_grad_scale_ = 1.0 / grad_scale;
  }

  void add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avgs,
                 const py::sequence& exp_avg_sqs, const py::object& max_exp_avg_sqs, const py::object& step,
                 const std::vector<double>& lr, const std::vector<double>& weight_decay, double beta1, double beta2,
                 double eps, bool maximize);
  py::list add_group(int64_t group, const py::list& params, const py::dict& state, double lr, double weight_decay,
                     double beta1, double beta2, double eps, bool amsgrad, bool maximize);
  // Counts the step and updates everything added. Nothing has been written before; nothing can fail after.
  void launch(int threads) {
    counters_.commit();
    const TensorTable table = builder_.table();
    py::gil_scoped_release release;
    cpu::launch_adamw(table, scalars_.data(), threads);
  }
  void check() {
    owners_.drop_rest();
    builder_.check_overlap();
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
    updated_.clear();
    held_.clear();
  }

 private:
  // owned_grad: the gradient, if a copy may take its place where torch has left a negation in it pending.
  void add_row(Operand* operands, const ArgNames* names, int64_t index, const AdamWOptions& options, int64_t step,
               py::object* owned_grad = nullptr);
  int32_t scalars_for(const AdamWOptions& options, int64_t step);
  int64_t read_step(PyObject* counter, const ArgNames* names, int64_t index) {
    ArrayView view;
    reader_.read(counter, names->of(kCounter, index), &view);
    const int64_t step = counters_.next(counter, view, names->of(kCounter, index));
    builder_.add_counter(view, names, index);
    return step;
  }

  TableBuilder builder_{Role::kCount, kWrites};
  ArrayReader reader_;
  StepCounters counters_;
  GradReader grad_of_;
  std::vector<AdamWScalars<double>> scalars_;
  AdamWOptions last_options_{};
  int64_t last_step_ = 0;
  double inv_grad_scale_ = 1;
  std::deque<ArgNames> names_;
  std::vector<py::object> held_;    // gradients, alive until the launch is over
  std::vector<PyObject*> updated_;  // borrowed from the groups' lists
  SecondOwners owners_;
  Trail trail_;
};

bool equal(const AdamWOptions& a, const AdamWOptions& b) {
  return a.lr == b.lr && a.beta1 == b.beta1 && a.beta2 == b.beta2 && a.eps == b.eps &&
         a.weight_decay == b.weight_decay && a.maximize == b.maximize;
}

// Tensors of the same options and step, as nearly all are, share one entry.
int32_t AdamWPlan::scalars_for(const AdamWOptions& options, int64_t step) {
  if (scalars_.empty() || step != last_step_ || !equal(options, last_options_)) {
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

void AdamWPlan::add_row(Operand* operands, const ArgNames* names, int64_t index, const AdamWOptions& options,
                        int64_t step, py::object* owned_grad) {
  for (int role = 0; role < Role::kCount; ++role)
    if (operands[role].object) reader_.read(operands[role].object, names->of(role, index), &operands[role].view);
  if (owned_grad && operands[Role::kGrad].view.may_be_lazy() && is_lazy(owned_grad->ptr())) {
    *owned_grad = owned_grad->attr("resolve_conj")().attr("resolve_neg")();
    operands[Role::kGrad].object = owned_grad->ptr();
    reader_.read(owned_grad->ptr(), names->of(Role::kGrad, index), &operands[Role::kGrad].view);
  }
  if (operands[0].view.device.type == dlpack::kCuda)
    throw py::value_error(describe(names->of(0, index), operands[0].object) +
                          ": is on a GPU, but backend 'cpu' takes arrays on the CPU");
  check_dtypes(operands, *names, index);
  builder_.add(operands, names, index, scalars_for(options, step));
}

// Step: an int, a list with one array per tensor, or one 0-d array for all.
void AdamWPlan::add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avgs,
                          const py::sequence& exp_avg_sqs, const py::object& max_exp_avg_sqs, const py::object& step,
                          const std::vector<double>& lr, const std::vector<double>& weight_decay, double beta1,
                          double beta2, double eps, bool maximize) {
  ArgNames& names = names_.emplace_back();
  names.roles = {{"params", ""}, {"grads", ""}, {"exp_avgs", ""}, {"exp_avg_sqs", ""}, {"max_exp_avg_sqs", ""}};
  names.counter = {"step", ""};
  const bool amsgrad = !max_exp_avg_sqs.is_none();
  const bool numbered = py::isinstance<py::int_>(step), listed = py::isinstance<py::list>(step);
  int64_t number = 0;
  if (numbered) number = step.cast<int64_t>();
  if (!numbered && !listed) number = read_step(step.ptr(), &names, -1);
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
    const int64_t t = listed ? read_step(PyList_GET_ITEM(step.ptr(), i), &names, int64_t(i)) : number;
    add_row(operands, &names, int64_t(i),
            {lr[lr.size() > 1 ? i : 0], beta1, beta2, eps, weight_decay[weight_decay.size() > 1 ? i : 0], maximize}, t);
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

// Returns the parameters that have a gradient but no state yet; if there are any, the group must be added anew once
// they have.
py::list AdamWPlan::add_group(int64_t group, const py::list& params, const py::dict& state, double lr,
                              double weight_decay, double beta1, double beta2, double eps, bool amsgrad,
                              bool maximize) {
  ArgNames& names = names_.emplace_back();
  const std::string prefix = "param_groups[" + std::to_string(group) + "]['params']";
  names.roles = {{prefix, ""},
                 {prefix, ".grad"},
                 {prefix, "'s state 'exp_avg'"},
                 {prefix, "'s state 'exp_avg_sq'"},
                 {prefix, "'s state 'max_exp_avg_sq'"}};
  names.counter = {prefix, "'s state 'step'"};
  const AdamWOptions options = {lr, beta1, beta2, eps, weight_decay, maximize};
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
    operands[Role::kExpAvg].object = state_of(keys.exp_avg, Role::kExpAvg);
    operands[Role::kExpAvgSq].object = state_of(keys.exp_avg_sq, Role::kExpAvgSq);
    if (amsgrad) operands[Role::kMaxExpAvgSq].object = state_of(keys.max_exp_avg_sq, Role::kMaxExpAvgSq);
    for (int role = Role::kExpAvg; role < Role::kCount - !amsgrad; ++role) owners_.keep(reader_, operands[role].object);
    owners_.keep(reader_, counter);
    owners_.keep(reader_, param);
    const int64_t step = read_step(counter, &names, i);
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
      .def("begin", &AdamWPlan::begin, "grad_scale"_a)
      .def("add_lists", &AdamWPlan::add_lists, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a,
           "max_exp_avg_sqs"_a, "step"_a, "lr"_a, "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "maximize"_a)
      .def("add_group", &AdamWPlan::add_group, "group"_a, "params"_a, "state"_a, "lr"_a, "weight_decay"_a, "beta1"_a,
           "beta2"_a, "eps"_a, "amsgrad"_a, "maximize"_a)
      .def("check", &AdamWPlan::check)
      .def("updated", &AdamWPlan::updated)
      .def("launch", &AdamWPlan::launch, "threads"_a)
      .def("clear", &AdamWPlan::clear);
}

}  // namespace fusedopt
